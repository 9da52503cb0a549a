"""SwAV: Swapping Assignments between Views, Caron et al. 2020 (arXiv 2006.09882)."""

from collections.abc import Hashable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rotssl.base import distributed
from rotssl.base.precision import full_precision
from rotssl.base.step import StepContext, StepOutput
from rotssl.config.methods import SwavConfig
from rotssl.methods.base import Method, Pending, enqueue, other_views
from rotssl.methods.losses import normalize, similarity, sinkhorn, swapped_prediction
from rotssl.models.heads import mlp
from rotssl.models.passes import as_one


class SwAV(Method):
    """Each view predicts the code (soft assignment to prototypes) of every other global view.

    Codes are balanced over the global batch and, if enabled, over a queue of earlier embeddings. It is filled from the first
    step and used after ``queue_after`` epochs.

    Args:
        config: section of the method.
        dim: dimension of the encoder's features.
    """

    uses_teacher = False
    joint_views = True
    queue: Tensor

    def __init__(self, config: SwavConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.projector = mlp([dim, config.hidden_dim, config.out_dim])
        self.prototypes = nn.Linear(config.out_dim, config.prototypes, bias=False)
        self._normalize()
        if config.queue_size:
            self.register_buffer("queue", torch.zeros(2, config.queue_size, config.out_dim))
        self.recent = Pending()

    @torch.no_grad()
    def _normalize(self) -> None:
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    def loss(self, z: list[Tensor], z_teacher: list[Tensor] | None, ctx: StepContext) -> StepOutput:
        """Eq. 1 and 2: the mean over the ordered pairs of a view and another global one, whose code it predicts."""
        unit = as_one(lambda rows: normalize(full_precision(rows)), z)
        scores = [similarity(view, self.prototypes.weight) for view in unit]
        if self.config.queue_size:
            self.recent.add(torch.stack(unit[: ctx.global_views]), ctx)
        codes = [self._codes(scores[j], j, ctx) for j in range(ctx.global_views)]
        pairs = other_views(len(z), ctx.global_views)
        terms = [swapped_prediction(scores[i], codes[j], self.config.temperature) for i, j in pairs]
        return StepOutput(torch.stack(terms).mean())

    @torch.no_grad()
    def _codes(self, scores: Tensor, view: int, ctx: StepContext) -> Tensor:
        """Codes (B, K) of this worker's rows, balanced together with all other workers' and the queue's."""
        config, count = self.config, len(scores)
        if self._uses_queue(ctx):
            # Each worker contributes its part of the queue.
            share = self.queue[view, distributed.rank() :: distributed.world_size()]
            scores = torch.cat([scores, similarity(share, self.prototypes.weight)])
        return sinkhorn(scores, config.epsilon, config.sinkhorn_iterations, distributed.total)[:count]

    def _uses_queue(self, ctx: StepContext) -> bool:
        size = self.config.queue_size
        return size > 0 and ctx.step * ctx.batch_size >= size and ctx.epoch >= self.config.queue_after

    def phase(self, ctx: StepContext) -> Hashable:
        """Whether the prototypes are frozen, and whether the queue is in use."""
        return ctx.step < self.config.freeze_steps, self._uses_queue(ctx)

    def after_backward(self, ctx: StepContext) -> None:
        """Freeze the prototypes during the first steps (``freeze_prototypes_niters`` of the official code)."""
        if ctx.step < self.config.freeze_steps:
            self.prototypes.weight.grad = None

    def after_step(self, ctx: StepContext) -> None:
        """Normalise the prototypes, and replace the oldest embeddings in the queue by those of all workers."""
        self._normalize()
        for recent in self.recent.take():
            for queue, view in zip(self.queue, recent, strict=True):
                enqueue(queue, distributed.gather(view))
