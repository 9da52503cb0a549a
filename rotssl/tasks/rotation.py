"""Prediction of rotations: Addepalli et al. 2022 (arXiv 2210.09866), after RotNet, Gidaris et al. 2018 (arXiv 1803.07728)."""

import functools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from rotssl.base import distributed, rng
from rotssl.base.precision import full_precision
from rotssl.base.rng import Positions
from rotssl.base.sending import send
from rotssl.base.step import StepContext, StepOutput
from rotssl.config.resolved import ResolvedRotation
from rotssl.data.augment import Crop
from rotssl.models.heads import mlp
from rotssl.models.passes import each_view
from rotssl.tasks.base import Targets, Task

QUARTERS = 4  # quarter turns that a projector may be told


@functools.cache
def _places(side: int, device: torch.device) -> Tensor:
    """Index of the pixel that moves to each place under 0 to 3 quarter turns, (4, side^2)."""
    pixels = torch.arange(side * side, device=device).view(side, side)
    return torch.stack([torch.rot90(pixels, turns).flatten() for turns in range(4)])


@functools.lru_cache(maxsize=8)
def _first(batch: int, side: int, device: torch.device) -> Tensor:
    """Index of each image's first pixel in a batch, (B, 1)."""
    return torch.arange(batch, device=device)[:, None] * side**2


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn each image counter-clockwise by its own number of quarter turns, without a host synchronisation.

    Args:
        x: (B, C, S, S).
        turns: (B,) int64 in 0..3.

    Returns:
        (B, C, S, S), exact: no pixel is interpolated. In channels_last, so that one gather of whole pixels suffices: 4 to 17
        times as fast on a CPU as flips and transpositions.
    """
    return _gather(x, _sources(x.shape[-1], turns))


def _sources(side: int, turns: Tensor) -> Tensor:
    """Index of the pixel of a batch that moves to each place, (B side^2,)."""
    return (_places(side, turns.device)[turns] + _first(len(turns), side, turns.device)).flatten()


def _gather(x: Tensor, sources: Tensor) -> Tensor:
    batch, channels, side, _ = x.shape
    found = x.permute(0, 2, 3, 1).reshape(-1, channels).index_select(0, sources)
    return found.view(batch, side, side, channels).permute(0, 3, 1, 2)


def chosen(positions: Positions, fraction: float) -> npt.NDArray[np.bool_]:
    """Mask of the positions p picked by a fraction f: those with floor((p + 1) f) > floor(p f), evenly spread; (B,) bool."""
    picked: npt.NDArray[np.bool_] = np.floor((positions + 1) * fraction) > np.floor(positions * fraction)
    return picked


class Rotation(Task):
    """Classification of the angle; see the section ``rotation`` of the configuration for its modes.

    The head is that of the official code: Linear(dim, hidden), BN, ReLU, Linear(hidden, angles), on the encoder's features; the
    paper puts it on the projector's output (eq. 1; ``head_on``). The loss is the *mean* over the rotated views; the official code
    sums its two, so its weight of 0.1 is 0.2 here.
    """

    config: ResolvedRotation

    def __init__(self, config: ResolvedRotation, dim: int) -> None:
        super().__init__(config, dim)
        self.quarters = np.array(config.degrees) // 90
        self.chance = 1 / len(config.degrees)
        self.head = mlp([dim, config.hidden_dim, len(config.degrees)])
        if config.mode == "four_way":
            self.crop = Crop(config.crop_size, config.crop_scale)
        self.disjoint = config.mode == "disjoint"
        self.in_place = config.mode in ("in_place", "disjoint")
        self.teacher_too = config.mode == "in_place" and config.angles == "shared"
        self.tells = QUARTERS if config.conditioned else 0
        self.update_bn, self.joint = config.update_bn, config.joint

    def labels(self, view: int, ctx: StepContext) -> Positions:
        """Index of the angle of a view's images among ``degrees``, (B,): a function of (seed, epoch, position, view)."""
        shared = self.teacher_too
        stream = rng.key(ctx.seed, ctx.epoch, "rotation", 0 if shared else view)
        return np.floor(len(self.quarters) * rng.uniform(stream, ctx.positions, 1)[:, 0]).astype(np.int64)

    def told(self, known: Positions, view: int, ctx: StepContext) -> Positions:
        """The labels that the loss gets for these true ones of a view, (B,): with noise, some are drawn anew.

        Which ones is a function of (seed, epoch, position, view), as the new labels are: of each global batch exactly the share
        ``label_noise``, rounded to images. A new label is any angle, also the right one (figure A4 of the paper).
        """
        rate = self.config.label_noise
        if rate == 0:
            return known
        name = ctx.seed, ctx.epoch, "rotation noise", 0 if self.teacher_too else view
        order = rng.permutation(rng.key(*name, ctx.batch_start), ctx.batch_size)
        noisy = order[ctx.positions - ctx.batch_start] < round(rate * ctx.batch_size)
        drawn = np.floor(len(self.quarters) * rng.uniform(rng.key(*name), ctx.positions, 1)[:, 0]).astype(np.int64)
        return np.where(noisy, drawn, known)

    def transform(self, views: list[Tensor], ctx: StepContext) -> tuple[list[Tensor], Targets]:
        """The rotated views and their targets.

        Mode extra: the first one or two views, resized and rotated, chosen rows only. Modes in_place and disjoint: all views,
        chosen rows rotated. Mode four_way: the chosen rows of the task's crop at every angle, in one tensor.
        """
        device = views[0].device
        fraction = self.config.share_at(ctx.progress)
        picked = chosen(ctx.positions, fraction)
        rows = None if fraction == 1 else send(device, np.flatnonzero(picked))
        if not self.in_place:
            views = [view if rows is None else view[rows] for view in views[: self.config.views]]
        if self.config.resolution < 1:
            side = self.config.extra_side(views[0].shape[-1])
            views = [F.interpolate(view, (side, side), mode="bilinear", antialias=True) for view in views]
        turned, labels, angles = [], [], []
        for v, view in enumerate(views):
            if self.crop is not None:
                each = torch.arange(len(self.quarters), device=device).repeat_interleave(len(view))
                labels.append(each)
                turned.append(rotate(view.repeat(len(self.quarters), 1, 1, 1), send(device, self.quarters)[each]))
                continue
            if v == 0 or not self.teacher_too:  # else all views share the angles of the first
                known = self.labels(v, ctx)
                quarters = self.quarters[known]
                judged = send(device, self.told(known, v, ctx)[picked])
                turns = send(device, quarters * picked if self.in_place else quarters[picked])
                sources = _sources(view.shape[-1], turns)
                told = turns[:, None] == torch.arange(self.tells, device=device) if self.tells else None
            labels.append(judged)
            turned.append(_gather(view, sources))
            if told is not None:
                angles.append(told)
        batch = np.arange(ctx.batch_start, ctx.batch_start + ctx.batch_size)
        rest = send(device, np.flatnonzero(~picked)) if self.disjoint else None
        count = int(chosen(batch, fraction).sum())
        return turned, Targets(labels, rows, count, ctx.passes, rest, angles or None)

    def transform_local(self, views: list[Tensor], ctx: StepContext) -> list[Tensor]:
        """The local views, turned as the global ones of their image if these share an angle."""
        if not (views and self.teacher_too):
            return views
        picked = chosen(ctx.positions, self.config.share_at(ctx.progress))
        turns = send(views[0].device, self.quarters[self.labels(0, ctx)] * picked)
        return [rotate(view, turns) for view in views]

    def loss(self, features: list[Tensor], targets: Targets) -> StepOutput:
        """Cross-entropy averaged over the chosen rows of all workers and over the views; logs the accuracy."""
        # DDP averages over workers: world x local sum / global count is then the mean over the global batch.
        versions = 1 if self.crop is None else len(self.quarters)
        share = distributed.world_size() * targets.passes / max(1, targets.count) / len(features) / versions
        rows = targets.rows if self.in_place else None
        judged = each_view(self.head, features if rows is None else [view[rows] for view in features])
        logits = full_precision(torch.cat(judged))
        labels = torch.cat(targets.labels[: len(features)])  # the student may see only the first view
        loss = F.cross_entropy(logits, labels, reduction="sum") * share
        correct = (logits.detach().argmax(1) == labels).sum() * share
        return StepOutput(loss, {"accuracy": correct})
