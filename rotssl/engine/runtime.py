"""The environment of the engine: the Runtime protocol, and LocalRuntime for a single process."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from rotssl.base.paths import AnyPath
from rotssl.engine.events import Event
from rotssl.runs import checkpoint


class RunFailed(Exception):
    """A failure of a run that a retry would not change; the text is the one line to print."""


class Runtime(Protocol):
    """The services that the training loop needs from its environment."""

    rank: int
    world_size: int
    device: torch.device

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model to call: wrapped in DDP if there are several workers."""

    def report(self, metrics: dict[str, float]) -> None:
        """Report the metrics of an epoch; every rank calls it once per epoch."""

    def prune(self) -> None:
        """Delete old checkpoints; called on rank 0 after a new one is written, in the thread that wrote it."""

    def progress(self, event: Event) -> None:
        """Emit an event of the run."""


def indexed(device: torch.device) -> torch.device:
    """The device with its index, as some functions of torch.cuda require; ``cuda`` becomes the current GPU."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


class LocalRuntime:
    """A Runtime of one process without Ray, for debugging and for trials on one worker.

    Args:
        run_dir: folder for checkpoints.
        device: device to train on; without an index, the current one of its kind.
        show: called with each event.
    """

    rank, world_size = 0, 1

    def __init__(
        self,
        run_dir: AnyPath,
        device: torch.device,
        show: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self.run_dir, self.device, self.progress = run_dir, indexed(device), show

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model itself."""
        return model

    def report(self, metrics: dict[str, float]) -> None:
        """Do nothing: there is nobody to report to."""

    def prune(self) -> None:
        """Keep the newest checkpoints only."""
        checkpoint.prune(self.run_dir)
