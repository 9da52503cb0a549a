"""Few-shot classification: episodes of a few classes, a few training images of each, classified by the nearest class mean."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rotssl.base import rng
from rotssl.data.images import Labels


def _drawn(pools: list[rng.Positions], count: int, *name: int | str) -> rng.Positions:
    """So many of each pool without repetition, (pools, count)."""
    orders = [rng.permutation(rng.key(*name, i), len(pool))[:count] for i, pool in enumerate(pools)]
    return np.stack([pool[order] for pool, order in zip(pools, orders, strict=True)])


@torch.no_grad()
def episodes(
    bank: Tensor,
    bank_labels: Labels,
    queries: Tensor,
    query_labels: Labels,
    ways: int,
    shots: int,
    asked: int,
    count: int,
    seed: int,
) -> tuple[Tensor, int]:
    """The accuracy of each episode, (count,), and how many test images of each class an episode has.

    The class means are those of features of length 1 (SimpleShot's L2N, Wang et al. 2019, arXiv 1911.04623), and the nearest one
    is that of the smallest Euclidean distance (Snell et al. 2017, arXiv 1703.05175, eq. 1 and 2).

    Args:
        bank: features of training images, (N, D).
        bank_labels: (N,).
        queries: features of test images, (M, D).
        query_labels: (M,).
        ways: classes of an episode.
        shots: training images of each class.
        asked: test images of each class; all episodes have as many as the smallest class, if that is fewer.
        count: number of episodes.
        seed: of the draws.

    Raises:
        ValueError: too few classes have so many training images and a test image.
    """
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    known = {int(label): np.flatnonzero(bank_labels == label) for label in np.unique(bank_labels)}
    open_ = {int(label): np.flatnonzero(query_labels == label) for label in np.unique(query_labels)}
    usable = [label for label, pool in known.items() if len(pool) >= shots and label in open_]
    if len(usable) < ways:
        raise ValueError(f"{len(usable)} classes have {shots} training images and a test image")
    each = min([asked, *(len(open_[label]) for label in usable)])
    right, truth = [], torch.arange(ways, device=bank.device).repeat_interleave(each)
    for episode in range(count):
        labels = [usable[i] for i in rng.permutation(rng.key(seed, "episode", episode), len(usable))[:ways]]
        support = _drawn([known[label] for label in labels], shots, seed, "support", episode)
        chosen = _drawn([open_[label] for label in labels], each, seed, "query", episode)
        means = bank[torch.from_numpy(support).to(bank.device)].mean(1)
        distances = torch.cdist(queries[torch.from_numpy(chosen.ravel()).to(bank.device)], means)
        right.append((distances.argmin(1) == truth).float().mean())
    return torch.stack(right), each


def interval(accuracies: Tensor) -> tuple[float, float]:
    """The mean of episodes' accuracies, and the half of its 95% interval, 1.96 deviations of the mean."""
    values = accuracies.double()
    return float(values.mean()), float(1.96 * values.std() / math.sqrt(len(values)))
