"""The interface of a pretraining method: from projections to a loss."""

from abc import ABC, abstractmethod
from collections.abc import Hashable

import torch
from torch import Tensor, nn

from rotssl.base.step import StepContext, StepOutput
from rotssl.methods.oracle import Oracle
from rotssl.models.passes import joined


class Pending:
    """Tensors from the forward passes of a step, kept until the step is taken; those of a skipped step are dropped."""

    def __init__(self) -> None:
        self.step, self.parts = -1, list[Tensor]()

    def add(self, part: Tensor, ctx: StepContext) -> None:
        """Keep a tensor, without gradient; what a repeated call of the loss in the same pass adds is left out."""
        if ctx.repeat:
            return
        if ctx.step != self.step:
            self.step, self.parts = ctx.step, []
        self.parts.append(part.detach())

    def take(self) -> list[Tensor]:
        """Return the tensors and clear the list."""
        parts, self.parts = self.parts, []
        return parts


def other_views(views: int, targets: int) -> list[tuple[int, int]]:
    """Pairs (view, target) of every view with each of the first ``targets`` views except itself."""
    return [(i, j) for j in range(targets) for i in range(views) if i != j]


def rows_of_pairs(views: list[Tensor], targets: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows and targets of all pairs of ``other_views``, (P B, D) each, for losses that are means over rows."""
    pairs = sorted(other_views(len(views), len(targets)))  # so that two views are in their order
    return joined([views[i] for i, _ in pairs]), joined([targets[j] for _, j in pairs])


def enqueue(queue: Tensor, new: Tensor) -> None:
    """Append the newest rows (n, D) to a queue (K, D), in place; as many of the oldest, at its front, drop out."""
    queue.copy_(torch.cat([queue, new.to(queue.dtype)])[-len(queue) :])


class Method(nn.Module, ABC):
    """A loss on projections, independent of images, encoder, tasks, configuration files and loggers.

    A subclass is built with its configuration and the dimension D of the features, sets ``projector`` (D -> out_dim; applied by
    the Pretrainer, and copied for the teacher) and declares traits; traits that the command line needs are in its MethodSpec.
    State that outlives a step is in buffers, equal on all workers; ``loss`` reads them, ``after_step`` writes them, and both may
    gather.

    Attributes:
        uses_teacher: whether the Pretrainer keeps an EMA copy of encoder and projector and passes its projections; it then calls
            ``teacher_momentum``.
        joint_views: whether views go through the encoder in one pass per resolution, and through the projector in one pass
            (which changes BatchNorm's statistics), or each view in a separate pass.
        asymmetric: whether the student sees only the first global view and the teacher only the second (query and key).
        constant_lr: names of the submodules whose learning rate does not decay.
        oracle: what removes negatives of the anchor's class from the loss, or None.
    """

    uses_teacher: bool
    joint_views: bool
    asymmetric: bool = False
    constant_lr: tuple[str, ...] = ()
    oracle: Oracle | None = None
    projector: nn.Module

    def consult(self, oracle: Oracle) -> None:
        """Ask an oracle about the negatives from now on; only called if the method has any."""
        self.oracle = oracle

    @abstractmethod
    def loss(self, z: list[Tensor], z_teacher: list[Tensor] | None, ctx: StepContext) -> StepOutput:
        """The loss of a step; called again, with ``ctx.repeat``, for other combinations of the tiles of views (views.split).

        Args:
            z: projections of the student, one (B, out_dim) per view, the global ones first.
            z_teacher: projections of the teacher without gradient, one (B, out_dim) per global view, or None without a teacher.
            ctx: context of the step.
        """

    def teacher_momentum(self, progress: float) -> float:
        """EMA momentum of the teacher at a progress from 0 to 1; called only with ``uses_teacher``."""
        raise TypeError(f"{type(self).__name__} has no teacher")

    def phase(self, ctx: StepContext) -> Hashable:
        """What else of the context than the teacher's momentum decides what a step computes; equal where it does the same."""
        return None

    def after_backward(self, ctx: StepContext) -> None:
        """Hook between the backward pass and the optimizer step."""

    def after_step(self, ctx: StepContext) -> None:
        """Hook after the optimizer step, without gradient."""
