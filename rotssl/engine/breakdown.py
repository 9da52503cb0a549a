"""The step at which a run breaks down, found without waiting for the device in each step."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rotssl.base import distributed
from rotssl.base.paths import AnyPath, write_whole
from rotssl.engine.runtime import RunFailed

FILE = "bad_step.json"
# float32 is exact up to it, and takes fewer operations than integers. Steps after it are noted as its predecessor.
LATEST = 2.0**24


class Breakdown:
    """Notes on the device the first step whose gradient is not finite.

    Args:
        device: of the training.

    Attributes:
        number: the step's number on the device, read in place of the host's if it is there.
    """

    number: Tensor | None = None

    def __init__(self, device: torch.device) -> None:
        # LATEST - step, so that the first one's is the largest; 0: none.
        self._first = torch.zeros((), dtype=torch.float32, device=device)

    def see(self, step: int, norm: Tensor) -> Tensor:
        """Note a step's gradient norm; returns 1 if this or an earlier one broke down, else 0, float32 on the device."""
        broken = (norm - norm).float()  # NaN, else 0
        if self.number is None:
            broken = broken.nan_to_num(nan=max(1.0, LATEST - step))
        else:
            broken = torch.where(broken == 0, 0.0, (LATEST - self.number).clamp(min=1).float())
        torch.maximum(self._first, broken, out=self._first)  # at its place, for steps that are recorded
        return self._first.sign()

    @property
    def step(self) -> int | None:
        """Number of that step in the run, from 0; None if there was none. Waits for the device."""
        first = int(self._first)
        return int(LATEST) - first if first else None

    @contextmanager
    def noted(self, folder: AnyPath) -> Iterator[int | None]:
        """Give the body that step; if it raises RunFailed, rank 0 notes the step in the run's folder, for jobs/replay.py."""
        step = self.step
        try:
            yield step
        except RunFailed as failure:
            if step is not None and distributed.rank() == 0:
                write_whole(folder / FILE, json.dumps({"step": step, "reason": str(failure)}) + "\n")
            raise


def recorded(folder: AnyPath) -> dict[str, Any] | None:
    """What ``Breakdown.noted`` wrote into a run's folder, or None."""
    try:
        found: dict[str, Any] = json.loads((folder / FILE).read_text())
        return found if isinstance(found.get("step"), int) else None
    except (OSError, ValueError, AttributeError):
        return None
