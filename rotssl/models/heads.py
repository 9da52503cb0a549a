"""Heads on top of the encoder."""

from itertools import pairwise

from torch import nn


def mlp(dims: list[int], last_norm: bool = False) -> nn.Sequential:
    """Linear layers with BatchNorm and ReLU between them; every projector, predictor and task head is one.

    Args:
        dims: input, hidden and output widths.
        last_norm: whether BatchNorm follows the last layer as well (without ReLU).
    """
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise(dims)):
        last = i == len(dims) - 2
        norm = not last or last_norm
        layers.append(nn.Linear(before, after, bias=not norm))
        if norm:
            layers.append(nn.BatchNorm1d(after))
        if not last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
