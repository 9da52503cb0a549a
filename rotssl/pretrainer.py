"""The one module that DDP wraps: views -> features -> method loss + weight x task loss."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rotssl import distributed, rng
from rotssl.config import Config
from rotssl.evaluation.collapse import feature_std
from rotssl.methods import METHODS
from rotssl.methods.base import Method, StepContext
from rotssl.models.encoders import build_encoder
from rotssl.tasks import TASKS, Task


@dataclass(frozen=True)
class Output:
    """The total loss, and the scalars of a step: ``loss/*`` unweighted parts, ``<task>/accuracy``, ``feature/std``.

    ``new_views`` are the ones that tasks made, in extra mode or in place.
    """

    loss: Tensor
    logs: dict[str, Tensor]
    new_views: list[Tensor]


def encode(encoder: nn.Module, views: list[Tensor], joint: bool) -> list[Tensor]:
    """Features of each view, in one pass over all of them or in one pass a view."""
    if joint:
        return list(encoder(torch.cat(views)).split([len(view) for view in views]))
    return [encoder(view) for view in views]


@contextmanager
def frozen_bn_statistics(module: nn.Module) -> Iterator[None]:
    """Within the body, batch statistics normalise as usual but the running ones stay as they are."""
    layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


class Pretrainer(nn.Module):
    """Encoder, method, teacher and tasks as one module.

    Args:
        encoder: (B, 3, S, S) -> (B, D).
        method: loss of instance similarity.
        tasks: name -> auxiliary task.
    """

    def __init__(self, encoder: nn.Module, method: Method, tasks: dict[str, Task]) -> None:
        super().__init__()
        self.encoder, self.method = encoder, method
        self.tasks: nn.ModuleDict = nn.ModuleDict(tasks)
        self.teacher: nn.ModuleList | None = None
        if method.uses_teacher:
            self.teacher = nn.ModuleList([copy.deepcopy(encoder), copy.deepcopy(method.projector)]).requires_grad_(
                False
            )

    def forward(self, views: list[Tensor], ctx: StepContext) -> Output:
        """The losses of a batch.

        Args:
            views: the global views, one (B, 3, S, S) each.
            ctx: where in the run this is.
        """
        student, teacher, targets = views, views, {}
        new_views: list[Tensor] = []
        for name, task in self._tasks():
            if task.in_place:
                student, targets[name] = task.transform(views, ctx)
                teacher = student if task.teacher_too else views
                new_views += student
        features = encode(self.encoder, student, self.method.joint_views)
        z = [self.method.projector(h) for h in features]
        out = self.method.loss(z, self._teach(teacher), ctx)
        loss = out.loss
        logs = {"loss/ssl": loss.detach(), "feature/std": torch.stack([feature_std(v.detach()) for v in z]).mean()}
        logs.update(out.logs)
        for name, task in self._tasks():
            if not task.in_place:
                transformed, targets[name] = task.transform(views, ctx)
                new_views += transformed
                with nullcontext() if task.update_bn else frozen_bn_statistics(self.encoder):
                    judged = encode(self.encoder, transformed, joint=False)
            else:
                judged = features
            part = task.loss(judged, targets[name])
            loss = loss + task.weight(ctx.progress) * part.loss
            logs[f"loss/{name}"] = part.loss.detach()
            logs.update({f"{name}/{key}": value for key, value in part.logs.items()})
        logs["loss/total"] = loss.detach()
        return Output(loss, logs, new_views)

    def _tasks(self) -> list[tuple[str, Task]]:
        return list(self.tasks.items())  # type: ignore[arg-type]

    @torch.no_grad()
    def _teach(self, views: list[Tensor]) -> list[Tensor] | None:
        if self.teacher is None:
            return None
        encoder, projector = self.teacher
        return [projector(h) for h in encode(encoder, views, self.method.joint_views)]

    @torch.no_grad()
    def after_step(self, ctx: StepContext) -> None:
        """Move the teacher towards the student, and let the method follow."""
        if self.teacher is not None:
            momentum = self.method.teacher_momentum(ctx.progress)
            ours: list[Tensor] = [*self.encoder.parameters(), *self.method.projector.parameters()]
            torch._foreach_lerp_([*self.teacher.parameters()], ours, 1 - momentum)
        self.method.after_step(ctx)


def build_pretrainer(config: Config, device: torch.device) -> Pretrainer:
    """The Pretrainer of a configuration, on a device, with weights that depend on (seed, module path) alone."""
    seed = config.train.seed
    with rng.seeded(seed, "encoder"):
        encoder, dim = build_encoder(config.encoder.name, config.encoder.stem)
    with rng.seeded(seed, "method"):
        method = METHODS[config.method.name].load()(config.method, dim)
    tasks = {}
    for name, cls in TASKS.items():
        section = getattr(config, name)
        if section.weight > 0:
            with rng.seeded(seed, "tasks", name):
                tasks[name] = cls(section, dim)
    for module in (encoder, method, *tasks.values()):  # before the teacher is copied, which is frozen
        distributed.convert_norm(module, config.model.norm, device)
    return Pretrainer(encoder, method, tasks).to(device)
