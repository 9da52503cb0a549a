"""FLOPs of a training step, counted by torch on a copy of the model on the meta device."""

import functools
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from rotssl import config as cfg
from rotssl.base import distributed
from rotssl.base.step import StepContext
from rotssl.config import ResolvedConfig
from rotssl.config.resolved import ResolvedData, ResolvedOptim, ResolvedStorage, ResolvedTracking
from rotssl.config.sections import TrainConfig
from rotssl.config.tasks import TASKS
from rotssl.data.augment import Augment, Crop, Views
from rotssl.engine.pretrainer import build_pretrainer

COUNTED = ("views", "encoder", "model", "method", *TASKS)  # the sections that affect FLOPs
_NOT_COUNTED: dict[str, Any] = {
    "optim": ResolvedOptim(name="sgd", lr=1.0),
    "tracking": ResolvedTracking(run_name=""),
    "storage": ResolvedStorage(path=""),
}


def count_step(config: ResolvedConfig, progress: float = 0.0) -> float:
    """FLOPs of one step over all workers: student, teacher and tasks, forward and backward.

    Torch counts convolutions and matrix products, two FLOPs per multiply-add; augmentation, norms and optimizer are not
    included.

    Args:
        config: resolved.
        progress: progress of the run, from 0 to 1.
    """
    counted: dict[str, Any] = {name: getattr(config, name) for name in COUNTED}
    data, train = ResolvedData(image_size=config.data.image_size), TrainConfig(batch_size=config.train.batch_size)
    return _count(ResolvedConfig(**counted, data=data, train=train, **_NOT_COUNTED), progress)


@functools.lru_cache(maxsize=64)  # trials of a sweep and starts of a run share steps
def _count(config: ResolvedConfig, progress: float) -> float:
    batch, side = config.train.batch_size, config.data.image_size
    meta = torch.device("meta")
    with distributed.alone(), meta:
        model = build_pretrainer(cfg.replace(config, {"model.norm": "batch"}), meta)
    count = config.views.global_count
    ctx = StepContext(config.train.seed, 0, 0, progress, np.arange(batch), 0, batch, count)
    augment = Augment(config.views, side, (0.0,), (1.0,), config.train.seed, model.own_crops())

    def empty(crop: Crop) -> torch.Tensor:
        return torch.empty(batch, 3, crop.size, crop.size, device=meta)

    views = Views(
        [empty(crop) for crop in augment.full],
        [empty(crop) for crop in augment.local],
        {name: [empty(crop)] for name, crop in augment.own.items()},
    )
    with distributed.alone(), FlopCounterMode(display=False) as counter:
        model(views, ctx).loss.backward()
    return float(counter.get_total_flops())


def count_ends(config: ResolvedConfig) -> tuple[float, float]:
    """FLOPs of the first and of the last step; in between they change along a cosine, as the share of rotated images does."""
    first = count_step(config)
    falls = any(task.changes for task in config.active().values())
    return first, count_step(config, 1.0) if falls else first


def estimate(config: ResolvedConfig, train_size: int) -> str:
    """The estimated FLOPs of a run, in lines to print.

    Args:
        config: resolved.
        train_size: number of training images.
    """
    steps = train_size // config.train.batch_size * config.train.epochs
    flops = sum(count_ends(config)) / 2  # the mean along a cosine
    return (
        f"# {steps} steps of {config.train.batch_size} images over {config.train.epochs} epochs\n"
        f"# {flops / config.train.batch_size:.3g} FLOPs per image, {flops * steps:.3g} FLOPs in total"
    )
