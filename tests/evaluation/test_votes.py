"""kNN against plain float64 on 1,000 points, lightly and scikit-learn; the probe against scikit-learn's.

Both are imported where they are asked, for the two processes of ``pool`` read this file and need neither.
"""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rotssl.base import distributed
from rotssl.evaluation.knn import EPSILON, Vote, knn_hits_of
from rotssl.evaluation.linear import held_out, linear_hits
from rotssl.evaluation.protocol import LINEAR_L2
from tests.evaluation.features import features

VOTES = [Vote(k, temperature) for k in (1, 5, 20, 200, 999) for temperature in (0.07, 0.1, 1.0)]


def clusters(count, dim, seed, classes=10, spread=1.0):
    """Features around class means, and labels; the lengths differ widely."""
    labels = torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(seed))
    rows = spread * features(classes, dim, seed=99)[labels] + features(count, dim, seed=seed)
    return rows, labels


def reference(bank, labels, queries, known, votes, euclidean=False, classes=10):
    """In float64, image after image: of equal neighbours the first count, of equal classes the first wins; (votes, M)."""
    bank, labels, hits = bank.double().numpy(), labels.numpy(), []
    for query, truth in zip(queries.double().numpy(), known.tolist(), strict=True):
        # Row by row, so that equal rows have equal results wherever they are.
        if euclidean:
            near = -np.sqrt(np.square(bank - query).sum(1))
        else:
            near = (bank * query).sum(1) / np.sqrt(np.square(bank).sum(1)) / np.sqrt(np.square(query).sum())
        order, right = np.argsort(-near, kind="stable"), []
        for k, temperature in votes:
            some = order[:k]
            weights = 1 / (EPSILON - near[some]) if euclidean else np.exp(near[some] / temperature)
            totals = [math.fsum(weights[labels[some] == label]) for label in range(classes)]
            right.append(int(np.argmax(totals)) == truth)
        hits.append(right)
    return np.array(hits).T.tolist()


@pytest.mark.parametrize("euclidean", [False, True], ids=["cosine", "euclidean"])
def test_hits_are_those_of_plain_float64_on_1000_points_with_ties(euclidean):
    bank, labels = clusters(1000, 16, 0, spread=0.5)
    # Three of four rows are there twice, half of those with another label, and a fifth of them at double length.
    bank[250:1000:2] = bank[251:1000:2]
    if not euclidean:
        bank[250:1000:10] *= 2
    labels[:10] = torch.arange(10)
    queries, known = clusters(150, 16, 1, spread=0.5)
    queries[:20] = bank[400:420]  # some are in the bank
    found = knn_hits_of(bank, labels, queries, known, VOTES, euclidean=euclidean)
    expected = reference(bank, labels, queries, known, VOTES, euclidean)
    for vote, hits, right in zip(VOTES, found, expected, strict=True):
        assert hits.tolist() == right, vote
    assert 0.2 < float(found[3].float().mean()) < 0.9 and len({tuple(hits.tolist()) for hits in found}) >= 5


def test_of_twins_that_are_far_apart_in_the_bank_the_first_is_the_nearest():
    bank = features(1200, 64, seed=0)
    bank[500:650] = bank[:150]  # a product rounds differently at some places of a block
    images = torch.arange(1200)  # each is a class of its own
    for euclidean in (False, True):
        (hits,) = knn_hits_of(bank, images, bank[:150], images[:150], [Vote(1)], euclidean=euclidean)
        assert hits.all()


def test_a_tie_of_classes_goes_to_the_first_class_and_of_neighbours_to_the_first_image():
    row = torch.tensor([[1.0, 2.0]])
    bank, labels = row.repeat(6, 1), torch.tensor([4, 3, 3, 4, 2, 1])
    winners = {1: 4, 2: 3, 4: 3, 6: 3}
    for asked in range(5):
        found = knn_hits_of(bank, labels, row, torch.tensor([asked]), [Vote(k) for k in winners])
        assert [bool(hits) for hits in found] == [asked == winner for winner in winners.values()]


def test_lightly_and_scikit_learn_agree_to_the_last_image():
    from lightly.utils.benchmarking import knn_predict
    from sklearn.neighbors import KNeighborsClassifier

    (bank, labels), (queries, known) = clusters(1000, 32, 2, spread=0.5), clusters(100, 32, 3, spread=0.5)
    unit = F.normalize(bank), F.normalize(queries)
    for vote, ours in zip(VOTES, knn_hits_of(bank, labels, queries, known, VOTES), strict=True):
        theirs = knn_predict(unit[1], unit[0].T, labels, 10, vote.k, vote.temperature)[:, 0]
        assert ours.tolist() == (theirs == known).tolist(), vote

        def weights(distance, temperature=vote.temperature):
            return np.exp((1 - distance) / temperature)

        model = KNeighborsClassifier(vote.k, metric="cosine", algorithm="brute", weights=weights)
        found = model.fit(bank.double().numpy(), labels.numpy()).predict(queries.double().numpy())
        assert ours.tolist() == (found == known.numpy()).tolist(), vote
        assert 0.3 < float(ours.float().mean()) < 0.95


def test_euclidean_votes_are_scikit_learn_s():
    from sklearn.neighbors import KNeighborsClassifier

    (bank, labels), (queries, known) = clusters(1000, 32, 2, spread=0.5), clusters(100, 32, 3, spread=0.5)
    votes = [Vote(k) for k in (1, 5, 50, 200)]
    for vote, ours in zip(votes, knn_hits_of(bank, labels, queries, known, votes, euclidean=True), strict=True):
        model = KNeighborsClassifier(vote.k, algorithm="brute", weights=lambda distance: 1 / (distance + EPSILON))
        found = model.fit(bank.double().numpy(), labels.numpy()).predict(queries.double().numpy())
        assert ours.tolist() == (found == known.numpy()).tolist(), vote


def test_the_probe_is_within_0_3_points_of_scikit_learn_s_logistic_regression():
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    (bank, labels), (queries, known) = clusters(3000, 24, 4, spread=0.6), clusters(3000, 24, 5, spread=0.6)
    bank, queries = (rows * torch.logspace(-1, 1, 24) + 3 for rows in (bank, queries))  # dimensions of any scale
    ours = float(linear_hits(bank, labels, queries, known).float().mean())
    mean, spread = bank.mean(0), bank.std(0, correction=0)
    rows = [((part - mean) / spread).double().numpy() for part in (bank, queries)]
    apart = held_out(labels).numpy()

    def fitted(l2, kept):
        model = LogisticRegression(C=1 / (l2 * int(kept.sum())), max_iter=2000)
        return model.fit(rows[0][kept], labels.numpy()[kept])

    losses = {l2: log_loss(labels.numpy()[apart], fitted(l2, ~apart).predict_proba(rows[0][apart])) for l2 in LINEAR_L2}
    theirs = fitted(min(losses, key=losses.get), np.full(len(bank), True)).score(rows[1], known.numpy())
    assert 0.4 < ours < 0.95 and abs(ours - theirs) <= 0.003


def shares(votes, euclidean):
    """This worker's hits of several votes."""
    (bank, labels), (queries, known) = clusters(701, 12, 6), clusters(151, 12, 7)
    bank[350:] = bank[:351].roll(100, 0)
    each = [-(-len(rows) // distributed.world_size()) for rows in (bank, queries)]
    index = [torch.arange(distributed.rank() * n, (distributed.rank() + 1) * n) for n in each]
    own = index[0][index[0] < len(bank)], index[1] % len(queries)
    found = knn_hits_of(bank[own[0]], labels[own[0]], queries[own[1]], known[own[1]], votes, euclidean=euclidean)
    return [hits.tolist() for hits in found]


@pytest.mark.contract
@pytest.mark.parametrize("euclidean", [False, True], ids=["cosine", "euclidean"])
def test_two_workers_vote_as_one_does(pool, euclidean):
    votes = [Vote(1), Vote(7, 0.07), Vote(200)]
    both = pool.run(shares, votes, euclidean)
    for alone, first, second in zip(shares(votes, euclidean), *both, strict=True):
        assert (first + second)[:151] == alone
