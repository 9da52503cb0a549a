"""The method's code, which is imported when a run starts."""

from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from align_uniform import AlignUniformConfig
from rotssl import Method, StepContext, StepOutput
from rotssl.base import distributed
from rotssl.base.precision import full_precision
from rotssl.models.heads import mlp


class AlignUniform(Method):
    """Views of an image attract each other; all images of the global batch repel each other.

    Args:
        config: section of the method.
        dim: dimension of the encoder's features.
    """

    uses_teacher = False
    joint_views = True

    def __init__(self, config: AlignUniformConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.projector = mlp([dim, config.hidden_dim, config.out_dim])

    def loss(self, z: list[Tensor], z_teacher: list[Tensor] | None, ctx: StepContext) -> StepOutput:
        """Section 4.3: alignment, averaged over the pairs of views, plus the weighted uniformity, averaged over the views."""
        views = [F.normalize(full_precision(view), dim=1) for view in z]
        pairs = [(a - b).norm(dim=1).pow(self.config.alpha).mean() for a, b in combinations(views, 2)]
        apart = [self._uniformity(distributed.gather(view)) for view in views]
        align, uniform = torch.stack(pairs).mean(), torch.stack(apart).mean()
        logs = {"align_uniform/alignment": align.detach(), "align_uniform/uniformity": uniform.detach()}
        return StepOutput(align + self.config.uniformity * uniform, logs)

    def _uniformity(self, z: Tensor) -> Tensor:
        """The log of the mean Gaussian potential over all pairs of rows of z (N, D)."""
        squared = (2 - 2 * (z @ z.T)).clamp(min=0)
        rows, columns = torch.triu_indices(len(z), len(z), 1, device=z.device)
        return squared[rows, columns].mul(-self.config.t).exp().mean().log()
