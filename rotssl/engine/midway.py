"""When to save a state within an epoch, and what it holds beside that of an epoch's end, so that a long epoch is not lost."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rotssl.base import distributed

LOOK = 50  # steps between looks at the clock and at breakdowns, which wait for the device and for the other workers


@dataclass(frozen=True)
class Begun:
    """What has been done of an epoch.

    Attributes:
        step: number of its steps.
        seconds: seconds of training.
        waited: seconds of waiting for images.
        averages: ``Averages.state`` of its logs.
    """

    step: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    averages: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, state: Mapping[str, Any] | None) -> "Begun":
        """What a checkpoint's state holds of the epoch after its last whole one."""
        return cls(**(state or {}).get("within", {}))


class Clock:
    """Tells the workers when to save.

    Args:
        minutes: between saves; 0: never within an epoch.
        device: of the collectives.
        asked: a file; as long as it exists, every look saves.
    """

    def __init__(self, minutes: float, device: torch.device, asked: Path) -> None:
        self.minutes, self.device, self.asked, self.saved = minutes, device, asked, time.monotonic()

    def restart(self) -> None:
        """Start the interval anew, because the state has just been saved."""
        self.saved = time.monotonic()

    def due(self) -> bool:
        """Whether to save now; all workers call it, and rank 0's clock and file decide for all."""
        if not self.minutes:
            return False
        late = distributed.rank() == 0
        late = late and (time.monotonic() - self.saved >= 60 * self.minutes or self.asked.exists())
        if distributed.world_size() > 1:
            own = torch.tensor(float(late), device=self.device)
            late = float(distributed.mean(own)) > 0
        if late:
            self.restart()
        return late
