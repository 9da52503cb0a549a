"""The one module that DDP wraps: views -> features -> method loss + weight x task loss."""

import copy
import functools
import operator
import warnings
from collections.abc import Container, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rotssl.base import distributed, rng
from rotssl.base.sending import Drawn, noted
from rotssl.base.step import StepContext
from rotssl.config import ResolvedConfig
from rotssl.config.methods import METHODS
from rotssl.config.tasks import TASKS
from rotssl.data.augment import Crop, Views
from rotssl.engine.balance import Balance
from rotssl.engine.encoding import encode_segments, frozen_bn_statistics, shuffled
from rotssl.engine.split import Split
from rotssl.evaluation.collapse import feature_std
from rotssl.methods.base import Method
from rotssl.methods.oracle import Oracle
from rotssl.models import norm
from rotssl.models.encoders import build_encoder
from rotssl.models.halved import Halved
from rotssl.models.passes import each_view, joined, together
from rotssl.models.tap import Tap, map_stage, stage
from rotssl.tasks.base import Targets, Task

METHOD = "ssl"  # name of the method's loss among the parts


@dataclass(frozen=True)
class Output:
    """The result of a forward pass.

    Attributes:
        loss: total loss.
        parts: its summands, with gradient: ``ssl`` and the weighted loss of each task.
        logs: scalars of the step: ``loss/*`` (unweighted parts), ``<task>/accuracy``, ``feature/std``.
        new_views: the views that each task made of a whole batch, in blocks of B rows, and the local views that it turned.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    logs: dict[str, Tensor]
    new_views: dict[str, list[Tensor]]


def _rows(views: list[Tensor], rows: Tensor | None) -> list[Tensor]:
    return views if rows is None else [view[rows] for view in views]


@dataclass
class _Inputs:
    """The inputs of a step; ``rest`` and ``angles`` are those of the task that works in place (see Targets)."""

    student: list[Tensor]
    teacher: list[Tensor]
    local: list[Tensor]
    rest: Tensor | None = None
    angles: list[Tensor] | None = None
    teacher_angles: list[Tensor] | None = None
    made: dict[str, list[Tensor]] = field(default_factory=dict)
    targets: dict[str, Targets] = field(default_factory=dict)


class Pretrainer(nn.Module):
    """Encoder, method, teacher and tasks as one module.

    Args:
        encoder: (B, 3, S, S) -> (B, D).
        method: the pretraining method.
        tasks: name -> auxiliary task.
        joint_views: whether the method's views share passes; None: the method's default.
        layer: stage of the encoder that the task with ``inside`` gets, and its number of channels.
        split: number of tiles along a side of the student's global views; 1: they stay whole.
        shuffle: whether the teacher sees each batch in another order, so that BatchNorm over parts of it does not tell which
            images the student sees together (MoCo, section 3.3).

    Attributes:
        off: names of the tasks that no longer take part.
        method_weight: weight of the method's loss.
        share: by which the teacher moves towards the student, on the device; None: the method says it.
        halved: casts the teacher's weights for autocast; None: autocast does.
    """

    method_weight: float = 1.0
    share: Tensor | None = None
    halved: Halved | None = None

    def __init__(
        self,
        encoder: nn.Module,
        method: Method,
        tasks: dict[str, Task],
        joint_views: bool | None = None,
        layer: tuple[nn.Module, int] | None = None,
        split: int = 1,
        shuffle: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.method, self.shuffle = encoder, method, shuffle
        self.joint_views = method.joint_views if joint_views is None else joint_views
        self.tasks: nn.ModuleDict = nn.ModuleDict(tasks)
        self.balance = Balance(tasks)
        self.split = Split(split)
        self.off: Container[str] = ()
        self.tells = sum(task.tells for task in tasks.values())
        self.teacher: nn.ModuleList | None = None
        if method.uses_teacher:
            copies = [copy.deepcopy(encoder), copy.deepcopy(method.projector)]
            self.teacher = nn.ModuleList(copies).requires_grad_(False)
            for module in self.teacher.modules():  # no noise in its targets, as in DINO's official code
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    module.p = 0.0
                elif isinstance(getattr(module, "drop_prob", None), float):  # timm's DropPath
                    module.drop_prob = 0.0  # type: ignore[assignment]
        # After the copy: the teacher's stages are not watched.
        whole = any(task.reads == "map" for task in tasks.values())
        self.tap = None if layer is None else Tap(encoder, *layer, self._fork_stage, whole)

    def forward(self, views: Views, ctx: StepContext) -> Output:
        """The losses of a batch.

        Args:
            views: views of the batch.
            ctx: context of the step.
        """
        on = {name: task for name, task in self.named_tasks() if self._takes_part(name, task, ctx)}
        inputs = self._inputs(views, ctx, on)
        count, rest = len(inputs.student), inputs.rest
        joint = [name for name, task in on.items() if task.joint]  # their views share the method's pass
        tiles = [self.split.cut(view) for view in inputs.student]
        segments = [(METHOD, tiles), *((name, inputs.made[name]) for name in joint)]
        segments.append((METHOD, _rows(inputs.local, rest)))
        seen = self._encode(segments, self.joint_views or bool(joint), on)
        # In place, tasks see all rows; the method may see only some, and does not normalise over others in its projector, unless
        # the task reads that.
        whole = {place: features[METHOD][:count] for place, features in seen.items()}
        late = any(task.in_place and task.reads == "projector" for task in on.values())
        own = _rows(whole["encoder"], None if late else rest) + seen["encoder"][METHOD][count:]
        own = self.split.combine(self._forked("encoder", own), count)
        z = each_view(self.method.projector, self._told(own, inputs.angles), self.joint_views)
        whole["projector"] = z[:count]
        z = self._forked("projector", _rows(z[:count], rest) + z[count:] if late else z)
        out = self.split.loss(self.method, z, self._teach(inputs, ctx), ctx.of_rows(rest), count)
        losses = {METHOD: out.loss if self.method_weight == 1 else self.method_weight * out.loss}
        logs = {"loss/ssl": out.loss.detach()}
        if self.method_weight > 0:  # else nothing trains the projector
            logs["feature/std"] = feature_std(joined(z).detach().unflatten(0, (len(z), -1)))
        logs.update(out.logs)
        for name, task in on.items():
            found = {place: features[name] for place, features in seen.items()} if name in joint else None
            judged = whole[task.reads] if task.in_place else self.judged(task, inputs.made[name], found)
            if not task.inside:  # there the gradients are told apart at the stage itself
                judged = self.balance.forked(name, judged)
            if task.in_place:
                judged = [self.split.mean(view) for view in judged]
            part = task.loss(judged, inputs.targets[name])
            weight = self.balance.weight(name, ctx.progress, part.logs.get("accuracy"))
            losses[name] = part.loss if isinstance(weight, float) and weight == 1 else weight * part.loss
            logs[f"loss/{name}"] = part.loss.detach()
            logs.update({f"{name}/{key}": value for key, value in part.logs.items()})
        loss = functools.reduce(operator.add, [*losses.values(), *self._idle(on)])
        logs["loss/total"] = loss.detach()
        whole_batch = {name for name, task in on.items() if task.in_place or inputs.targets[name].rows is None}
        shown = {name: made for name, made in inputs.made.items() if name in whole_batch}
        turned = inputs.local is not views.local
        shown |= {f"{name}, local": inputs.local for name, task in on.items() if task.in_place and turned}
        return Output(loss, losses, logs, shown)

    def _takes_part(self, name: str, task: Task, ctx: StepContext) -> bool:
        return name not in self.off and task.config.active(ctx.step, ctx.progress)

    def _inputs(self, views: Views, ctx: StepContext, on: Mapping[str, Task]) -> _Inputs:
        inputs = _Inputs(views.full, views.full, views.local)
        for name, task in on.items():
            made, targets = task.transform(views.own.get(name, views.full), ctx)
            inputs.made[name], inputs.targets[name] = made, targets
            if task.in_place:
                inputs.student, inputs.local = made, task.transform_local(views.local, ctx)
                inputs.rest, inputs.angles = targets.rest, targets.angles
                if task.teacher_too:
                    inputs.teacher, inputs.teacher_angles = made, targets.angles
        both = self.teacher is not None and inputs.teacher is inputs.student and inputs.rest is None
        if self.method.asymmetric:
            inputs.student, inputs.teacher = inputs.student[:1], inputs.teacher[1:2]
            inputs.teacher_angles = inputs.teacher_angles and inputs.teacher_angles[1:2]
        elif both and self.split.tiles == 1:
            inputs.student = inputs.teacher = together(self.encoder, inputs.student, self.joint_views)
        return inputs

    def outside(self, views: Views, ctx: StepContext) -> tuple[object, list[Drawn]]:
        """What a step takes from the host: what else than numbers it depends on, and what its tasks send to the device.

        Args:
            views: of the sizes of the step's, on the meta device.
            ctx: context of the step.
        """
        on = {name: task for name, task in self.named_tasks() if self._takes_part(name, task, ctx)}
        with noted() as drawn:
            inputs = self._inputs(views, ctx, on)
        tasks = [(name, task.weight(ctx.progress), inputs.targets[name].count) for name, task in on.items()]
        return (self.method.phase(ctx), tasks), drawn

    def _encode(
        self, segments: Sequence[tuple[str, list[Tensor]]], joint: bool, on: Mapping[str, Task]
    ) -> dict[str, dict[str, list[Tensor]]]:
        """What a task may read before the projector, ``encoder`` and one from inside it: the features of each owner's views."""
        inside = [task.reads for task in on.values() if task.inside]
        tap = self.tap if inside else None
        found = encode_segments(self.encoder, segments, joint, tap)
        if tap is None:
            return {"encoder": found}
        cut = {owner: [tap.split(view) for view in views] for owner, views in found.items()}
        return {
            place: {owner: [pair[i] for pair in pairs] for owner, pairs in cut.items()}
            for i, place in enumerate(("encoder", *inside))
        }

    def _forked(self, place: str, views: list[Tensor]) -> list[Tensor]:
        """The method's branch at a place where a task's head branches off; elsewhere, the views themselves."""
        meets = any(task.reads == place for _, task in self.named_tasks())
        return self.balance.forked(f"{METHOD} at {place}", views) if meets else views

    def _fork_stage(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ((reader, task),) = (pair for pair in self.named_tasks() if pair[1].inside)
        return self.balance.fork(f"{METHOD} at {task.reads}", x), self.balance.fork(reader, x)

    def _told(self, features: list[Tensor], angles: list[Tensor] | None) -> list[Tensor]:
        """The projector's inputs: features, and the angle of each view if a task tells it; local views have the last one's."""
        if not self.tells:
            return features
        if angles is None:
            upright = torch.arange(self.tells, device=features[0].device) == 0
            angles = [upright.expand(len(view), -1) for view in features]
        told = {id(angle): angle.to(features[0].dtype) for angle in angles}  # that all views share is cast once
        each = [told[id(angles[min(v, len(angles) - 1)])] for v in range(len(features))]
        return [torch.cat([view, angle], 1) for view, angle in zip(features, each, strict=True)]

    def judged(self, task: Task, made: list[Tensor], found: Mapping[str, list[Tensor]] | None) -> list[Tensor]:
        """The head inputs of a task for its own views; ``found`` if these already shared the method's pass."""
        with nullcontext() if task.update_bn else frozen_bn_statistics(self):
            seen = found
            if seen is None:
                alone = self._encode([(METHOD, made)], False, {METHOD: task})
                seen = {place: features[METHOD] for place, features in alone.items()}
            if task.reads != "projector":
                return seen[task.reads]
            return each_view(self.method.projector, self._told(seen["encoder"], None), joint=False)

    def _idle(self, on: Mapping[str, Task]) -> list[Tensor]:
        """Zero, with zero gradients for the heads of tasks that sit out the step, if any: DDP expects one for every parameter."""
        idle = [p.sum() for name, task in self.named_tasks() if name not in on for p in task.parameters()]
        return [torch.stack(idle).sum() * 0.0] if idle else []

    def chosen(self, network: str) -> nn.Module:
        """The encoder of the ``student`` or the ``teacher``."""
        return self.encoder if self.teacher is None or network == "student" else self.teacher[0]

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
    def _teach(self, inputs: _Inputs, ctx: StepContext) -> list[Tensor] | None:
        if self.teacher is None:
            return None
        encoder, projector = self.teacher
        views, angles, back = _rows(inputs.teacher, inputs.rest), inputs.teacher_angles, None
        if self.shuffle:
            there, back = shuffled(len(views[0]), views[0].device, ctx)
            views = [distributed.gather(view)[there] for view in views]
            angles = angles and [distributed.gather(angle)[there] for angle in angles]
        with nullcontext() if self.halved is None else self.halved.cast():
            z = each_view(projector, self._told(each_view(encoder, views, self.joint_views), angles), self.joint_views)
        return z if back is None else [distributed.gather(view)[back] for view in z]

    @torch.no_grad()
    def after_step(self, ctx: StepContext, skipped: Tensor | None = None) -> dict[str, Tensor]:
        """Move the teacher towards the student, then call the method's ``after_step``; returns scalars of the tasks to log.

        Args:
            ctx: context of the step.
            skipped: whether the step was skipped, a bool on the device, or None if steps are never skipped; if true, the teacher
                does not change.
        """
        if self.teacher is not None:
            share = 1 - self.method.teacher_momentum(ctx.progress) if self.share is None else self.share
            ours: list[Tensor] = [*self.encoder.parameters(), *self.method.projector.parameters()]
            theirs: list[Tensor] = [*self.teacher.parameters()]
            if skipped is None and not isinstance(share, Tensor):
                torch._foreach_lerp_(theirs, ours, share)
            else:
                way = list(torch._foreach_sub(ours, theirs))
                torch._foreach_mul_(way, share if skipped is None else torch.where(skipped, 0.0, share))
                torch._foreach_add_(theirs, way)
        self.method.after_step(ctx)
        return self.balance.update(skipped)


def build_pretrainer(config: ResolvedConfig, device: torch.device) -> Pretrainer:
    """The Pretrainer of a configuration, on a device, with initial weights that depend only on (seed, module path)."""
    seed = config.train.seed
    with rng.seeded(seed, "encoder"):
        encoder, dim = build_encoder(image_size=config.data.image_size, **vars(config.encoder))
    told = 0
    tasks, layer = dict[str, Task](), None
    for name, section in config.active().items():
        task = TASKS[name].load()
        place, width = task.place(section), dim
        if place == "projector":
            width = config.method.out_dim
        elif place != "encoder":
            asked, side = config.encoder.name, config.data.image_size
            layer = map_stage(encoder, asked, side) if place == "map" else stage(encoder, asked, place)
            width = layer[1]
        with rng.seeded(seed, "tasks", name):
            tasks[name] = task(section, width)
        told += tasks[name].tells
    with rng.seeded(seed, "method"):
        method = METHODS[config.method.name].load()(config.method, dim + told)
    if config.oracle.reads_labels:
        method.consult(Oracle(config.oracle.false_negatives, config.oracle.share_of == "pairs"))
    for module in (encoder, method, *tasks.values()):  # before the frozen teacher is copied
        norm.convert_norm(module, config.model.norm, device, config.model.norm_splits)
    joint = None if config.model.joint_views == "auto" else config.model.joint_views
    options = joint, layer, config.views.split, config.model.norm == "split"
    model = Pretrainer(encoder, method, tasks, *options)
    model.method_weight = config.tasks.method_weight
    return model.to(device)
