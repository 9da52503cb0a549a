"""SimCLR: Chen et al. 2020 (arXiv 2002.05709)."""

from itertools import combinations

import torch
from torch import Tensor

from rotssl.base import distributed
from rotssl.base.precision import full_precision
from rotssl.base.step import StepContext, StepOutput
from rotssl.config.methods import SimclrConfig
from rotssl.methods.base import Method
from rotssl.methods.losses import normalize, nt_xent
from rotssl.models.heads import mlp
from rotssl.models.passes import as_one


class SimCLR(Method):
    """Two views of an image attract each other and repel all other images of the global batch.

    Args:
        config: section of the method.
        dim: dimension of the encoder's features.
    """

    uses_teacher = False
    joint_views = True

    def __init__(self, config: SimclrConfig, dim: int) -> None:
        super().__init__()
        self.temperature = config.temperature
        self.projector = mlp([dim, config.hidden_dim, config.out_dim], last_norm=config.last_norm)

    def loss(self, z: list[Tensor], z_teacher: list[Tensor] | None, ctx: StepContext) -> StepOutput:
        """NT-Xent (eq. 1) with the negatives of all workers, averaged over the pairs of views with at least one global."""
        own = as_one(lambda rows: normalize(full_precision(rows)), z)
        everyone = [distributed.gather(view) for view in own]
        offset = distributed.rank() * len(own[0])
        removed, logs = None, dict[str, Tensor]()
        if self.oracle is not None and ctx.classes is not None:
            removed, logs = self.oracle.judge(ctx.classes, distributed.gather(ctx.classes), offset)
        terms = [
            nt_xent(own[i], own[j], everyone[i], everyone[j], offset, self.temperature, removed)
            for i, j in combinations(range(len(own)), 2)
            if i < ctx.global_views
        ]
        return StepOutput(torch.stack(terms).mean(), logs)
