"""Linear accuracy against scikit-learn's, and what it must not depend on."""

import math

import numpy as np
import pytest
import torch

from rotssl.evaluation.linear import fit, linear_hits, linear_top1, logits
from rotssl.evaluation.protocol import LINEAR_HELD_OUT, LINEAR_L2
from tests.evaluation.features import features


def blobs(count, classes=5, dim=24, spread=1.3, seed=0):
    """Features of overlapping classes, correlated and off the origin as an encoder's are, and their labels."""
    labels = torch.arange(count) % classes
    found = 0.6 * features(classes, dim, seed=99)[labels] + spread * features(count, dim, seed)
    return (found @ features(dim, dim, seed=98) / dim**0.5).relu() + 3, labels


def theirs(x, labels, l2):
    """Scikit-learn's classifier; its C is on the sum of the losses, our l2 on their mean."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    model = linear_model.LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=10000)
    return model.fit(x.double().numpy(), labels.numpy())


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
@pytest.mark.parametrize("seed", [None, 5], ids=["from zero", "from elsewhere"])
def test_a_linear_fit_is_scikit_learn_s(l2, seed):
    (x, labels), (asked, _) = blobs(600), blobs(2000, seed=1)
    mean, std = x.mean(0), x.std(0)
    x, asked = (x - mean) / std, (asked - mean) / std
    with torch.no_grad():
        ours = fit(x, labels, l2, torch.zeros(5, 25) if seed is None else features(5, 25, seed))
    model = theirs(x, labels, l2)
    reference = torch.tensor(np.hstack([model.coef_, model.intercept_[:, None]]))
    values = []
    for weights in (ours.double(), reference):
        loss = torch.nn.functional.cross_entropy(logits(x.double(), weights), labels)
        values.append(float(loss + l2 / 2 * weights[:, :-1].square().sum()))
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    same = logits(asked, ours).argmax(1).numpy() == model.predict(asked.double().numpy())
    assert same.mean() > 0.99


def test_linear_is_scikit_learn_s_at_the_strength_that_a_held_out_part_of_the_bank_likes_best():
    (bank, labels), (queries, asked) = blobs(300), blobs(3000, seed=1)
    x, q = ((part - bank.mean(0)) / bank.std(0, correction=0) for part in (bank, queries))
    held = torch.cat([(labels == label).nonzero()[::LINEAR_HELD_OUT, 0] for label in range(5)])  # 60 of a class: 12
    rest = torch.tensor(sorted(set(range(300)) - set(held.tolist())))
    losses = {}
    for l2 in LINEAR_L2:
        chances = theirs(x[rest], labels[rest], l2).predict_log_proba(x[held].double().numpy())
        losses[l2] = -chances[np.arange(len(held)), labels[held].numpy()].mean()
    scores = {l2: theirs(x, labels, l2).score(q.double().numpy(), asked.numpy()) for l2 in LINEAR_L2}
    best = min(losses, key=losses.get)
    assert best not in (LINEAR_L2[0], LINEAR_L2[-1])
    # The neighbours in the grid would be noticed.
    assert all(abs(score - scores[best]) > 0.005 for l2, score in scores.items() if l2 != best), scores
    assert linear_top1(bank, labels, queries, asked) == pytest.approx(scores[best], abs=0.002)


@pytest.mark.contract
def test_linear_asks_each_query_by_itself():
    (bank, labels), (queries, asked) = blobs(300), blobs(10, seed=1)
    alone = [linear_top1(bank, labels, queries[[i]], asked[[i]]) for i in range(10)]
    assert 0 < np.mean(alone) < 1
    assert linear_hits(bank, labels, queries, asked).tolist() == alone
    assert linear_top1(bank, labels, queries, asked) == pytest.approx(np.mean(alone))


def test_linear_tells_apart_what_a_plane_can_and_guesses_where_there_is_nothing():
    (bank, labels), (queries, asked) = blobs(500, spread=0.1), blobs(500, spread=0.1, seed=1)
    assert linear_top1(bank, labels, queries, asked) == 1
    (bank, labels), (queries, asked) = blobs(1000), blobs(4000, seed=1)
    shuffled = labels[torch.randperm(1000, generator=torch.Generator().manual_seed(3))]
    assert linear_top1(bank, labels, queries, asked) > 0.5
    assert linear_top1(bank, shuffled, queries, asked) == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize("scale", [1e-6, 1e6, torch.logspace(-6, 6, 24)], ids=["small", "large", "each its own"])
def test_linear_does_not_see_the_scale_of_features(scale):
    (bank, labels), (queries, asked) = blobs(300), blobs(1000, seed=1)
    expected = linear_top1(bank, labels, queries, asked)
    assert linear_top1(bank * scale, labels, queries * scale, asked) == pytest.approx(expected, abs=0.003)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4 / 3])
def test_linear_leaves_out_what_is_constant_in_the_bank(value):
    (bank, labels), (queries, asked) = blobs(300), blobs(1000, seed=1)
    expected = linear_top1(bank, labels, queries, asked)
    # Half of them one bit up: features that should be equal may differ by as much.
    more = [
        torch.cat([part, value * (1 + 1.2e-7 * (torch.arange(len(part))[:, None] % 2))], 1) for part in (bank, queries)
    ]
    assert linear_top1(more[0], labels, more[1], asked) == pytest.approx(expected, abs=0.003)
    more[1][:, -1] += torch.linspace(-1, 1, 1000)  # it was constant in the bank only
    assert linear_top1(more[0], labels, more[1], asked) == pytest.approx(expected, abs=0.003)
    assert linear_top1(torch.full_like(bank, value), labels, queries, asked) == pytest.approx(0.2)  # all are: one class


def test_linear_counts_a_class_that_the_bank_lacks_as_wrong_and_refuses_to_number_what_is_none():
    (bank, labels), (queries, asked) = blobs(300, spread=0.1), blobs(100, spread=0.1, seed=1)
    assert linear_top1(bank, labels, queries, asked + 10 * (torch.arange(100) < 30)) == 0.7
    assert linear_top1(bank[labels < 4], labels[labels < 4], queries, asked) == pytest.approx(0.8)
    assert linear_top1(bank.half().requires_grad_(), labels, queries, asked) == 1  # reads, learns nothing back
    for value in (math.nan, math.inf):
        broken = bank.clone()
        broken[7, 7] = value
        assert math.isnan(linear_top1(broken, labels, queries, asked))
        assert math.isnan(linear_top1(bank, labels, broken, labels))
