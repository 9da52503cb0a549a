"""FLOPs of training steps, counted by torch on a copy of the model on the meta device, and how they change over a run.

A run is cut into phases where the cost of a step jumps. Within a phase it is linear in the share of the images that enter the
tasks' losses, and is averaged over the steps in which tasks do and do not work.
"""

import functools
import math
from bisect import bisect
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from rotssl import config as cfg
from rotssl.base import distributed
from rotssl.base.step import StepContext
from rotssl.config import ResolvedConfig
from rotssl.config.methods import METHODS
from rotssl.config.resolved import ResolvedData, ResolvedOptim, ResolvedStorage, ResolvedTracking
from rotssl.config.sections import TrainConfig
from rotssl.config.tasks import TASKS
from rotssl.data.augment import Augment, Crop, Views
from rotssl.engine.pretrainer import build_pretrainer

COUNTED = ("views", "encoder", "model", "method", *TASKS)  # the sections that affect FLOPs
_NOT_COUNTED: dict[str, Any] = {
    "optim": ResolvedOptim(name="sgd", lr=1.0, warmup_epochs=0.0),
    "tracking": ResolvedTracking(run_name=""),
    "storage": ResolvedStorage(path=""),
}


def count_step(config: ResolvedConfig, progress: float = 0.0, step: int = 0) -> float:
    """FLOPs of one step over all workers: student, teacher and tasks, forward and backward.

    Torch counts convolutions and matrix products, two FLOPs per multiply-add; augmentation, norms and optimizer are not
    included.

    Args:
        config: resolved.
        progress: progress of the run, from 0 to 1.
        step: number of the step; only the tasks that work in it are counted.
    """
    counted: dict[str, Any] = {name: getattr(config, name) for name in COUNTED}
    data, train = ResolvedData(image_size=config.data.image_size), TrainConfig(batch_size=config.train.batch_size)
    return _count(ResolvedConfig(**counted, data=data, train=train, **_NOT_COUNTED), progress, step)


@functools.lru_cache(maxsize=64)  # trials of a sweep and starts of a run share steps
def _count(config: ResolvedConfig, progress: float, step: int) -> float:
    batch, side = config.train.batch_size, config.data.image_size
    meta = torch.device("meta")
    with distributed.alone(), meta:
        model = build_pretrainer(cfg.replace(config, {"model.norm": "batch"}), meta)
    count = config.views.global_count
    classes = torch.empty(batch, 2, device=meta) if METHODS[config.method.name].labels else None
    ctx = StepContext(config.train.seed, 0, step, progress, np.arange(batch), 0, batch, count, classes=classes)
    augment = Augment(config.views, side, (0.0,), (1.0,), config.train.seed, model.own_crops())

    def empty(crop: Crop) -> torch.Tensor:
        now = augment.crop_at(crop, progress).size
        return torch.empty(batch, 3, now, now, device=meta)

    views = Views(
        [empty(crop) for crop in augment.full],
        [empty(crop) for crop in augment.local],
        {name: [empty(crop)] for name, crop in augment.own.items()},
    )
    with distributed.alone(), FlopCounterMode(display=False) as counter:
        model(views, ctx).loss.backward()
    return float(counter.get_total_flops())


@dataclass(frozen=True)
class Phase:
    """The part of a run with ``start`` <= progress < ``end``, in which the cost of a step does not jump."""

    start: float
    end: float

    @property
    def last(self) -> float:
        """The last progress before its end."""
        return math.nextafter(self.end, 0.0)


def phases(config: ResolvedConfig) -> list[Phase]:
    """The phases of a run, which begin where its tasks end and where the views get their full side."""
    edges = {task.until for task in config.active().values()}
    if config.views.size_start not in (None, config.data.image_size):
        edges.add(config.views.size_until)
    return [Phase(*ends) for ends in pairwise([0.0, *sorted(edge for edge in edges if 0 < edge < 1), 1.0])]


def _share(config: ResolvedConfig, progress: float) -> float:
    """Sum of the shares of the images in the tasks' losses."""
    return sum(task.share_at(progress) for task in config.active().values())


def period(config: ResolvedConfig) -> int:
    """Number of steps after which the tasks' work repeats."""
    return math.lcm(*(task.every for task in config.active().values()))


def _kinds(config: ResolvedConfig) -> dict[int, float]:
    """The first step of each kind and the share of steps that are of this kind; kinds differ in the tasks that work."""
    found: dict[tuple[bool, ...], list[int]] = {}
    for step in range(period(config)):
        found.setdefault(tuple(step % task.every == 0 for task in config.active().values()), []).append(step)
    return {steps[0]: len(steps) / period(config) for steps in found.values()}


@dataclass(frozen=True)
class Sample:
    """A step that stands for a share of the run's steps: their cost is its cost on the mean.

    Attributes:
        share: of the steps of the run; the shares of all samples add up to 1.
        progress: progress of the run, from 0 to 1.
        step: its number within the tasks' period.
    """

    share: float
    progress: float
    step: int


def samples(config: ResolvedConfig) -> list[Sample]:
    """One step of each kind in each phase, at the progress where the tasks' share has its mean over the phase."""
    found, count = [], 1001  # odd, so that the middle is among the points
    for phase in phases(config):
        length = phase.end - phase.start
        points = [phase.start + (i + 0.5) / count * length for i in range(count)]
        shares = [_share(config, point) for point in points]
        mean, middle = math.fsum(shares) / count, points[count // 2]
        off = [(abs(share - mean), abs(point - middle)) for share, point in zip(shares, points, strict=True)]
        at = points[off.index(min(off))]
        found += [Sample(length * share, at, step) for step, share in _kinds(config).items()]
    return found


def count_mean(config: ResolvedConfig) -> float:
    """Mean FLOPs of the steps of a run."""
    return sum(part.share * count_step(config, part.progress, part.step) for part in samples(config))


class CostCurve:
    """FLOPs of the steps of a run.

    Args:
        config: resolved.
    """

    def __init__(self, config: ResolvedConfig) -> None:
        self.config, self.phases = config, phases(config)
        self._ends = [self._at_ends(phase) for phase in self.phases]

    def _at_ends(self, phase: Phase) -> tuple[tuple[float, float], tuple[float, float]]:
        """The tasks' share and the FLOPs of a step at both ends of a phase; equal if the share is."""
        first, last = (_share(self.config, progress) for progress in (phase.start, phase.last))
        flops = self._mean(phase.start)
        return (first, flops), (last, flops if math.isclose(first, last) else self._mean(phase.last))

    def _mean(self, progress: float) -> float:
        return sum(share * count_step(self.config, progress, step) for step, share in _kinds(self.config).items())

    def flops_at(self, progress: float) -> float:
        """FLOPs of a step at a progress of the run from 0 to 1, averaged over the tasks' period."""
        which = bisect([phase.start for phase in self.phases], progress) - 1
        (low, first), (high, last) = self._ends[which]
        if math.isclose(low, high):
            return first
        share = _share(self.config, min(progress, self.phases[which].last))
        return first + (last - first) * (share - low) / (high - low)

    def epochs(self, steps: int) -> list[float]:
        """FLOPs of each epoch of the run.

        Args:
            steps: number of steps of an epoch.
        """
        count = self.config.train.epochs
        return [self._between(epoch * steps, (epoch + 1) * steps, count * steps) for epoch in range(count)]

    def _between(self, first: int, last: int, total: int) -> float:
        """FLOPs of the steps from ``first`` up to but not including ``last`` of ``total``."""
        flops = 0.0
        for phase in self.phases:
            begin, end = (min(max(_steps_before(edge, total), first), last) for edge in (phase.start, phase.end))
            # A step belongs to the phase in which it begins, even if the middle of all does not.
            flops += (end - begin) * self.flops_at(min((begin + end) / 2 / total, phase.last)) if begin < end else 0.0
        return flops


def epoch_flops(config: ResolvedConfig, epoch: int, steps: int, off: Collection[str] = (), at: int = 0) -> float:
    """FLOPs of an epoch of a run, some of whose tasks may have been switched off.

    Args:
        config: resolved.
        epoch: 0-based.
        steps: number of steps of an epoch.
        off: names of the tasks that were switched off. What a projector is told about angles counts as absent, too.
        at: number of steps of the run that were taken with them.
    """
    first, last = epoch * steps, (epoch + 1) * steps
    middle = min(max(at, first), last) if off else last
    alone = cfg.replace(config, {f"{name}.weight": 0.0 for name in off})
    parts = (config, first, middle), (alone, middle, last)
    return sum(CostCurve(c)._between(a, b, steps * config.train.epochs) for c, a, b in parts if a < b)


def _steps_before(progress: float, total: int) -> int:
    """Number of the steps of a run whose progress, step / total, is less than another."""
    near = round(progress * total)
    return near + (near / total < progress)


def estimate(config: ResolvedConfig, train_size: int) -> str:
    """The estimated FLOPs of a run, in lines to print.

    Args:
        config: resolved.
        train_size: number of training images.
    """
    each = train_size // config.train.batch_size
    steps, flops = each * config.train.epochs, sum(CostCurve(config).epochs(each))
    return (
        f"# {steps} steps of {config.train.batch_size} images over {config.train.epochs} epochs\n"
        f"# {flops / steps / config.train.batch_size:.3g} FLOPs per image, {flops:.3g} FLOPs in total"
    )
