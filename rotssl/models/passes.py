"""Several views through a network, in as few forward passes as BatchNorm's statistics allow."""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import groupby

import torch
from torch import Tensor, nn

from rotssl.models import norm

Network = Callable[[Tensor], Tensor]


def each_view(network: nn.Module, views: list[Tensor], joint: bool = False, run: Network | None = None) -> list[Tensor]:
    """What a network makes of each view; consecutive views of one size share a pass if possible.

    Args:
        network: any network, of which a view is a batch.
        views: each (n, ...).
        joint: whether views of one size form one batch for BatchNorm. Otherwise each view is normalised separately; views still
            share a pass if the network supports per-view statistics.
        run: called in place of the network, which it calls.
    """
    run = run or network
    outputs: list[Tensor] = []
    apart = not joint and norm.keeps_views_apart(network)
    for _, group in groupby(views, key=lambda view: view.shape[1:] if joint else view.shape):
        alike = list(group)
        if len(alike) == 1 or not (joint or apart):
            outputs += [run(view) for view in alike]
            continue
        with norm.per_view_statistics(len(alike)) if apart else nullcontext():
            outputs += run(torch.cat(alike)).split([len(view) for view in alike])
    return outputs
