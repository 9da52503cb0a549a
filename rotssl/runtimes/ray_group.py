"""What Ray Train's controller calls: the start of the process group, with gloo on the network that Ray uses, and failures.

By itself gloo takes the address of the host's name. Where that is 127.0.1.1, as Debian writes it into /etc/hosts, workers of two
hosts would look for each other on their own. Imports Ray Train; only ray_train.py imports this, when it needs it.
"""

import os
from dataclasses import dataclass
from typing import Any

import psutil
import ray.util
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.train import UserCallback
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from rotssl.base.errors import last_line
from rotssl.runtimes.watch import Failed

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


class Tell(UserCallback):  # type: ignore[misc]  # as above
    """Tells the driver of workers that failed, before new ones start.

    Args:
        queue: of the driver's events.
    """

    def __init__(self, queue: Any) -> None:
        self.queue = queue

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Send the reason."""
        controller = ray.get_runtime_context().current_actor
        self.queue.actor.put_nowait.remote(Failed(cause(worker_exceptions), controller))


def cause(failures: dict[int, Exception]) -> str:
    """Why workers ended, in a line. That one is gone explains the errors of the others, which lost their connection to it."""
    found = {rank: getattr(error, "health_check_failure", error) for rank, error in failures.items()}
    gone = {rank: error for rank, error in found.items() if isinstance(error, RayActorError)}
    rank, error = next(iter((gone or found).items()), (0, None))
    if isinstance(error, ActorUnavailableError):
        return f"worker {rank} does not answer"
    if isinstance(error, RayActorError):
        return f"worker {rank} has died"
    return last_line(error) if isinstance(error, BaseException) else "no reason is known"
