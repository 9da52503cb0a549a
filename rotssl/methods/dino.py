"""DINO: self-distillation with no labels, Caron et al. 2021 (arXiv 2104.14294)."""

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from rotssl.base import distributed
from rotssl.base.precision import full_precision
from rotssl.base.schedules import cosine
from rotssl.base.step import StepContext, StepOutput
from rotssl.config.methods import DinoConfig
from rotssl.methods.base import Method, Pending, other_views
from rotssl.methods.losses import cross_entropy, dino_prediction, dino_target, normalize, similarity


class Head(nn.Module):
    """Three layers with GELU and without BatchNorm, then cosines with K directions (the official code's norm_last_layer)."""

    def __init__(self, dim: int, hidden: int, bottleneck: int, out: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last = nn.Linear(bottleneck, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, K), each from -1 to 1."""
        unit = normalize(full_precision(self.layers(x)))  # temperatures of 0.04 would magnify half precision
        return similarity(unit, normalize(self.last.weight))


class DINO(Method):
    """The student's distribution over K outputs matches the teacher's centred and sharpened distribution for other views.

    Args:
        config: section of the method.
        dim: dimension of the encoder's features.
    """

    uses_teacher = True
    joint_views = True
    center: Tensor

    def __init__(self, config: DinoConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.projector: Head = Head(dim, config.hidden_dim, config.bottleneck_dim, config.out_dim)
        self.register_buffer("center", torch.zeros(config.out_dim))
        self.means = Pending()

    def teacher_temperature(self, epoch: int) -> float:
        """Temperature that changes linearly from epoch 0 to the last warm-up epoch, then stays constant."""
        config = self.config
        start, end, epochs = config.teacher_temperature_start, config.teacher_temperature, config.teacher_warmup_epochs
        return end if epoch >= epochs else start + (end - start) * epoch / max(1, epochs - 1)

    def loss(self, z: list[Tensor], z_teacher: list[Tensor] | None, ctx: StepContext) -> StepOutput:
        """Eq. 3: the mean over the ordered pairs of a view and another global one."""
        assert z_teacher is not None
        self.means.add(full_precision(torch.cat(z_teacher)).mean(0), ctx)
        sharpness = self.teacher_temperature(ctx.epoch)
        targets = [dino_target(view, self.center, sharpness) for view in z_teacher]
        predictions = [dino_prediction(view, self.config.temperature) for view in z]
        terms = [cross_entropy(targets[j], predictions[i]) for i, j in other_views(len(z), len(z_teacher))]
        return StepOutput(torch.stack(terms).mean())

    def teacher_momentum(self, progress: float) -> float:
        """Momentum along a cosine, section 3.1."""
        return cosine(self.config.momentum, self.config.momentum_end, progress)

    def phase(self, ctx: StepContext) -> Hashable:
        """Whether the last layer is frozen, and the teacher's temperature."""
        return ctx.step < self.config.freeze_steps, self.teacher_temperature(ctx.epoch)

    def after_backward(self, ctx: StepContext) -> None:
        """Freeze the last layer during the first steps (``freeze_last_layer`` of the official code)."""
        if ctx.step < self.config.freeze_steps:
            self.projector.last.weight.grad = None

    def after_step(self, ctx: StepContext) -> None:
        """Move the centre towards the mean of the teacher's outputs over all workers (eq. 4)."""
        means = self.means.take()
        if means:
            mean = distributed.mean(torch.stack(means).mean(0)).to(self.center.dtype)
            self.center.lerp_(mean, 1 - self.config.center_momentum)
