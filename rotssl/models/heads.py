"""Heads on top of the encoder."""

from itertools import pairwise

from torch import nn


def mlp(dims: list[int], norm: bool = True, last_bias: bool = True, last_norm: bool = False) -> nn.Sequential:
    """Linear layers with BatchNorm and ReLU between them: projectors, predictors and the heads of tasks.

    Args:
        dims: input, hidden and output widths.
        norm: whether BatchNorm follows the hidden layers.
        last_bias: whether the last layer has a bias.
        last_norm: whether BatchNorm without affine weights follows it (SimSiam's).
    """
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise(dims)):
        last = i == len(dims) - 2
        layers.append(nn.Linear(before, after, bias=last_bias and not last_norm if last else not norm))
        if not last:
            layers += [nn.BatchNorm1d(after), nn.ReLU(inplace=True)] if norm else [nn.ReLU(inplace=True)]
    if last_norm:
        layers.append(nn.BatchNorm1d(dims[-1], affine=False))
    return nn.Sequential(*layers)
