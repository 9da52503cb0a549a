"""BYOL: Bootstrap Your Own Latent, Grill et al. 2020 (arXiv 2006.07733)."""

from torch import Tensor

from rotssl.base.schedules import cosine
from rotssl.base.step import StepContext, StepOutput
from rotssl.config.methods import ByolConfig
from rotssl.methods.base import Method, rows_of_pairs
from rotssl.methods.losses import byol_regression
from rotssl.models.heads import mlp
from rotssl.models.passes import each_view


class BYOL(Method):
    """The student predicts, from each view, the teacher's projection of every other global view.

    Args:
        config: section of the method.
        dim: dimension of the encoder's features.
    """

    uses_teacher = True
    joint_views = False

    def __init__(self, config: ByolConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.projector = mlp([dim, config.hidden_dim, config.out_dim])
        self.predictor = mlp([config.out_dim, config.hidden_dim, config.out_dim])

    def loss(self, z: list[Tensor], z_teacher: list[Tensor] | None, ctx: StepContext) -> StepOutput:
        """Eq. 2, symmetrised: the mean over all ordered pairs of views.

        The official code sums the two directions; here it is a mean, as in the other methods, so the weight of a task has the
        same meaning with all of them. The official sum with task weight 2 w equals ours with w at twice the learning rate.
        """
        assert z_teacher is not None
        return StepOutput(byol_regression(*rows_of_pairs(each_view(self.predictor, z), z_teacher)))

    def teacher_momentum(self, progress: float) -> float:
        """1 - (1 - tau) (cos(pi k / K) + 1) / 2, section 3.2."""
        assert self.config.momentum != "auto" and self.config.momentum_end != "auto"
        return cosine(self.config.momentum, self.config.momentum_end, progress)
