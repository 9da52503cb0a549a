"""Barlow Twins: Zbontar et al. 2021 (arXiv 2103.03230)."""

from itertools import combinations

import torch
from torch import Tensor

from rotssl.base import distributed
from rotssl.base.step import StepContext, StepOutput
from rotssl.config.methods import BarlowConfig
from rotssl.methods.base import Method
from rotssl.methods.losses import barlow_twins
from rotssl.models.heads import mlp


class BarlowTwins(Method):
    """Brings the cross-correlation matrix of the outputs for two views close to the identity.

    Args:
        config: section of the method.
        dim: dimension of the encoder's features.
    """

    uses_teacher = False
    joint_views = False

    def __init__(self, config: BarlowConfig, dim: int) -> None:
        super().__init__()
        self.off_diagonal = config.off_diagonal
        self.projector = mlp([dim, config.hidden_dim, config.hidden_dim, config.out_dim], last_bias=False)

    def loss(self, z: list[Tensor], z_teacher: list[Tensor] | None, ctx: StepContext) -> StepOutput:
        """Eq. 1 over the global batch, averaged over the pairs of views."""
        pairs = combinations(z, 2)
        terms = [barlow_twins(a, b, self.off_diagonal, distributed.total) for a, b in pairs]
        return StepOutput(torch.stack(terms).mean())
