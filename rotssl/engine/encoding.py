"""The views of a step's owners through one encoder, and what keeps BatchNorm from knowing more than it shall."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from rotssl.base import distributed, rng
from rotssl.base.sending import send
from rotssl.base.step import StepContext
from rotssl.models.passes import Network, each_view


def encode_segments(
    encoder: nn.Module, segments: Sequence[tuple[str, list[Tensor]]], joint: bool, run: Network | None = None
) -> dict[str, list[Tensor]]:
    """Features of the views of several owners, encoded together; the features of an owner's segments are concatenated.

    Args:
        encoder: any network.
        segments: owner and views, in the order in which they are encoded.
        joint: as for ``each_view``.
        run: as for ``each_view``.
    """
    features = iter(each_view(encoder, [view for _, views in segments for view in views], joint, run))
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


def shuffled(count: int, device: torch.device, ctx: StepContext) -> tuple[Tensor, Tensor]:
    """Which rows of the whole batch this worker takes when it is shuffled, and where then are its own; (count,) each."""
    order = rng.permutation(rng.key(ctx.seed, ctx.step, "shuffle"), count * distributed.world_size())
    own = slice(distributed.rank() * count, (distributed.rank() + 1) * count)
    both = send(device, np.stack([order[own], np.argsort(order)[own]]))
    return both[0], both[1]
