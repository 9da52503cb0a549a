"""Ray Train's process group, with gloo on the network that Ray uses.

By itself gloo takes the address of the host's name. Where that is 127.0.1.1, as Debian writes it into /etc/hosts, workers of two
hosts would look for each other on their own. Imports Ray Train; only ray_train.py imports this, when it needs it.
"""

import os
from dataclasses import dataclass
from typing import Any

import psutil
import ray.util
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

INTERFACE = "GLOO_SOCKET_IFNAME"


def interface_of(address: str) -> str | None:
    """The name of the network interface that has an address; None if none has."""
    found = psutil.net_if_addrs().items()
    return next((name for name, known in found if any(each.address == address for each in known)), None)


def choose_interface() -> None:
    """Tell gloo in this worker which interface to use, unless the user has."""
    if not os.environ.get(INTERFACE) and (name := interface_of(ray.util.get_node_ip_address())) is not None:
        os.environ[INTERFACE] = name


class _Backend(_TorchBackend):  # type: ignore[misc]  # Ray is untyped
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)


@dataclass
class GroupConfig(TorchConfig):  # type: ignore[misc]  # as above
    """Ray Train's TorchConfig; see the module."""

    @property
    def backend_cls(self) -> type[_Backend]:
        """The class that starts the process group."""
        return _Backend
