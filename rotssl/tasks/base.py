"""The interface of an auxiliary task: it turns views into inputs with known targets, and computes a loss on their features."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from rotssl.base.schedules import task_weight
from rotssl.base.step import StepContext, StepOutput
from rotssl.config.task import TaskConfig
from rotssl.data.augment import Crop

Reads = Literal["encoder", "projector", "stem", "stage1", "stage2", "stage", "map"]


@dataclass(frozen=True)
class Targets:
    """The targets of a task for the views that it made.

    Attributes:
        labels: one int64 tensor per view, for the rows that count.
        rows: the rows of each view that count, (b,), or None for all of them.
        count: number of images in the step's whole batch that count, so that the mean does not depend on their distribution.
        passes: number of forward passes that the step's batch is split into; their losses are averaged.
        rest: the rows that the method uses, if not all of them: the others are the task's alone.
        angles: what the projector is told about each student view, one-hot bool (B, K), or None if nothing.
    """

    labels: list[Tensor]
    rows: Tensor | None
    count: int
    passes: int = 1
    rest: Tensor | None = None
    angles: list[Tensor] | None = None


class Task(nn.Module, ABC):
    """An auxiliary task with its own head, independent of the encoder and the method.

    Args:
        config: the task's section of the configuration.
        dim: dimension of its head's input, the encoder's features or the projector's output.

    Attributes:
        chance: accuracy of a head that knows nothing; 0 if the task is not judged by an accuracy.
        reads: where its head gets its input, and its gradient meets the method's: ``encoder``, the features; ``projector``, the
            output of the method's projector; a place within the encoder (``rotssl.models.tap.stage``), the mean over its map;
            ``map``, the map of ``stage``.
        in_place: whether the method uses the transformed views too, in one forward pass shared by both. Otherwise the
            transformed views get a separate forward pass, after the method's.
        teacher_too: with ``in_place``, whether the teacher gets the transformed views too.
        tells: number of values that the method's projector gets beside the features, from ``Targets.angles``.
        joint: whether the separate forward pass is merged with the method's, for views of the same size.
        update_bn: whether the separate pass updates BatchNorm's running statistics.
        crop: an additional view of each image, made for this task only; None: it works on the global views.
    """

    chance: float = 0.0
    reads: Reads = "encoder"
    in_place: bool = False
    teacher_too: bool = False
    tells: int = 0
    joint: bool = False
    update_bn: bool = True
    crop: Crop | None = None

    @abstractmethod
    def __init__(self, config: TaskConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.reads = self.place(config)

    @property
    def inside(self) -> bool:
        """Whether it reads from within the encoder; only one task can."""
        return self.reads not in ("encoder", "projector")

    @classmethod
    def place(cls, config: TaskConfig) -> Reads:
        """Where a configuration puts the head: ``encoder`` for tasks without the field ``head_on``."""
        return getattr(config, "head_on", "encoder")

    @abstractmethod
    def transform(self, views: list[Tensor], ctx: StepContext) -> tuple[list[Tensor], Targets]:
        """The inputs of the encoder and their targets.

        Args:
            views: the global views, or the task's own crop, each (B, 3, S, S).
            ctx: context of the step.

        Returns:
            One tensor (n, 3, s, s) per forward pass (in place: one per global view), and the targets. Several versions of
            each image in one tensor are blocks of B rows.
        """

    def transform_local(self, views: list[Tensor], ctx: StepContext) -> list[Tensor]:
        """The local views that go with transformed global ones; called only with ``in_place``."""
        return views

    @abstractmethod
    def loss(self, features: list[Tensor], targets: Targets) -> StepOutput:
        """The unweighted loss, given the head's inputs, one (n, dim) per tensor; in place, of the student's global views.

        With ``reads`` at ``map`` they are (n, dim, h, h).
        """

    def weight(self, progress: float) -> float:
        """Weight of the loss at a progress of the run from 0 to 1, along its schedule; with weight auto, its share."""
        config = self.config
        full = config.share if config.weight == "auto" else config.weight
        return task_weight(full, config.part(progress), config.schedule)
