"""The one module that DDP wraps: views -> features -> method loss + weight x task loss."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby, islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rotssl.base import distributed, rng
from rotssl.base.step import StepContext
from rotssl.config import ResolvedConfig
from rotssl.config.methods import METHODS
from rotssl.config.tasks import TASKS
from rotssl.data.augment import Crop, Views
from rotssl.evaluation.collapse import feature_std
from rotssl.methods.base import Method
from rotssl.models import norm
from rotssl.models.encoders import build_encoder
from rotssl.tasks.base import Targets, Task

METHOD = "ssl"  # name of the method's loss among the parts


@dataclass(frozen=True)
class Output:
    """The result of a forward pass.

    Attributes:
        loss: total loss.
        parts: its summands, with gradient: ``ssl`` and the weighted loss of each task.
        logs: scalars of the step: ``loss/*`` (unweighted parts), ``<task>/accuracy``, ``feature/std``.
        new_views: the views that each task made of a whole batch, in blocks of B rows.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    logs: dict[str, Tensor]
    new_views: dict[str, list[Tensor]]


def encode(encoder: nn.Module, views: list[Tensor], joint: bool) -> list[Tensor]:
    """Features of each view, encoding consecutive views of one size in one pass if possible.

    Args:
        encoder: any network.
        views: each (n, ...).
        joint: whether views of one size form one batch for BatchNorm. Otherwise each view is normalised separately; views still
            share a pass if the network supports per-view statistics.
    """
    features: list[Tensor] = []
    apart = not joint and norm.keeps_views_apart(encoder)
    for _, group in groupby(views, key=lambda view: view.shape[1:] if joint else view.shape):
        alike = list(group)
        if len(alike) == 1 or not (joint or apart):
            features += [encoder(view) for view in alike]
            continue
        with norm.per_view_statistics(len(alike)) if apart else nullcontext():
            features += encoder(torch.cat(alike)).split([len(view) for view in alike])
    return features


def encode_segments(
    encoder: nn.Module, segments: Sequence[tuple[str, list[Tensor]]], joint: bool
) -> dict[str, list[Tensor]]:
    """Features of the views of several owners, encoded together; the features of an owner's segments are concatenated.

    Args:
        encoder: any network.
        segments: owner and views, in the order in which they are encoded.
        joint: as for ``encode``.
    """
    features = iter(encode(encoder, [view for _, views in segments for view in views], joint))
    found: dict[str, list[Tensor]] = {}
    for owner, views in segments:
        found.setdefault(owner, []).extend(islice(features, len(views)))
    return found


def _spread(z: list[Tensor]) -> Tensor:
    return torch.stack([feature_std(view.detach()) for view in z]).mean()


@contextmanager
def frozen_bn_statistics(module: nn.Module) -> Iterator[None]:
    """Within the body, BatchNorm normalises by batch statistics as usual but does not update the running ones."""
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
        method: the pretraining method.
        tasks: name -> auxiliary task.
        joint_views: whether the method's views share passes; None: the method's default.
    """

    def __init__(
        self, encoder: nn.Module, method: Method, tasks: dict[str, Task], joint_views: bool | None = None
    ) -> None:
        super().__init__()
        self.encoder, self.method = encoder, method
        self.joint_views = method.joint_views if joint_views is None else joint_views
        self.tasks: nn.ModuleDict = nn.ModuleDict(tasks)
        self.teacher: nn.ModuleList | None = None
        if method.uses_teacher:
            parts = [copy.deepcopy(encoder), copy.deepcopy(method.projector)]
            self.teacher = nn.ModuleList(parts).requires_grad_(False)
            for module in self.teacher.modules():  # no noise in its targets, as in DINO's official code
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    module.p = 0.0
                elif isinstance(getattr(module, "drop_prob", None), float):  # timm's DropPath
                    module.drop_prob = 0.0  # type: ignore[assignment]

    def forward(self, views: Views, ctx: StepContext) -> Output:
        """The losses of a batch.

        Args:
            views: views of the batch.
            ctx: context of the step.
        """
        made: dict[str, list[Tensor]] = {}
        targets: dict[str, Targets] = {}
        student = teacher = views.full
        for name, task in self.named_tasks():
            made[name], targets[name] = task.transform(views.own.get(name, views.full), ctx)
            if task.in_place:
                student = made[name]
                teacher = student if task.teacher_too else views.full
        if self.method.asymmetric:
            student, teacher = student[:1], teacher[1:2]
        joint = [name for name, task in self.named_tasks() if task.joint]  # their views share the method's pass
        segments = [(METHOD, student), *((name, made[name]) for name in joint), (METHOD, views.local)]
        features = encode_segments(self.encoder, segments, self.joint_views or bool(joint))
        z = encode(self.method.projector, features[METHOD], self.joint_views)
        out = self.method.loss(z, self._teach(teacher), ctx)
        parts = {METHOD: out.loss}
        logs = {"loss/ssl": out.loss.detach(), "feature/std": _spread(z)}
        logs.update(out.logs)
        for name, task in self.named_tasks():
            if task.in_place:
                judged = (z if task.on_projector else features[METHOD])[: len(student)]
            else:
                judged = self._judged(task, made[name], features.get(name))
            part = task.loss(judged, targets[name])
            parts[name] = task.weight(ctx.progress) * part.loss
            logs[f"loss/{name}"] = part.loss.detach()
            logs.update({f"{name}/{key}": value for key, value in part.logs.items()})
        loss = torch.stack(list(parts.values())).sum()
        logs["loss/total"] = loss.detach()
        whole = {name: made[name] for name, task in self.named_tasks() if task.in_place or targets[name].rows is None}
        return Output(loss, parts, logs, whole)

    def _judged(self, task: Task, made: list[Tensor], features: list[Tensor] | None) -> list[Tensor]:
        """The head inputs of a task for its own views; ``features`` if these already shared the method's pass."""
        with nullcontext() if task.update_bn else frozen_bn_statistics(self):
            seen = encode(self.encoder, made, joint=False) if features is None else features
            return encode(self.method.projector, seen, joint=False) if task.on_projector else seen

    def compile_networks(self) -> None:
        """Compile the encoders and projectors of student and teacher with torch.compile; keys of the state do not change."""
        warnings.filterwarnings(
            "ignore", message="The .grad attribute of a Tensor that is not a leaf"
        )  # torch's own look
        for network in (self.encoder, self.method.projector, *(self.teacher or ())):
            network.compile()

    def named_tasks(self) -> list[tuple[str, Task]]:
        """The tasks by name, in the order of their registry."""
        return list(self.tasks.items())  # type: ignore[arg-type]

    def own_crops(self) -> dict[str, Crop]:
        """The additional crops that tasks request, by task."""
        return {name: task.crop for name, task in self.named_tasks() if task.crop is not None}

    @torch.no_grad()
    def _teach(self, views: list[Tensor]) -> list[Tensor] | None:
        if self.teacher is None:
            return None
        encoder, projector = self.teacher
        return encode(projector, encode(encoder, views, self.joint_views), self.joint_views)

    @torch.no_grad()
    def after_step(self, ctx: StepContext, skipped: Tensor | None = None) -> None:
        """Move the teacher towards the student, then call the method's ``after_step``.

        Args:
            ctx: context of the step.
            skipped: whether the step was skipped, a bool on the device, or None if steps are never skipped; if true, the teacher
                does not change.
        """
        if self.teacher is not None:
            share = 1 - self.method.teacher_momentum(ctx.progress)
            ours: list[Tensor] = [*self.encoder.parameters(), *self.method.projector.parameters()]
            theirs: list[Tensor] = [*self.teacher.parameters()]
            if skipped is None:
                torch._foreach_lerp_(theirs, ours, share)
            else:
                way = list(torch._foreach_sub(ours, theirs))
                torch._foreach_mul_(way, torch.where(skipped, 0.0, share))
                torch._foreach_add_(theirs, way)
        self.method.after_step(ctx)


def encoder_gradients(parts: dict[str, Tensor], encoder: nn.Module) -> dict[str, Tensor]:
    """The flat gradient of each part of the loss at the encoder's weights, on this worker; the parts' graph is kept.

    Args:
        parts: losses with gradient, as ``Output.parts``.
        encoder: encoder whose trainable parameters all parts reach.
    """
    weights = [p for p in encoder.parameters() if p.requires_grad]

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, weights, retain_graph=True)])

    return {name: gradient(loss) for name, loss in parts.items()}


def compare_gradients(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Norm ratio and cosine of each task's gradient and the method's, both averaged over all workers.

    Args:
        gradients: flat gradients on this worker of each task's weighted loss, and of the method's loss as ``ssl``.

    Returns:
        For each task ``<task>/grad_ratio``, the norm of its gradient over that of the method's, and ``<task>/grad_cosine``, the
        cosine of the angle between the two; empty if a value is not finite (for example after an overflow in half precision).
    """
    whole = {name: distributed.mean(gradient) for name, gradient in gradients.items()}
    method, logs = whole.pop("ssl"), dict[str, Tensor]()
    for name, task in whole.items():
        logs[f"{name}/grad_ratio"] = task.norm() / method.norm()
        logs[f"{name}/grad_cosine"] = F.cosine_similarity(task, method, dim=0)
    return logs if all(bool(torch.isfinite(value)) for value in logs.values()) else {}


def build_pretrainer(config: ResolvedConfig, device: torch.device) -> Pretrainer:
    """The Pretrainer of a configuration, on a device, with initial weights that depend only on (seed, module path)."""
    seed = config.train.seed
    with rng.seeded(seed, "encoder"):
        encoder, dim = build_encoder(image_size=config.data.image_size, **vars(config.encoder))
    with rng.seeded(seed, "method"):
        method = METHODS[config.method.name].load()(config.method, dim)
    tasks = {}
    for name, section in config.active().items():
        task = TASKS[name].load()
        with rng.seeded(seed, "tasks", name):
            tasks[name] = task(section, config.method.out_dim if task.sees_projector(section) else dim)
    for module in (encoder, method, *tasks.values()):  # before the frozen teacher is copied
        norm.convert_norm(module, config.model.norm, device)
    joint = None if config.model.joint_views == "auto" else config.model.joint_views
    return Pretrainer(encoder, method, tasks, joint).to(device)
