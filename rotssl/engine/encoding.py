"""Views -> features, with as few forward passes as BatchNorm's statistics allow."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby, islice

import torch
from torch import Tensor, nn

from rotssl.models import norm

Network = Callable[[Tensor], Tensor]


def encode(encoder: nn.Module, views: list[Tensor], joint: bool, run: Network | None = None) -> list[Tensor]:
    """Features of each view, encoding consecutive views of one size in one pass if possible.

    Args:
        encoder: any network.
        views: each (n, ...).
        joint: whether views of one size form one batch for BatchNorm. Otherwise each view is normalised separately; views still
            share a pass if the network supports per-view statistics.
        run: called in place of the network, which it calls.
    """
    run = run or encoder
    features: list[Tensor] = []
    apart = not joint and norm.keeps_views_apart(encoder)
    for _, group in groupby(views, key=lambda view: view.shape[1:] if joint else view.shape):
        alike = list(group)
        if len(alike) == 1 or not (joint or apart):
            features += [run(view) for view in alike]
            continue
        with norm.per_view_statistics(len(alike)) if apart else nullcontext():
            features += run(torch.cat(alike)).split([len(view) for view in alike])
    return features


def encode_segments(
    encoder: nn.Module, segments: Sequence[tuple[str, list[Tensor]]], joint: bool, run: Network | None = None
) -> dict[str, list[Tensor]]:
    """Features of the views of several owners, encoded together; the features of an owner's segments are concatenated.

    Args:
        encoder: any network.
        segments: owner and views, in the order in which they are encoded.
        joint: as for ``encode``.
        run: as for ``encode``.
    """
    features = iter(encode(encoder, [view for _, views in segments for view in views], joint, run))
    found: dict[str, list[Tensor]] = {}
    for owner, views in segments:
        found.setdefault(owner, []).extend(islice(features, len(views)))
    return found


@contextmanager
def frozen_bn_statistics(module: nn.Module) -> Iterator[None]:
    """Within the body, BatchNorm normalises by batch statistics as usual but does not update the running ones."""
    layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
