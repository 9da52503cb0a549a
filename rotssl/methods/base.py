"""The contract of a method: projections in, a loss out."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor, nn

from rotssl.rng import Positions


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
    """

    seed: int
    epoch: int
    step: int
    progress: float
    positions: Positions
    batch_start: int
    batch_size: int


@dataclass(frozen=True)
class StepOutput:
    """A loss to minimise, and scalars without gradient to log."""

    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


class Method(nn.Module, ABC):
    """Instance similarity on projections; never sees images, the encoder, other tasks, configuration files or loggers.

    A subclass sets ``projector`` (D -> out_dim; applied by the Pretrainer, and copied for the teacher) and declares two traits:

    Attributes:
        uses_teacher: whether the Pretrainer keeps an EMA copy of encoder and projector and passes its projections.
        joint_views: whether all views go through the encoder in one pass (changes BatchNorm's statistics) or each in its own.
    """

    uses_teacher: bool
    joint_views: bool
    projector: nn.Module

    @abstractmethod
    def loss(self, z: list[Tensor], z_teacher: list[Tensor] | None, ctx: StepContext) -> StepOutput:
        """The loss of a step.

        Args:
            z: projections of the student, one (B, out_dim) a view.
            z_teacher: projections of the teacher without gradient, one (B, out_dim) a global view, or None without a teacher.
            ctx: where in the run this is.
        """

    def teacher_momentum(self, progress: float) -> float:
        """EMA momentum of the teacher at a progress from 0 to 1; only asked where ``uses_teacher``."""
        raise TypeError(f"{type(self).__name__} has no teacher")

    def after_backward(self, ctx: StepContext) -> None:
        """Hook between the backward pass and the optimizer step."""

    def after_step(self, ctx: StepContext) -> None:
        """Hook after the optimizer step."""
