"""When to save a state within an epoch, and what it holds beside that of an epoch's end, so that a long epoch is not lost."""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rotssl.base import distributed
from rotssl.base.paths import AnyPath

ASK_S = 5.0  # between questions to an object store
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

    def __init__(self, minutes: float, device: torch.device, asked: AnyPath) -> None:
        self.minutes, self.device, self.asked, self.saved = minutes, device, asked, time.monotonic()
        # An object store takes too long to be asked between two steps.
        self._thread = None if isinstance(asked, Path) else ThreadPoolExecutor(1, "asked")
        self._answer: Future[bool] | None = None
        self._next = 0.0

    def restart(self) -> None:
        """Start the interval anew, because the state has just been saved."""
        self.saved = time.monotonic()

    def _asked(self) -> bool:
        """Whether there is the file; in an object store, whether there was a few seconds ago."""
        if self._thread is None:
            return self.asked.exists()
        known = False
        if self._answer is not None and self._answer.done():
            known = self._answer.exception() is None and self._answer.result()
        if time.monotonic() >= self._next and (self._answer is None or self._answer.done()):
            self._answer, self._next = self._thread.submit(self.asked.exists), time.monotonic() + ASK_S
        return known

    def due(self) -> bool:
        """Whether to save now; all workers call it, and rank 0's clock and file decide for all."""
        if not self.minutes:
            return False
        late = distributed.rank() == 0
        late = late and (time.monotonic() - self.saved >= 60 * self.minutes or self._asked())
        if distributed.world_size() > 1:
            own = torch.tensor(float(late), device=self.device)
            late = float(distributed.mean(own)) > 0
        if late:
            self.restart()
        return late
