"""Who runs the engine: the protocol, and the one that needs nothing but this process."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from rotssl.engine.events import Event
from rotssl.runs import checkpoint


class RunFailed(Exception):
    """A run that cannot go on, for a reason that trying again would not change; the text is the one line to print."""


class Runtime(Protocol):
    """What the loop needs from whoever runs it."""

    rank: int
    world_size: int
    device: torch.device

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it is called: in DDP where there are several workers."""

    def report(self, epoch: int, metrics: dict[str, float], saved: Future[Path] | None) -> None:
        """Take an epoch (1-based), its metrics and, on rank 0, its checkpoint to come; every rank calls it once an epoch.

        It does not wait for the checkpoint, nor is an error in it its own to raise: the recorder does.
        """

    def prune(self) -> None:
        """Delete the checkpoints that are too old; called on rank 0 once a new one is there, in the thread that wrote it."""

    def progress(self, event: Event) -> None:
        """Show where the run is."""


def indexed(device: torch.device) -> torch.device:
    """The device with its index, which some of torch.cuda's functions insist on: ``cuda`` is the current GPU."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


class LocalRuntime:
    """One process, no Ray: for debugging, and for trials on one worker.

    Args:
        run_dir: where checkpoints go.
        device: where to train; without an index, the current one of its kind.
        show: takes the progress events.
    """

    rank, world_size = 0, 1

    def __init__(
        self,
        run_dir: Path,
        device: torch.device,
        show: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self.run_dir, self.device, self.progress = run_dir, indexed(device), show

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model itself."""
        return model

    def report(self, epoch: int, metrics: dict[str, float], saved: Future[Path] | None) -> None:
        """Nobody else is to be told."""

    def prune(self) -> None:
        """Keep the newest."""
        checkpoint.prune(self.run_dir)
