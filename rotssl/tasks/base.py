"""The contract of an auxiliary task: it changes views into inputs with known targets, and judges the features of those."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rotssl.base.schedules import task_weight
from rotssl.base.step import StepContext, StepOutput
from rotssl.config.tasks import TaskConfig
from rotssl.data.augment import Crop


@dataclass(frozen=True)
class Targets:
    """What a task asks of the features of the views that it made.

    Attributes:
        labels: one int64 tensor a view, for the rows that count.
        rows: the rows of each view that count, (b,), or None for all of them.
        count: of the images in the step's whole batch that count, for a mean that doesn't depend on how they are spread.
        passes: forward passes that the step's batch is cut into; their losses are averaged.
    """

    labels: list[Tensor]
    rows: Tensor | None
    count: int
    passes: int = 1


def send(device: torch.device, array: npt.NDArray[np.int64]) -> Tensor:
    """A host array as a tensor on the device; the host doesn't wait for the copy."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Task(nn.Module, ABC):
    """Owns its head; never sees the encoder or the method.

    Args:
        config: the task's section of the configuration.
        dim: dimension of what its head sees, the encoder's features or the projector's output.

    Attributes:
        on_projector: whether its head sees the output of the method's projector instead of the encoder's features.
        in_place: whether the method sees the transformed views too, in the one forward that both share. Otherwise the
            transformed views get a forward of their own, after the method's.
        teacher_too: in place, whether the teacher's views are the transformed ones.
        joint: whether that extra forward is one with the method's, for views of the same size.
        update_bn: whether it updates BatchNorm's running statistics.
        crop: a view of each image that is made for this task alone; None: it works on the global views.
    """

    on_projector: bool = False
    in_place: bool = False
    teacher_too: bool = False
    joint: bool = False
    update_bn: bool = True
    crop: Crop | None = None

    @abstractmethod
    def __init__(self, config: TaskConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.on_projector = self.sees_projector(config)

    @classmethod
    def sees_projector(cls, config: TaskConfig) -> bool:
        """Whether a configuration puts the head on the projector's output; tasks without the field ``head_on`` don't."""
        return getattr(config, "head_on", "encoder") == "projector"

    @abstractmethod
    def transform(self, views: list[Tensor], ctx: StepContext) -> tuple[list[Tensor], Targets]:
        """What the encoder shall see, and what is asked of its features.

        Args:
            views: the global views, or the task's own crop, each (B, 3, S, S).
            ctx: where in the run this is.

        Returns:
            One tensor (n, 3, s, s) a forward pass (in place: one a global view), and the targets. Several versions of
            each image in one tensor are blocks of B rows.
        """

    @abstractmethod
    def loss(self, features: list[Tensor], targets: Targets) -> StepOutput:
        """The unweighted loss from what the head sees, one (n, dim) a tensor; in place, of the student's global views."""

    def weight(self, progress: float) -> float:
        """Weight of the loss at a progress of the run from 0 to 1, along its schedule."""
        return task_weight(self.config.weight, progress, self.config.schedule)
