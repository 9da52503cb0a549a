"""The device's part of a step as one CUDA graph: recorded once, then launched as a whole."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rotssl.base.sending import Drawn, sent_before
from rotssl.base.step import StepContext
from rotssl.config.rules import reads_labels
from rotssl.data.augment import Views, masked_cut, masked_view
from rotssl.data.draws import Draws
from rotssl.engine.runtime import RunFailed

if TYPE_CHECKING:
    from rotssl.engine.trainer import Trainer

WARM = 3  # steps of a kind before it is recorded: they make buffers, compile and choose kernels
Logs = dict[str, Tensor]
Record = Callable[[Callable[[], Logs]], tuple[Logs, Callable[[], object]]]


def cuda_graph(work: Callable[[], Logs]) -> tuple[Logs, Callable[[], object]]:
    """Record work and carry it out; returns its tensors, which each repetition writes anew, and what repeats it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the loader's thread uses the device meanwhile
        logs = work()
    graph.replay()
    return logs, graph.replay


@dataclass
class _Inputs:
    """What a recorded step reads, at fixed places.

    Attributes:
        images: (B, C, H, W) uint8, or cut views.
        numbers: of the draws for the views.
        whole: number of the step, then what tasks draw, int64 in one tensor.
        arrays: the parts of ``whole`` that tasks draw.
        rates: the teacher's share of the student, then the learning rate of each group, float32 in one tensor.
    """

    images: Tensor
    numbers: Tensor
    whole: Tensor
    arrays: list[Tensor]
    rates: Tensor


class Captured:
    """Takes the place of ``Trainer.update``: the same steps, of which those that are alike are repetitions of one recording.

    A recording does again what it did, with what lies at the places that it read: images, draws, learning rates, the teacher's
    momentum and the step's number are copied there. All else that the host decides makes steps different: sides of views, tasks
    that take part, their weights and rows, and what a method says by ``phase``. A step unlike the one before is taken without a
    recording, as are the first ones of each kind.

    Args:
        trainer: of one process; its loader must not have started, since views are drawn by masks from now on.
        record: see ``cuda_graph``.

    Attributes:
        replayed: number of steps that were repetitions.

    Raises:
        RunFailed: the steps of this run cannot be recorded; the text says why.
    """

    def __init__(self, trainer: "Trainer", record: Record = cuda_graph) -> None:
        if reasons := [why for why, holds in _obstacles(trainer).items() if holds]:
            raise RunFailed(f"steps cannot be one CUDA graph with {' and '.join(reasons)}")
        self.trainer, self.model, self.record, self.update = trainer, trainer.model, record, trainer.update
        if trainer.augment.masked is None:
            trainer.augment.masked = masked_view, masked_cut
        self.replayed = 0
        self._kind, self._alike = "", 0
        self._again: Callable[[], object] | None = None
        self._logs: Logs = {}
        self._inputs: _Inputs | None = None

    def __call__(self, images: Tensor, ctx: StepContext) -> Logs:
        """Take a step at the rates that the optimizer has; see ``Trainer.update``. Its logs hold until the next one."""
        draws = next((drawn for drawn in ctx.draws if drawn.are_for(ctx)), None)
        if draws is None:
            draws = self.trainer.augment.draw(ctx, images).to(images.device)
        ctx = replace(ctx, draws=(draws,))
        outside, arrays = self.model.outside(self._sketch(len(ctx.positions), ctx.progress), ctx)
        decays = [group["weight_decay"] for group in self.trainer.optimizer.param_groups]
        kind = repr((images.shape, draws.plans, [array.shape for array in arrays], outside, decays))
        if kind != self._kind:
            self._kind, self._alike, self._again, self._inputs = kind, 0, None, None
        self._alike += 1
        if self._alike <= WARM:
            return self.update(images, ctx)
        self._fill(images, draws.numbers, arrays, ctx)
        if self._again is None:
            self._logs, self._again = self.record(lambda: self._work(ctx))
        else:
            self._again()
            self.replayed += 1
        return dict(self._logs)

    def _sketch(self, count: int, progress: float) -> Views:
        """Views of a step as they will be, without content."""
        augment = self.trainer.augment
        full, local, own = (
            [torch.empty(count, 3, side, side, device="meta") for side in sides]
            for sides in (
                [augment.crop_at(crop, progress).size for crop in crops]
                for crops in (augment.full, augment.local, augment.own.values())
            )
        )
        return Views(full, local, {name: [view] for name, view in zip(augment.own, own, strict=True)})

    def _fill(self, images: Tensor, numbers: Tensor, arrays: list[Drawn], ctx: StepContext) -> None:
        """Put a step's inputs in their places."""
        method, groups = self.model.method, self.trainer.optimizer.param_groups
        share = 1 - method.teacher_momentum(ctx.progress) if self.model.teacher is not None else 0.0
        whole = torch.from_numpy(np.concatenate([[ctx.step], *(array.ravel() for array in arrays)]).astype(np.int64))
        rates = torch.tensor([share, *(group["lr"] for group in groups)], dtype=torch.float32)
        if self._inputs is None:
            there = whole.to(images.device)
            each = there[1:].split([array.size for array in arrays])
            parts = [part.view(array.shape) for part, array in zip(each, arrays, strict=True)]
            self._inputs = _Inputs(images.clone(), numbers.clone(), there, parts, rates.to(images.device))
            return
        own = self._inputs
        own.images.copy_(images)
        own.numbers.copy_(numbers)
        for place, value in ((own.whole, whole), (own.rates, rates)):
            place.copy_(value.pin_memory() if place.is_cuda else value, non_blocking=True)

    def _work(self, ctx: StepContext) -> Logs:
        """The step, from its inputs' places."""
        own, groups, model = self._inputs, self.trainer.optimizer.param_groups, self.model
        assert own is not None
        drawn: Draws = replace(ctx.draws[0], numbers=own.numbers)
        before: list[dict[str, Any]] = [
            {key: group[key] for key in ("lr", "capturable") if key in group} for group in groups
        ]
        model.share, self.trainer.breakdown.number = own.rates[0], own.whole[0]
        try:
            for group, rate in zip(groups, own.rates[1:], strict=True):
                group.update({key: rate if key == "lr" else True for key in ("lr", "capturable") if key in group})
            with sent_before(own.arrays):
                return self.update(own.images, replace(ctx, draws=(drawn,)))
        finally:
            model.share = self.trainer.breakdown.number = None
            for group, kept in zip(groups, before, strict=True):
                group.update(kept)


def _obstacles(trainer: "Trainer") -> dict[str, bool]:
    """What a step does that a recording would not do again, in words, and whether this run's steps do."""
    config = trainer.config
    return {
        "several workers": trainer.parallel is not trainer.model,
        "train.accumulate": config.train.accumulate > 1,
        "train.precision fp16": trainer.scaler.is_enabled(),
        "an encoder of timm, which may drop at random": config.encoder.name.startswith("timm/"),
        "tasks.log_gradients_every": config.tasks.log_gradients_every > 0,
        "labels": reads_labels(config),
        "rotation.degrees that are no quarter turns": any(angle % 90 for angle in config.rotation.degrees),
        "model.norm split": trainer.model.shuffle,
    }
