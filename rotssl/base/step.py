"""What loader, methods, tasks and engine tell each other about a step."""

from dataclasses import dataclass, field

from torch import Tensor

from rotssl.base.rng import Positions


@dataclass(frozen=True)
class StepContext:
    """Where in the run a step stands.

    Attributes:
        seed: of the run.
        epoch: 0-based.
        step: 0-based, over the whole run.
        progress: share of the run's steps that are done, 0 to 1.
        positions: places of this worker's samples in the epoch's global order, (B,).
        batch_start: position of the global batch's first sample.
        batch_size: of all workers together.
        global_views: how many of the views are global; they come first.
        passes: forward passes that the step's batch is cut into; this is one of them.
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


@dataclass(frozen=True)
class StepOutput:
    """A loss to minimise, and scalars without gradient to log."""

    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)
