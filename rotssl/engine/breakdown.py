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


class Breakdown:
    """Notes on the device the first step whose gradient is not finite.

    Args:
        device: of the training.

    Attributes:
        number: the step's number on the device, read in place of the host's if it is there.
    """

    number: Tensor | None = None

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((), -1, dtype=torch.int64, device=device)

    def see(self, step: int, norm: Tensor) -> Tensor:
        """Note a step's gradient norm; returns whether this step or an earlier one broke down, a bool on the device."""
        finite = norm - norm == 0  # as torch.isfinite, in half as many launches
        if self.number is None:
            self._first = torch.where(finite | (self._first >= 0), self._first, step)
        else:  # at its place
            torch.where(finite | (self._first >= 0), self._first, self.number, out=self._first)
        return self._first >= 0

    @property
    def step(self) -> int | None:
        """Number of that step in the run, from 0; None if there was none. Waits for the device."""
        first = int(self._first)
        return None if first < 0 else first

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
