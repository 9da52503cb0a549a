"""Features at random, for the tests."""

import torch


def features(count, dim=8, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
