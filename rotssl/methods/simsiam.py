"""SimSiam: Chen and He 2021 (arXiv 2011.10566)."""

from torch import Tensor

from rotssl.base.step import StepContext, StepOutput
from rotssl.config.methods import SimsiamConfig
from rotssl.methods.base import Method, rows_of_pairs
from rotssl.methods.losses import negative_cosine
from rotssl.models.heads import mlp
from rotssl.models.passes import each_view


class SimSiam(Method):
    """A predictor predicts, from each view, the projection of every other global view, which gets no gradient.

    Args:
        config: section of the method.
        dim: dimension of the encoder's features.
    """

    uses_teacher = False
    joint_views = False

    def __init__(self, config: SimsiamConfig, dim: int) -> None:
        super().__init__()
        hidden = [config.hidden_dim] * (config.layers - 1)
        self.projector = mlp([dim, *hidden, config.out_dim], last_norm=True)
        self.predictor = mlp([config.out_dim, config.predictor_dim, config.out_dim])
        if config.predictor_lr == "constant":
            self.constant_lr = ("predictor",)

    def loss(self, z: list[Tensor], z_teacher: list[Tensor] | None, ctx: StepContext) -> StepOutput:
        """Eq. 2: the mean negative cosine over all ordered pairs of views, from -1 to 1."""
        return StepOutput(negative_cosine(*rows_of_pairs(each_view(self.predictor, z), z[: ctx.global_views])))
