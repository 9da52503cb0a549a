"""kNN accuracy against one query after the other, in fp32 and bf16."""

import math

import numpy as np
import pytest
import torch

from rotssl.base import distributed
from rotssl.evaluation import knn
from rotssl.evaluation.knn import knn_hits, knn_top1
from rotssl.evaluation.measure import Features, measures
from rotssl.evaluation.protocol import KNN_K, KNN_TEMPERATURE
from tests.evaluation.features import features


def naive_knn(bank, bank_labels, queries, query_labels, k=KNN_K, temperature=KNN_TEMPERATURE):
    """Which queries are right, one after the other, in plain numbers."""
    hits = []
    for query, label in zip(queries.tolist(), query_labels.tolist(), strict=True):
        cosines = []
        for row, known in zip(bank.tolist(), bank_labels.tolist(), strict=True):
            dot = sum(x * y for x, y in zip(query, row, strict=True))
            cosines.append((dot / math.hypot(*query) / math.hypot(*row), known))
        votes = dict.fromkeys(range(10), 0.0)
        for cosine, known in sorted(cosines, reverse=True)[:k]:
            votes[known] += math.exp(cosine / temperature)
        hits.append(max(votes, key=votes.get) == label)
    return hits


@pytest.mark.parametrize(("size", "seed"), [(400, 0), (400, 1), (KNN_K // 4, 2)], ids=["more", "again", "fewer"])
def test_knn_is_the_naive_one_with_more_and_fewer_images_than_neighbours(size, seed, monkeypatch):
    gen = torch.Generator().manual_seed(seed)
    centres = 0.5 * features(5, seed=9)
    labels, asked = (torch.randint(0, 5, (count,), generator=gen) for count in (size, 90))
    # Lengths differ widely, for cosine must not see them; classes overlap, so that accuracy is far from 0 and 1.
    bank = (features(size, seed=seed) + centres[labels]) * torch.logspace(-2, 2, size)[:, None]
    queries = (features(90, seed=seed + 50) + centres[asked]) * torch.logspace(2, -2, 90)[:, None]
    expected = naive_knn(bank, labels, queries, asked)
    assert 0.3 < sum(expected) / 90 < 0.9
    assert knn_top1(bank, labels, queries, asked) == sum(expected) / 90
    official = naive_knn(bank, labels, queries, asked, 20, 0.07)  # of DINO's code
    assert knn_hits(bank, labels, queries, asked, torch.float32, 20, 0.07).tolist() == official != expected
    most, seen = torch.mm, []
    monkeypatch.setattr(torch, "mm", lambda a, b, **more: seen.append((a.shape, b.shape)) or most(a, b, **more))
    for rows, block, span in ((16, 32, 1), (7, 10, 3 * 4 * 7 * 10), (256, 512, 1 << 28)):
        for name, value in {"QUERIES": rows, "BLOCK": block, "SPAN_BYTES": span}.items():
            monkeypatch.setattr(knn, name, value)
        assert knn_hits(bank, labels, queries, asked).tolist() == expected
        assert set(seen) == {((rows, bank.shape[1]), (bank.shape[1], block))}  # all products are of one shape
        seen.clear()


def test_of_equal_cosines_the_first_ones_count(monkeypatch):
    values = torch.tensor([[1.0, 2.0, 1.0, 3.0, 1.0, 1.0], [5.0, 4.0, 4.0, 0.0, 0.0, 0.0], [0.0] * 6])
    found, index = knn._top(values, 3)
    assert found.tolist() == [[3.0, 2.0, 1.0], [5.0, 4.0, 4.0], [0.0] * 3]
    assert index.tolist() == [[3, 1, 0], [0, 1, 2], [0, 1, 2]]


def test_a_worker_without_a_share_of_the_bank_finds_nothing_and_does_not_fail():
    none = knn_hits(torch.empty(0, 4), torch.empty(0, dtype=torch.int64), torch.rand(3, 4), torch.ones(3).long())
    assert none.tolist() == [False] * 3


def pairs(size, asked, width):
    """Features and labels of a bank and of queries; many of the bank are the same image with several labels."""
    gen = torch.Generator().manual_seed(size)
    centres = torch.randn(7, width, generator=gen)
    labels, known = (torch.randint(0, 7, (count,), generator=gen) for count in (size, asked))
    bank = torch.randn(size, width, generator=gen) + 1.5 * width**-0.5 * centres[labels]
    bank[size // 2 :] = bank[: size - size // 2].roll(size // 3, 0)
    return bank, labels, torch.randn(asked, width, generator=gen) + 1.5 * width**-0.5 * centres[known], known


def shares(size, asked, width):
    """This worker's hits of kNN and of the probe, and the effective rank of the queries."""
    bank, labels, queries, known = pairs(size, asked, width)
    each = [-(-len(rows) // distributed.world_size()) for rows in (bank, queries)]
    index = [torch.arange(distributed.rank() * n, (distributed.rank() + 1) * n) for n in each]
    parts = [
        Features(rows[i % len(rows)], of) for rows, i, of in zip((bank, queries), index, (labels, known), strict=True)
    ]
    hits = {}
    found = {name: measure.compute() for name, measure in measures(*parts, width < 100, hits=hits).items()}
    return found, {name: right.tolist() for name, right in hits.items()}


@pytest.mark.contract
@pytest.mark.parametrize(
    "sizes", [(701, 151, 12), (250, 31, 8), pytest.param((200_000, 2000, 512), marks=pytest.mark.exhaustive)], ids=str
)
def test_two_workers_find_what_one_finds(pool, sizes):
    (first, hits), (_, others) = pool.run(shares, *sizes)
    alone, expected = shares(*sizes)
    assert hits["knn"] == expected["knn"] and 0.1 < alone["knn/top1"] < 1 and first["knn/top1"] == alone["knn/top1"]
    assert first["feature/effective_rank"] == pytest.approx(alone["feature/effective_rank"], rel=1e-6)
    if "linear" in expected:
        assert np.mean(np.array(hits["linear"]) != expected["linear"]) < 0.005
    assert len(others["knn"]) == -(-sizes[1] // 2)  # its own


def test_knn_weighs_the_near_above_the_many():
    # Three neighbours at cosine 0.5 have 3 exp(5) votes, one at cosine 1 has exp(10).
    bank = torch.tensor([[1.0, 0.0]] + [[0.5, math.sqrt(0.75)]] * 3)
    assert knn_top1(bank, torch.tensor([1, 0, 0, 0]), torch.tensor([[2.0, 0.0]]), torch.tensor([1])) == 1.0


def test_knn_in_bf16_is_close_and_is_in_bf16():
    gen = torch.Generator().manual_seed(3)
    centres = 2 * torch.randn(4, 16, generator=gen)
    labels, asked = torch.arange(400) % 4, torch.arange(200) % 4
    bank, queries = (centres[part] + 2 * torch.randn(len(part), 16, generator=gen) for part in (labels, asked))
    exact = knn_top1(bank, labels, queries, asked)
    assert exact < 0.98 and knn_top1(bank, labels, queries, asked, torch.bfloat16) == pytest.approx(exact, abs=0.02)
    # Cosines of 0.7001 and 0.7000 are one number in bf16, and of classes with equal votes the first is taken.
    near = torch.tensor([[c, math.sqrt(1 - c * c)] for c in (0.7000, 0.7001)])
    asked = near.new_tensor([[1.0, 0.0]]), torch.tensor([1])
    found = [knn_top1(near, torch.tensor([0, 1]), *asked, kind) for kind in (torch.float32, torch.bfloat16)]
    assert found == [1.0, 0.0]


def test_knn_asks_no_more_than_k_neighbours():
    # Beyond the k nearest, which are of class 0 and 1, there are far more of class 2.
    near, far = torch.tensor([[1.0, 0.1]]), torch.tensor([[1.0, 0.5]])
    bank = torch.cat([near.expand(KNN_K, -1), far.expand(50 * KNN_K, -1)])
    labels = torch.cat([torch.zeros(KNN_K), torch.full((50 * KNN_K,), 2)]).long()
    assert knn_top1(bank, labels, torch.tensor([[1.0, 0.0]]), torch.tensor([0])) == 1.0


def test_knn_counts_a_class_that_the_bank_lacks_as_wrong():
    assert knn_top1(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), torch.tensor([0, 7])) == 0.5
