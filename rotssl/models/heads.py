"""Heads on top of the encoder."""

from itertools import pairwise

from torch import nn


def mlp(dims: list[int]) -> nn.Sequential:
    """Linear layers with BatchNorm and ReLU between them; every projector, predictor and task head is one.

    Args:
        dims: input, hidden and output widths.
    """
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise(dims)):
        last = i == len(dims) - 2
        layers.append(nn.Linear(before, after, bias=last))
        if not last:
            layers += [nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
