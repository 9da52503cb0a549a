"""kNN accuracy against one query after the other, in fp32 and bf16."""

import math

import pytest
import torch

from rotssl.evaluation import knn
from rotssl.evaluation.knn import knn_hits, knn_top1
from rotssl.evaluation.protocol import KNN_K, KNN_TEMPERATURE
from tests.evaluation.features import features


def naive_knn(bank, bank_labels, queries, query_labels):
    """Which queries are right, one after the other, in plain numbers."""
    hits = []
    for query, label in zip(queries.tolist(), query_labels.tolist(), strict=True):
        cosines = []
        for row, known in zip(bank.tolist(), bank_labels.tolist(), strict=True):
            dot = sum(x * y for x, y in zip(query, row, strict=True))
            cosines.append((dot / math.hypot(*query) / math.hypot(*row), known))
        votes = dict.fromkeys(range(10), 0.0)
        for cosine, known in sorted(cosines, reverse=True)[:KNN_K]:
            votes[known] += math.exp(cosine / KNN_TEMPERATURE)
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
    topk, seen = torch.Tensor.topk, []
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, *args, **more: seen.append(x.nbytes) or topk(x, *args, **more))
    for most in (1, 7 * 4 * size + 3, 1 << 28):  # a row at least, seven at a time with a rest, all
        monkeypatch.setattr(knn, "CHUNK_BYTES", most)
        assert knn_hits(bank, labels, queries, asked).tolist() == expected
        assert max(seen) == max(4 * size, min(most - most % (4 * size), 90 * 4 * size))
        seen.clear()
    assert knn_top1(bank, labels, queries, asked) == sum(expected) / 90


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
