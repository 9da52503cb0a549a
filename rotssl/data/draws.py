"""What was drawn for the views of a batch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rotssl.base.rng import Positions
from rotssl.base.step import StepContext


class Plan(NamedTuple):
    """How to make one view: the slices of sort_steps(), or the operations of apply_masked(), and the shapes of its numbers."""

    work: Any
    shapes: list[tuple[int, ...]]


@dataclass(frozen=True)
class Draws:
    """What was drawn for the views of a batch; a function of the seed, the epoch, the progress and the samples' positions.

    Attributes:
        epoch: 0-based.
        progress: of the run, on which the views' sides depend.
        positions: of the samples, (B,).
        plans: of each view: global, local, then those of tasks.
        names: of scalars to log, which are the last numbers.
        numbers: of all of them, float32 in one tensor, so that they go to the device in one copy.
    """

    epoch: int
    progress: float
    positions: Positions
    plans: list[Plan]
    names: tuple[str, ...]
    numbers: Tensor

    def are_for(self, ctx: StepContext) -> bool:
        """Whether they are those of a step."""
        same = (self.epoch, self.progress) == (ctx.epoch, ctx.progress)
        return same and np.array_equal(self.positions, ctx.positions)

    def to(self, device: torch.device) -> "Draws":
        """The same with the numbers on the device, copied without waiting."""
        if device.type != "cuda":
            return self
        return replace(self, numbers=self.numbers.pin_memory().to(device, non_blocking=True))

    def each(self) -> Iterator[tuple[Plan, list[Tensor]]]:
        """Each view's plan and numbers."""
        sizes = [math.prod(shape) for plan in self.plans for shape in plan.shapes]
        parts = iter(self.numbers.split([*sizes, len(self.names)]))
        for plan in self.plans:
            yield plan, [next(parts).view(shape) for shape in plan.shapes]

    def logs(self) -> dict[str, Tensor]:
        """The scalars to log, on the device of the numbers."""
        return {name: self.numbers[i - len(self.names)] for i, name in enumerate(self.names)}
