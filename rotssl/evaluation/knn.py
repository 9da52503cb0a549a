"""Weighted k-nearest-neighbour classification on frozen features, after Wu et al. 2018 (arXiv 1805.01978)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from rotssl.base import heartbeat
from rotssl.evaluation.hits import top1
from rotssl.evaluation.protocol import KNN_K, KNN_TEMPERATURE

CHUNK_BYTES = 256 << 20  # of similarities at a time, regardless of the size of the bank


@torch.no_grad()
def knn_hits(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, kind: torch.dtype = torch.float32
) -> Tensor:
    """Which queries are of the class that has the largest sum of exp(cosine / T) among the k nearest neighbours.

    Args:
        bank: features with known labels, (N, D).
        bank_labels: (N,) int64.
        queries: (M, D).
        query_labels: (M,) int64.
        kind: data type of the cosines; votes are summed in single precision.

    Returns:
        (M,) bool.
    """
    bank = F.normalize(bank.float(), dim=1).to(kind).T
    queries = F.normalize(queries.float(), dim=1).to(kind)
    classes = int(bank_labels.max()) + 1
    chunk = max(1, CHUNK_BYTES // (bank.shape[1] * bank.element_size()))  # queries per matrix multiplication
    hits = []
    for rows, labels in zip(queries.split(chunk), query_labels.split(chunk), strict=True):
        similarity, index = (rows @ bank).topk(min(KNN_K, bank.shape[1]), dim=1)
        votes = bank_labels.new_zeros(len(rows), classes, dtype=torch.float32).scatter_add_(
            1, bank_labels[index], (similarity.float() / KNN_TEMPERATURE).exp()
        )
        hits.append(votes.argmax(1) == labels)
        heartbeat.beat()
    return torch.cat(hits)


def knn_top1(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, kind: torch.dtype = torch.float32
) -> float:
    """Share of the queries that ``knn_hits`` says are classified correctly."""
    return top1(knn_hits(bank, bank_labels, queries, query_labels, kind))
