"""The data about a step that loader, methods, tasks and engine exchange."""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from rotssl.base.rng import Positions


@dataclass(frozen=True)
class StepContext:
    """The context of a step: its place in the run and its batch.

    Attributes:
        seed: seed of the run.
        epoch: 0-based.
        step: 0-based, over the whole run.
        progress: share of the run's steps that are done, 0 to 1.
        positions: positions of this worker's samples in the epoch's global order, (B,).
        batch_start: position of the global batch's first sample.
        batch_size: size of the global batch, over all workers.
        global_views: number of global views, which precede the local ones.
        passes: number of forward passes that the step's batch is split into; this is one of them.
        repeat: whether the method's loss is called again for the same pass, with other projections of its views.
        classes: class of each of these samples and a number in [0, 1) of its image, (B, 2) float64, for an oracle or
            supervised training; None: no labels are read.
        draws: what was drawn for the views of each pass, made and sent to the device ahead; none: it is drawn when needed.
    """

    seed: int
    epoch: int
    step: int
    progress: float
    positions: Positions
    batch_start: int
    batch_size: int
    global_views: int = 2
    passes: int = 1
    repeat: bool = False
    classes: Tensor | None = None
    draws: tuple[Any, ...] = ()

    def part(self, first: int, last: int) -> "StepContext":
        """The context of a part of its samples."""
        classes = None if self.classes is None else self.classes[first:last]
        return replace(self, positions=self.positions[first:last], classes=classes)

    def of_rows(self, rows: Tensor | None) -> "StepContext":
        """The same with the classes of some rows only, those that a method sees; None: of all."""
        return self if rows is None or self.classes is None else replace(self, classes=self.classes[rows])


@dataclass(frozen=True)
class StepOutput:
    """A loss to minimise, and scalars without gradient to log."""

    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)
