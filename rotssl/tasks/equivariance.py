"""Equivariance of an intermediate map to quarter turns: SER, Soft Equivariance Regularization (arXiv 2603.06693)."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rotssl.base import distributed, rng
from rotssl.base.precision import full_precision
from rotssl.base.rng import Positions
from rotssl.base.sending import send
from rotssl.base.step import StepContext, StepOutput
from rotssl.config.task import TaskConfig
from rotssl.config.tasks import EquivarianceConfig
from rotssl.data.turning import rotate
from rotssl.tasks.base import Reads, Targets, Task
from rotssl.tasks.rotation import chosen

# The norm below which a place of a map counts as empty: the gradient of a cosine grows as 1 / norm.
EMPTY = 0.01


class Equivariance(Task):
    """The map of the last stage but one of a turned view shall be the turned map; see the section ``equivariance``.

    There is no head and no label, and the final embedding is left alone. Part of the batch is the task's alone, in pairs: an
    image and, in place of another one, its copy turned by 1 to 3 quarter turns. So it takes no extra forward pass.
    """

    config: EquivarianceConfig

    def __init__(self, config: EquivarianceConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.in_place = True

    @classmethod
    def place(cls, config: TaskConfig) -> Reads:
        """The map, always."""
        return "map"

    def paired(self, positions: Positions, progress: float) -> Positions:
        """The rows in pairs, (2P,): a source, its copy, the next source, ...; a last one without a partner is left out."""
        rows = np.flatnonzero(chosen(positions, self.config.share_at(progress)))
        return rows[: len(rows) // 2 * 2]

    def turns(self, view: int, positions: Positions, ctx: StepContext) -> Positions:
        """Quarter turns of copies of the images at these positions, 1 to 3: a function of (seed, epoch, position, view)."""
        stream = rng.key(ctx.seed, ctx.epoch, "equivariance", view)
        return 1 + np.floor(3 * rng.uniform(stream, positions, 1)[:, 0]).astype(np.int64)

    def transform(self, views: list[Tensor], ctx: StepContext) -> tuple[list[Tensor], Targets]:
        """The views with the copies in their places; the labels are the quarter turns of the paired rows, 0 for sources."""
        paired = self.paired(ctx.positions, ctx.progress)
        rows = send(views[0].device, paired)
        made, labels = [], []
        for v, view in enumerate(views):
            turns = np.zeros_like(paired)
            turns[1::2] = self.turns(v, ctx.positions[paired[::2]], ctx)
            labels.append(send(view.device, turns))
            made.append(view.index_copy(0, rows[1::2], rotate(view[rows[::2]], labels[v][1::2])))
        batch = np.arange(ctx.batch_start, ctx.batch_start + ctx.batch_size)
        count = len(self.paired(batch, ctx.progress))
        rest = send(rows.device, np.setdiff1d(np.arange(len(ctx.positions)), paired))
        return made, Targets(labels, rows, count, ctx.passes, rest)

    def loss(self, features: list[Tensor], targets: Targets) -> StepOutput:
        """1 - the mean cosine over channels of the copy's map and the turned map of its source; logs the cosine.

        The mean is over places, pairs of all workers, and views.

        Args:
            features: the maps (B, C, h, h) of the student's global views.
            targets: from ``transform``.
        """
        rows = targets.rows
        assert rows is not None
        # DDP averages over workers: world x local sum / global count is then the mean over the global batch.
        share = distributed.world_size() * targets.passes / max(1, targets.count // 2) / len(features)
        similarity = torch.zeros((), device=features[0].device)
        for view, turns in zip(features, targets.labels, strict=False):  # the student may see only the first view
            sources, copies = full_precision(view[rows[::2]]), full_precision(view[rows[1::2]])
            cosine = F.cosine_similarity(copies, rotate(sources, turns[1::2]), dim=1, eps=EMPTY)
            similarity = similarity + cosine.mean((1, 2)).sum() * share
        return StepOutput(1 - similarity, {"similarity": similarity.detach()})
