"""What the rotation head makes of whole pictures: which angles it takes for which, and what in a picture tells it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rotssl.data.turning import rotate, tilt
from rotssl.engine.pretrainer import Pretrainer
from rotssl.tasks.rotation import Rotation


@dataclass(frozen=True)
class Confusion:
    """How the head judges pictures, each of them at every angle.

    Attributes:
        degrees: the angles, counter-clockwise.
        counts: (A, A): pictures at the angle of the row that were taken for the angle of the column.
        right: (N,): share of the angles at which each picture was judged right.
    """

    degrees: tuple[int, ...]
    counts: Tensor
    right: Tensor

    @property
    def accuracy(self) -> float:
        """Share of right judgements."""
        return float(self.counts.trace() / self.counts.sum())


class Head:
    """The rotation head of a model in evaluation mode, with what it reads: whole pictures, without random crops and colours.

    Args:
        model: with the task ``rotation``.
    """

    def __init__(self, model: Pretrainer) -> None:
        task = model.tasks["rotation"]
        assert isinstance(task, Rotation)
        self.model, self.task = model, task
        self.degrees = tuple(int(angle) for angle in task.degrees)

    def logits(self, images: Tensor) -> Tensor:
        """Logits (B, A) of normalised pictures (B, 3, S, S), which are resized to the side that the task's views have."""
        side = images.shape[-1]
        if self.task.crop is not None:
            side = self.task.crop.size
        elif self.task.config.resolution < 1:
            side = self.task.config.extra_side(side)
        if side != images.shape[-1]:
            images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        split = self.model.split
        (read,) = self.model.judged(self.task, [split.cut(images) if self.task.in_place else images], None)
        out: Tensor = self.task.head(split.mean(read) if self.task.in_place else read)
        return out

    def turned(self, images: Tensor, degrees: int) -> Tensor:
        """The pictures (B, C, S, S), turned counter-clockwise."""
        quarters, beyond = divmod(degrees % 360, 90)
        made = rotate(images, torch.full((len(images),), quarters, device=images.device))
        return tilt(made, torch.full((len(images),), math.radians(beyond), device=images.device)) if beyond else made

    @torch.no_grad()
    def confusion(self, images: Tensor, batch: int = 256) -> Confusion:
        """Judge pictures (N, 3, S, S), normalised, at every angle."""
        count = len(self.degrees)
        counts, right = torch.zeros(count, count, dtype=torch.int64), torch.zeros(len(images))
        for first in range(0, len(images), batch):
            part = images[first : first + batch]
            for i, angle in enumerate(self.degrees):
                judged = self.logits(self.turned(part, angle)).argmax(1).cpu()
                counts[i] += torch.bincount(judged, minlength=count)
                right[first : first + batch] += (judged == i) / count
        return Confusion(self.degrees, counts, right)

    def saliency(self, images: Tensor) -> Tensor:
        """Gradient x input of the right angle's logit (Shrikumar et al., arXiv 1605.01713), (B, S, S) from 0 to 1.

        The absolute value of the sum over channels, turned back, averaged over the angles and over 3 x 3 pixels. An input of 0 is
        the data set's mean colour. Each map is divided by its 99th percentile and cut at 1.

        Args:
            images: upright pictures (B, 3, S, S), normalised.
        """
        total = torch.zeros_like(images[:, 0])
        for i, angle in enumerate(self.degrees):
            x = self.turned(images, angle).detach().requires_grad_()
            with self.model.balance.pause():
                (gradient,) = torch.autograd.grad(self.logits(x)[:, i].sum(), x)
            each = (gradient * x.detach()).sum(1, keepdim=True).abs()
            total += self.turned(each, -angle)[:, 0]
        total = F.avg_pool2d(total[:, None], 3, stride=1, padding=1, count_include_pad=False)[:, 0]
        top = total.flatten(1).quantile(0.99, dim=1).clamp(min=1e-12)
        return (total / top[:, None, None]).clamp(max=1)
