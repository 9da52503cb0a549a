"""Small methods, and what they are given, for the tests."""

from itertools import islice

import numpy as np
import torch

from rotssl.base.step import StepContext
from rotssl.config.methods import METHODS

DIM = 6


def context(step=0, epoch=0, size=4, **fields):
    return StepContext(0, epoch, step, 0.0, np.arange(size), 0, size, **fields)


def make(name, **fields):
    torch.manual_seed(0)
    spec = METHODS[name]
    return spec.load()(spec.config(out_dim=DIM, hidden_dim=8, **fields), 8)


def random_views(count, size=4, seed=0, dim=DIM):
    return list(torch.randn(count, size, dim, generator=torch.Generator().manual_seed(seed)))


def steps(run, count):
    """Take the first steps of a run, and yield their contexts after each."""
    batches = (item for epoch in range(run.config.train.epochs) for item in run.batches(epoch))
    for images, ctx in islice(batches, count):
        run.step(images, ctx)
        yield ctx
