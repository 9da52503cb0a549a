"""Measures of an encoder: features of all images, and the metrics computed from them."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from rotssl.base import distributed, heartbeat
from rotssl.base.precision import autocast
from rotssl.data.augment import Augment
from rotssl.data.images import ImageSet
from rotssl.evaluation.collapse import effective_rank
from rotssl.evaluation.hits import top1
from rotssl.evaluation.knn import knn_hits
from rotssl.evaluation.linear import linear_hits


@torch.no_grad()
def encode_share(
    encoder: nn.Module,
    data: ImageSet,
    augment: Augment,
    device: torch.device,
    layout: torch.memory_format,
    kind: torch.dtype | None = None,
    batch: int = 512,
) -> Tensor:
    """Features (ceil(N / workers), D) of this worker's share of the images; the encoder stays in evaluation mode.

    Args:
        encoder: (B, 3, S, S) -> (B, D).
        data: the images.
        augment: provides the normalisation.
        device: device of the encoder.
        layout: memory format of the images.
        kind: of half precision to encode in, as in training; None: float32. The features are float32.
        batch: images per forward pass.
    """
    encoder.eval()
    count, share = len(data.images), -(-len(data.images) // distributed.world_size())
    own = np.arange(distributed.rank() * share, (distributed.rank() + 1) * share) % count  # the last share wraps around
    parts = []
    for first in range(0, share, batch):
        images = torch.from_numpy(data.images[own[first : first + batch]])
        x = augment.evaluation(images.to(device)).contiguous(memory_format=layout)
        with autocast(device, kind):
            parts.append(encoder(x).float())
        heartbeat.beat()
    return torch.cat(parts)


def extract(
    encoder: nn.Module,
    data: ImageSet,
    augment: Augment,
    device: torch.device,
    layout: torch.memory_format,
    kind: torch.dtype | None = None,
) -> Tensor:
    """Features (N, D) of all images; every worker encodes its share. Arguments as of ``encode_share``."""
    return distributed.gather(encode_share(encoder, data, augment, device, layout, kind))[: len(data)]


def measures(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    probe: bool,
    kind: torch.dtype = torch.float32,
    hits: dict[str, Tensor] | None = None,
) -> dict[str, Callable[[], float]]:
    """Functions that compute ``knn/top1``, ``feature/effective_rank`` and, with a probe, ``linear/top1``.

    Args:
        bank: training features, (N, D).
        bank_labels: (N,) int64.
        queries: features to classify, (M, D).
        query_labels: (M,) int64.
        probe: whether to train a linear probe.
        kind: data type of kNN's cosines.
        hits: where the functions put which queries were classified correctly, (M,) bool, as ``knn`` and ``linear``.
    """

    def accuracy(name: str, found: Tensor | None) -> float:
        if hits is not None and found is not None:
            hits[name] = found
        return top1(found)

    computed: dict[str, Callable[[], float]] = {
        "knn/top1": lambda: accuracy("knn", knn_hits(bank, bank_labels, queries, query_labels, kind)),
        "feature/effective_rank": lambda: effective_rank(queries),
    }
    if probe:
        computed["linear/top1"] = lambda: accuracy("linear", linear_hits(bank, bank_labels, queries, query_labels))
    return computed
