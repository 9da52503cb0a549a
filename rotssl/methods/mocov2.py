"""MoCo v2: Momentum Contrast, He et al. 2020 (arXiv 1911.05722), with the changes of Chen et al. 2020 (arXiv 2003.04297)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from rotssl.base import distributed
from rotssl.base.precision import full_precision
from rotssl.base.schedules import cosine
from rotssl.base.step import StepContext, StepOutput
from rotssl.config.methods import Mocov2Config
from rotssl.methods.base import Method, Pending, enqueue
from rotssl.methods.losses import info_nce, normalize
from rotssl.methods.oracle import Oracle
from rotssl.models.heads import mlp


class MoCoV2(Method):
    """The query of one view is matched to the key of the other among the keys of earlier batches.

    The official code shuffles batches between GPUs, so that BatchNorm's statistics do not tell which key belongs to a query: the
    positive is normalised with the query's batch, negatives were with others. ``model.norm split`` does that. With the
    statistics of all workers (``model.norm sync``) a positive still shares its query's statistics, and no negative does.

    Args:
        config: section of the method.
        dim: dimension of the encoder's features.
    """

    uses_teacher = True
    joint_views = False
    asymmetric = True
    queue: Tensor
    queue_classes: Tensor  # with an oracle only: the rows of ``StepContext.classes`` of the queue's keys, (K, 2)

    def __init__(self, config: Mocov2Config, dim: int) -> None:
        super().__init__()
        self.config = config
        self.projector = mlp([dim, config.hidden_dim, config.out_dim], norm=False)
        self.register_buffer("queue", F.normalize(torch.randn(config.queue_size, config.out_dim), dim=1))
        self.keys, self.classes = Pending(), Pending()

    def consult(self, oracle: Oracle) -> None:
        """Keep the classes of the queue's keys, for the oracle; the first keys are of no image, and so of no class."""
        super().consult(oracle)
        self.register_buffer("queue_classes", torch.full((len(self.queue), 2), -1.0, dtype=torch.float64))

    def loss(self, z: list[Tensor], z_teacher: list[Tensor] | None, ctx: StepContext) -> StepOutput:
        """InfoNCE, eq. 1 of MoCo."""
        assert z_teacher is not None
        query, key = (normalize(full_precision(view[0])) for view in (z, z_teacher))
        self.keys.add(key, ctx)
        removed, logs = None, dict[str, Tensor]()
        if self.oracle is not None and ctx.classes is not None:
            self.classes.add(ctx.classes, ctx)
            removed, logs = self.oracle.judge(ctx.classes, self.queue_classes)
        return StepOutput(info_nce(query, key, self.queue, self.config.temperature, removed), logs)

    def teacher_momentum(self, progress: float) -> float:
        """Momentum, constant as in the paper, or along a cosine if ``momentum_end`` differs."""
        return cosine(self.config.momentum, self.config.momentum_end, progress)

    def after_step(self, ctx: StepContext) -> None:
        """Replace the oldest keys in the queue by the keys of all workers."""
        for keys in self.keys.take():
            enqueue(self.queue, distributed.gather(keys))
        for classes in self.classes.take():
            enqueue(self.queue_classes, distributed.gather(classes))
