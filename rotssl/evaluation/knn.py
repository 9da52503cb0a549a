"""Weighted k-nearest-neighbour classification on frozen features, after Wu et al. 2018 (arXiv 1805.01978).

Each worker keeps its share of the bank and looks there for the neighbours of all queries; the worker that a query belongs to
merges what they found. For the same features the result does not depend on how many workers there are, to the bit: cosines come
from products of one shape, equal ones are told apart by their place in the bank, and votes are summed as whole numbers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rotssl.base import distributed, heartbeat
from rotssl.evaluation.hits import top1
from rotssl.evaluation.protocol import KNN_K, KNN_TEMPERATURE

QUERIES, BLOCK = 256, 512  # rows of the two factors of each product
SPAN_BYTES = 256 << 20  # of cosines at a time, regardless of the size of the bank
SPARE = 16  # candidates beside the k nearest, among which rounding may have chosen
VOTE = 2.0**52  # of the nearest neighbour, in whole numbers, of which 64 bits hold the sum of 1,000
EPSILON = 1e-5  # added to a Euclidean distance before it is inverted, as in solo-learn


class Vote(NamedTuple):
    """A way to classify by neighbours: k of them, and T of their votes exp(cosine / T), which Euclidean votes do not use."""

    k: int
    temperature: float = KNN_TEMPERATURE


def knn_hits(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    kind: torch.dtype = torch.float32,
    k: int = KNN_K,
    temperature: float = KNN_TEMPERATURE,
) -> Tensor:
    """Which queries are of the class that has the largest sum of exp(cosine / T) among the k nearest neighbours.

    Args:
        bank: this worker's share of the features with known labels, in the order of the ranks, (N, D).
        bank_labels: (N,) int64.
        queries: this worker's share, as many on each worker, (M, D).
        query_labels: (M,) int64.
        kind: data type of the cosines.
        k: number of neighbours, at most 1,000.
        temperature: T.

    Returns:
        (M,) bool.
    """
    return knn_hits_of(bank, bank_labels, queries, query_labels, [Vote(k, temperature)], kind)[0]


@torch.no_grad()
def knn_hits_of(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    votes: Sequence[Vote],
    kind: torch.dtype = torch.float32,
    euclidean: bool = False,
) -> list[Tensor]:
    """The hits of several k and T, from one search for the neighbours of the largest k; see ``knn_hits``.

    Args:
        bank: as in ``knn_hits``, like the next three.
        bank_labels: likewise.
        queries: likewise.
        query_labels: likewise.
        votes: the k and T.
        kind: data type of the cosines.
        euclidean: the neighbours are the nearest by Euclidean distance d, and vote with 1 / (d + 1e-5).

    Returns:
        (M,) bool for each k and T.
    """
    images, most = len(bank), max(vote.k for vote in votes)
    if euclidean:
        bank, asked = _lifted(bank, BLOCK, True), _lifted(queries, QUERIES, False)
    else:
        bank, asked = _normalised(bank, kind, BLOCK), _normalised(queries, kind, QUERIES)
    total = int(distributed.all_reduce(bank_labels.new_tensor(images)))
    classes = 1 + int(distributed.largest(bank_labels.amax() if images else bank_labels.new_tensor(0)))
    k, found = max(1, min(most, total)), [list[Tensor]() for _ in votes]
    for source in range(distributed.world_size()):
        for rows in asked.split(QUERIES):
            given = distributed.from_rank(rows, source)
            near, index = nearest(given, bank, images, k + SPARE if euclidean else k)
            near, index = _by_distance(given, bank, near, index, k) if euclidean else (near, index)
            known = bank_labels[index.clamp_max(max(0, images - 1))] if images else torch.zeros_like(index)
            parts = distributed.gather_to(torch.cat([near.double(), known.double()], 1), source)
            if distributed.rank() == source:
                near, known = _merged(parts.view(distributed.world_size(), QUERIES, 2, k))
                for hits, vote in zip(found, votes, strict=True):
                    values = near[:, : vote.k]
                    shares = _shares(values, None if euclidean else vote.temperature)
                    hits.append(_votes(values, known[:, : vote.k], shares, classes).argmax(1))
            heartbeat.beat()
    return [torch.cat(hits)[: len(queries)] == query_labels for hits in found]


def _normalised(rows: Tensor, kind: torch.dtype, multiple: int) -> Tensor:
    """Rows of length 1, and zeros that make their number a multiple of another, so that all products are of one shape."""
    made = rows.new_zeros(max(1, -(-len(rows) // multiple)) * multiple, rows.shape[1], dtype=kind)
    for own, part in zip(made[: len(rows)].split(1 << 16), rows.split(1 << 16), strict=True):
        own.copy_(F.normalize(part.float(), dim=1))
    return made


def _lifted(rows: Tensor, multiple: int, stored: bool) -> Tensor:
    """Rows with one more entry, so that products of a query q and a stored row b are q b - |b|^2 / 2 = (|q|^2 - d^2) / 2.

    In double precision, in which that difference is exact enough for close neighbours.
    """
    made = rows.new_zeros(max(1, -(-len(rows) // multiple)) * multiple, rows.shape[1] + 1, dtype=torch.float64)
    made[: len(rows), :-1] = rows
    made[: len(rows), -1] = made[: len(rows)].square().sum(1) / -2 if stored else 1
    return made


def nearest(queries: Tensor, bank: Tensor, images: int, k: int) -> tuple[Tensor, Tensor]:
    """Cosines of the k nearest rows of a bank, the nearest first, and their indices, each (QUERIES, k).

    Args:
        queries: (QUERIES, D), of length 1.
        bank: (N, D), of length 1, N a multiple of BLOCK.
        images: how many rows of the bank count; where there are fewer than k, cosines of -inf follow.
        k: number of neighbours.
    """
    span = max(1, SPAN_BYTES // (QUERIES * BLOCK * bank.element_size())) * BLOCK
    values, index = queries.new_empty(QUERIES, 0), torch.empty(QUERIES, 0, dtype=torch.int64, device=bank.device)
    for first in range(0, len(bank), span):
        part = bank[first : first + span]
        cosines = queries.new_empty(QUERIES, max(k, len(part)))
        for begin in range(0, len(part), BLOCK):
            torch.mm(queries, part[begin : begin + BLOCK].T, out=cosines[:, begin : begin + BLOCK])
        cosines[:, max(0, min(len(part), images - first)) :] = -torch.inf
        near, place = _top(cosines, k)
        index = torch.cat([index, first + place], 1)
        values, place = _top(torch.cat([values, near], 1), k)
        index = index.gather(1, place)
    return values, index


def _top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row and their indices; of equal ones the first, and in this order."""
    found, index = values.topk(min(k + 1, values.shape[1]), dim=1)
    several = (found[:, k:] == found[:, k - 1 : k]).nonzero()[:, 0]
    index = index[:, :k]
    for rows in several.split(
        16
    ):  # topk() takes any of those that are equal to the last one; a few, for the masks are wide
        own, border = values[rows], found[rows, k - 1 : k]
        above = own > border
        equal = own == border
        taken = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
        index[rows] = taken.nonzero()[:, 1].view(-1, k)
    index = index.sort(dim=1)[0]
    found, order = values.gather(1, index).sort(dim=1, descending=True, stable=True)
    return found, index.gather(1, order)


def _merged(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and labels of the k nearest over all workers, the nearest first, each (QUERIES, k); from (W, QUERIES, 2, k)."""
    cosines, labels = parts.permute(2, 1, 0, 3).flatten(2)
    cosines, index = _top(cosines, parts.shape[3])
    return cosines, labels.gather(1, index)


def _by_distance(queries: Tensor, bank: Tensor, near: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of the candidates, by distances that are computed pair by pair; their squares, negative, and indices.

    What a product says of equal rows differs by rounding with their place in it, and their distances must not.

    Args:
        queries: as ``_lifted`` makes them, (QUERIES, D + 1).
        bank: likewise, (N, D + 1).
        near: what the product says of the candidates, (QUERIES, C); -inf where there is none.
        index: of the candidates in the bank, (QUERIES, C).
        k: number of neighbours, at most C.
    """
    index, order = index.sort(dim=1)
    none, parts = near.gather(1, order) == -torch.inf, []
    for rows, candidates in zip(queries[:, :-1].split(16), index.clamp_max(len(bank) - 1).split(16), strict=True):
        parts.append((rows[:, None] - bank[candidates][..., :-1]).square().sum(2).neg())
    values, place = _top(torch.cat(parts).masked_fill(none, -torch.inf), k)
    return values, index.gather(1, place)


def _shares(near: Tensor, temperature: float | None) -> Tensor:
    """The votes of neighbours, (QUERIES, k), in shares of the nearest one's.

    Args:
        near: cosines, or negative squares of distances, the nearest first.
        temperature: of cosines; None: they are distances.
    """
    if temperature is not None:
        return ((near - near[:, :1]) / temperature).exp()
    distance = near.neg().sqrt()
    return (distance[:, :1] + EPSILON) / (distance + EPSILON)


def _votes(near: Tensor, labels: Tensor, shares: Tensor, classes: int) -> Tensor:
    """The votes for each class, (QUERIES, classes) int64; those of neighbours at -inf, which are none, are 0."""
    votes = shares.masked_fill(near == -torch.inf, 0).mul(VOTE).round().long()
    return votes.new_zeros(len(votes), classes).scatter_add_(1, labels.long(), votes)


def knn_top1(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, kind: torch.dtype = torch.float32
) -> float:
    """Share of this worker's queries that ``knn_hits`` says are classified correctly."""
    return top1(knn_hits(bank, bank_labels, queries, query_labels, kind))
