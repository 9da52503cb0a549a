"""Prediction of rotations: Addepalli et al. 2022 (arXiv 2210.09866), after RotNet, Gidaris et al. 2018 (arXiv 1803.07728)."""

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
from rotssl.data.turning import gather, rotate, sources, tilt
from rotssl.methods.losses import normalize
from rotssl.models.heads import mlp
from rotssl.models.passes import each_view, joined, parts
from rotssl.tasks.base import Targets, Task
from rotssl.tasks.contrastive import nearest_mean, supervised_contrastive, with_positives

QUARTERS = 4  # quarter turns that a projector may be told


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
        self.degrees = np.array(config.degrees)
        self.quarters = self.degrees // 90
        self.beyond = np.radians(self.degrees % 90)  # what remains after them
        self.watches = config.mode == "augment"
        classifies, self.repels = config.loss == "cross_entropy", config.loss == "cosine"
        # What only watches, or never tells which angle, is not switched off for an accuracy at chance.
        self.chance = 0.0 if self.watches or self.repels else 1 / len(config.degrees)
        self.head = mlp([dim, config.hidden_dim, len(config.degrees) if classifies else config.hidden_dim])
        if config.mode == "four_way":
            self.crop = Crop(config.crop_size, config.crop_scale)
        self.disjoint = config.mode == "disjoint"
        self.in_place = config.mode in ("in_place", "disjoint", "augment")
        self.shared = config.mode == "in_place" and config.angles == "shared"
        self.teacher_too = self.shared or self.watches
        self.tells = QUARTERS if config.conditioned else 0
        self.update_bn, self.joint = config.update_bn, config.joint

    def labels(self, view: int, ctx: StepContext) -> Positions:
        """Index of the angle of a view's images among ``degrees``, (B,): a function of (seed, epoch, position, view).

        With the loss cosine the second view's differs from the first's, each other one being as likely.
        """
        count, stream = len(self.quarters), rng.key(ctx.seed, ctx.epoch, "rotation", 0 if self.shared else view)
        uniform = rng.uniform(stream, ctx.positions, 1)[:, 0]
        if self.repels and view:
            return (self.labels(0, ctx) + 1 + np.floor((count - 1) * uniform).astype(np.int64)) % count
        return np.floor(count * uniform).astype(np.int64)

    def told(self, known: Positions, view: int, ctx: StepContext) -> Positions:
        """The labels that the loss gets for these true ones of a view, (B,): with noise, some are drawn anew.

        Which ones is a function of (seed, epoch, position, view), as the new labels are: of each global batch exactly the share
        ``label_noise``, rounded to images. A new label is any angle, also the right one (figure A4 of the paper).
        """
        rate = self.config.label_noise
        if rate == 0:
            return known
        name = ctx.seed, ctx.epoch, "rotation noise", 0 if self.shared else view
        order = rng.permutation(rng.key(*name, ctx.batch_start), ctx.batch_size)
        noisy = order[ctx.positions - ctx.batch_start] < round(rate * ctx.batch_size)
        drawn = np.floor(len(self.quarters) * rng.uniform(rng.key(*name), ctx.positions, 1)[:, 0]).astype(np.int64)
        return np.where(noisy, drawn, known)

    def transform(self, views: list[Tensor], ctx: StepContext) -> tuple[list[Tensor], Targets]:
        """The rotated views and their targets.

        Mode extra: the first one or two views, resized and rotated, chosen rows only. Modes in_place, disjoint and augment: all
        views, chosen rows rotated. Mode four_way: the chosen rows of the task's crop at every angle, in one tensor.
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
        turned, labels, angles = [], list[Tensor](), []
        whole = list[Tensor]()  # room for all views, whose passes then need no copy
        if self.crop is None and not self.beyond.any() and not any(view.requires_grad for view in views):
            sizes, (channels, *sides) = [len(view) for view in views], views[0].shape[1:]
            whole = parts(views[0].new_empty(sum(sizes), *sides, channels).permute(0, 3, 1, 2), sizes)
        for v, view in enumerate(views):
            if self.crop is not None:
                each = torch.arange(len(self.quarters), device=device).repeat_interleave(len(view))
                labels.append(each)
                turned.append(rotate(view.repeat(len(self.quarters), 1, 1, 1), send(device, self.quarters)[each]))
                continue
            if v == 0 or not self.shared:  # else all views share the angles of the first
                known = self.labels(v, ctx)
                quarters = self.quarters[known]
                told_of = self.told(known, v, ctx)[picked]
                times = len(views) if self.shared else 1
                labels += parts(send(device, np.tile(told_of, times)), [len(told_of)] * times)
                turns = send(device, quarters * picked if self.in_place else quarters[picked])
                found = sources(view.shape[-1], turns)
                told = turns[:, None] == torch.arange(self.tells, device=device) if self.tells else None
                rest = send(device, self.beyond[known][picked]) if self.beyond.any() else None  # in mode extra
            if whole:
                gather(view, found, whole[v])
                turned.append(whole[v])
            else:
                made = gather(view, found)
                turned.append(made if rest is None else tilt(made, rest))
            if told is not None:
                angles.append(told)
        batch = np.arange(ctx.batch_start, ctx.batch_start + ctx.batch_size)
        others = send(device, np.flatnonzero(~picked)) if self.disjoint else None
        count = int(chosen(batch, fraction).sum())
        return turned, Targets(labels, rows, count, ctx.passes, others, angles or None)

    def transform_local(self, views: list[Tensor], ctx: StepContext) -> list[Tensor]:
        """The local views, turned as the global ones of their image if these share an angle; in mode augment each by its own."""
        if not (views and self.teacher_too):
            return views
        picked, first = chosen(ctx.positions, self.config.share_at(ctx.progress)), ctx.global_views
        turns = [send(view.device, self.quarters[self.labels(first + v, ctx)] * picked) for v, view in enumerate(views)]
        return [rotate(view, turn) for view, turn in zip(views, turns, strict=True)]

    def loss(self, features: list[Tensor], targets: Targets) -> StepOutput:
        """The loss averaged over the chosen rows of all workers and over the views, or ``_attract``; logs the accuracy."""
        # DDP averages over workers: world x local sum / global count is then the mean over the global batch.
        versions = 1 if self.crop is None else len(self.quarters)
        share = distributed.world_size() * targets.passes / max(1, targets.count) / len(features) / versions
        rows = targets.rows if self.in_place else None
        if self.watches:
            features = [view.detach() for view in features]
        judged = each_view(self.head, features if rows is None else [view[rows] for view in features])
        logits = full_precision(joined(judged))
        labels = joined(targets.labels[: len(features)])  # the student may see only the first view
        if self.config.loss != "cross_entropy":
            z, labels = (x.unflatten(0, (len(features) * versions, -1)) for x in (normalize(logits), labels))
            right = nearest_mean(z.detach(), labels, len(self.quarters)) * share
            each = (z[0] * z[1]).sum() * share * 2 if self.repels else self._attract(z, labels, targets)
            return StepOutput(each, {"accuracy": right})
        # Where no worker has more rows than others, a mean is the same in fewer launches.
        every = (
            len(labels) > 0
            and distributed.world_size() * targets.passes * len(labels) == targets.count * len(features) * versions
        )
        loss = F.cross_entropy(logits, labels, reduction="mean" if every else "sum")
        loss = loss if every else loss * share
        correct = (logits.detach().argmax(1) == labels).sum() * share
        return StepOutput(loss, {"accuracy": correct})

    def _attract(self, z: Tensor, labels: Tensor, targets: Targets) -> Tensor:
        """The contrastive loss, averaged over the rows of all workers that have a positive: outputs (G, b, D), labels (G, b)."""
        workers = distributed.world_size()
        if targets.rows is not None and workers > 1:
            # Workers may have one image more or less: no image takes its place.
            room = (0, -(-(targets.count + 1) // workers) - labels.shape[1])
            z, labels = F.pad(z, (0, 0, *room)), F.pad(labels, room, value=-1)
        z, labels = z.flatten(0, 1), labels.flatten()
        everyone, known = distributed.gather(z), distributed.gather(labels)
        offset = distributed.rank() * len(z)
        total = supervised_contrastive(z, labels, everyone, known, offset, self.config.temperature)
        # DDP averages over workers: world x local sum / global count is then the mean over the global batch.
        return total * workers / with_positives(known, len(self.quarters)).clamp(min=1)
