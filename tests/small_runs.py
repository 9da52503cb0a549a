"""Small runs of the engine, for the tests."""

import resource
from contextlib import contextmanager

import numpy as np
import torch

from rotssl import config as cfg
from rotssl.base import distributed
from rotssl.base.step import StepContext
from rotssl.data import datasets
from rotssl.data.augment import Augment, Views
from rotssl.engine.runtime import LocalRuntime
from rotssl.engine.trainer import Trainer
from rotssl.runs import journal

CPU = torch.device("cpu")
PAPER = {"rotation.mode": "extra"}
# What a method wants to be small, or to show all that it has within a few steps; a new method needs no line here.
SMALL = {
    "mocov2": {"method.queue_size": 40},
    "swav": {"method.prototypes": 12, "method.queue_size": 40, "method.queue_after": 1, "method.freeze_steps": 3},
    "simsiam": {"method.predictor_dim": 8},
    "dino": {"method.out_dim": 24, "method.bottleneck_dim": 8, "method.freeze_steps": 3},
}


def make_config(folder, method, **fields):
    small = {
        "data.name": "synthetic",
        "data.limit": 512,
        "data.image_size": 16,
        "train.batch_size": 16,
        "train.epochs": 4,
        "method.name": method,
        "method.hidden_dim": 32,
        "method.out_dim": 16,
        "rotation.crop_size": 8,
        "tracking.run_name": "run",
        "storage.path": str(folder),
        **SMALL.get(method, {}),
    }
    if "method.queue_size" in small:
        small["method.queue_size"] = 5 * fields.get("train.batch_size", 16) // 2
    return cfg.resolve(cfg.build(small | fields), 32, 512)


def batch(config, model):
    """Random views, of every kind that the configuration has, and the first step's context."""
    size, gen = config.train.batch_size, torch.Generator().manual_seed(7)
    crops = Augment(config.views, 16, (0.0,), (1.0,), 0, model.own_crops())
    full, local = (
        [torch.randn(size, 3, c.size, c.size, generator=gen) for c in kind] for kind in (crops.full, crops.local)
    )
    views = Views(full, local, {name: [torch.randn(size, 3, crop.size, crop.size)] for name, crop in crops.own.items()})
    return views, StepContext(config.train.seed, 0, 0, 0.0, np.arange(size), 0, size, config.views.global_count)


class Group(LocalRuntime):
    """The engine in a process group without Ray."""

    def __init__(self, run_dir):
        super().__init__(run_dir, CPU)
        self.rank, self.world_size = distributed.rank(), distributed.world_size()

    def wrap(self, model):
        return distributed.data_parallel(model, self.device)


def trainer(config, splits=None):
    splits = splits or datasets.load(config.data, 0.1)
    run = Trainer(config, splits, Group(config.run_dir), journal.Journal(config.run_dir))
    normalize, kind = run.augment.normalize, torch.get_default_dtype()
    run.augment.normalize = lambda images: normalize(images).to(kind)  # views as the weights are
    return run


@contextmanager
def full_disk(room):
    """No file can become larger than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def arithmetic(kind):
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def run_to(overrides):
    """Final weights of a run."""
    run = trainer(make_config(**overrides))
    run.run()
    return {name: value.numpy().copy() for name, value in run.model.state_dict().items()}
