"""BYOL: Bootstrap Your Own Latent, Grill et al. 2020 (arXiv 2006.07733)."""

import torch
from torch import Tensor

from rotssl.losses import byol_regression
from rotssl.methods import ByolConfig
from rotssl.methods.base import Method, StepContext, StepOutput
from rotssl.models.heads import mlp
from rotssl.schedules import cosine


class BYOL(Method):
    """The student predicts, from one view, the teacher's projection of every other view.

    Args:
        config: its fields.
        dim: dimension of the encoder's features.
    """

    uses_teacher = True
    joint_views = False

    def __init__(self, config: ByolConfig, dim: int) -> None:
        super().__init__()
        self.momentum = config.momentum
        self.projector = mlp([dim, config.hidden_dim, config.out_dim])
        self.predictor = mlp([config.out_dim, config.hidden_dim, config.out_dim])

    def loss(self, z: list[Tensor], z_teacher: list[Tensor] | None, ctx: StepContext) -> StepOutput:
        """Eq. 2, symmetrised: the mean over all ordered pairs of views.

        The official code sums its two directions; like the other methods' losses, ours is a mean, so that a task's weight means
        the same beside each of them. Their sum with a weight of 2 w is ours with w at twice the learning rate.
        """
        assert z_teacher is not None
        predictions = [self.predictor(view) for view in z]
        terms = [byol_regression(p, t) for i, p in enumerate(predictions) for j, t in enumerate(z_teacher) if i != j]
        return StepOutput(torch.stack(terms).mean())

    def teacher_momentum(self, progress: float) -> float:
        """1 - (1 - tau) (cos(pi k / K) + 1) / 2, section 3.2."""
        return cosine(self.momentum, 1.0, progress)
