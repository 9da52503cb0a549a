"""Supervised training: cross-entropy with the labels. USES LABELS: a line beside the self-supervised ones, not one of them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rotssl.base.precision import full_precision
from rotssl.base.step import StepContext, StepOutput
from rotssl.config.methods import SupervisedConfig
from rotssl.methods.base import Method


class Supervised(Method):
    """Each view is classified by a linear layer on the features, which stands in the projector's place.

    Args:
        config: section of the method.
        dim: dimension of the encoder's features.
    """

    uses_teacher = False
    joint_views = True

    def __init__(self, config: SupervisedConfig, dim: int) -> None:
        super().__init__()
        self.projector = nn.Linear(dim, config.out_dim)

    def loss(self, z: list[Tensor], z_teacher: list[Tensor] | None, ctx: StepContext) -> StepOutput:
        """Cross-entropy, averaged over images and views; logs the share of views classified right."""
        assert ctx.classes is not None  # the loader reads labels for this method
        labels = ctx.classes[:, 0].long().repeat(len(z))
        logits = full_precision(torch.cat(z))
        correct = (logits.detach().argmax(1) == labels).to(logits.dtype).mean()
        return StepOutput(F.cross_entropy(logits, labels), {"supervised/right": correct})
