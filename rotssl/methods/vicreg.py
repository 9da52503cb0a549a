"""VICReg: Variance-Invariance-Covariance Regularization, Bardes, Ponce and LeCun 2022 (arXiv 2105.04906)."""

from itertools import combinations

import torch
from torch import Tensor

from rotssl.base import distributed
from rotssl.base.step import StepContext, StepOutput
from rotssl.config.methods import VicregConfig
from rotssl.methods.base import Method
from rotssl.methods.losses import vicreg
from rotssl.models.heads import mlp


class VICReg(Method):
    """Pulls views together, while keeping the variance of each output and decorrelating the outputs.

    Args:
        config: section of the method.
        dim: dimension of the encoder's features.
    """

    uses_teacher = False
    joint_views = False

    def __init__(self, config: VicregConfig, dim: int) -> None:
        super().__init__()
        self.weights = config.invariance, config.variance, config.covariance
        self.projector = mlp([dim, config.hidden_dim, config.hidden_dim, config.out_dim], last_bias=False)

    def loss(self, z: list[Tensor], z_teacher: list[Tensor] | None, ctx: StepContext) -> StepOutput:
        """Eq. 6 as in the official code (see rotssl.methods.losses.vicreg), averaged over the pairs of views."""
        terms = [vicreg(a, b, self.weights, distributed.total) for a, b in combinations(z, 2)]
        return StepOutput(torch.stack(terms).mean())
