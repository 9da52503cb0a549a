"""Few-shot episodes: what is drawn, and against the nearest mean written out."""

import numpy as np
import pytest
import torch

from rotssl.evaluation import fewshot
from tests.evaluation.features import features


def clusters(count, seed, spread, classes=6):
    labels = np.arange(count) % classes
    return spread * features(classes, 8, seed=99)[labels] + features(count, 8, seed=seed), labels


def test_classes_that_are_apart_are_told_apart_and_chance_is_chance():
    for spread, low, high in ((20.0, 1.0, 1.0), (0.0, 0.15, 0.25)):
        found, each = fewshot.episodes(*clusters(120, 0, spread), *clusters(120, 1, spread), 5, 2, 10, 80, seed=0)
        mean, half = fewshot.interval(found)
        assert found.shape == (80,) and each == 10 and low <= mean <= high and (half > 0) == (spread == 0)


def test_an_episode_is_the_nearest_mean_written_out(monkeypatch):
    drawn, take = [], fewshot._drawn
    monkeypatch.setattr(fewshot, "_drawn", lambda *args: drawn.append(take(*args)) or drawn[-1])
    (bank, known), (queries, asked) = clusters(120, 0, 0.7), clusters(90, 1, 0.7)
    found, _ = fewshot.episodes(bank, known, queries, asked, 3, 4, 5, 10, seed=0)
    for accuracy, support, chosen in zip(found.tolist(), drawn[::2], drawn[1::2], strict=True):
        labels = known[support[:, 0]]
        assert support.shape == (3, 4) and chosen.shape == (3, 5) and len(set(labels)) == 3
        assert (known[support] == labels[:, None]).all() and (asked[chosen] == labels[:, None]).all()
        assert all(len(set(row)) == len(row) for row in (*support, *chosen))
        means = [np.mean([bank[i] / bank[i].norm() for i in row], axis=0) for row in support]
        right = 0
        for way, row in enumerate(chosen):
            for i in row:
                query = (queries[i] / queries[i].norm()).numpy()
                right += int(np.argmin([np.linalg.norm(query - mean) for mean in means])) == way
        assert accuracy == pytest.approx(right / 15)
    assert len({tuple(support.ravel()) for support in drawn[::2]}) == 10


def test_the_same_seed_draws_the_same_and_another_others():
    sets = *clusters(120, 0, 0.7), *clusters(90, 1, 0.7)
    first, again, other = (fewshot.episodes(*sets, 5, 1, 20, 20, seed=seed) for seed in (0, 0, 1))
    assert first[0].tolist() == again[0].tolist() != other[0].tolist()
    assert first[1] == 15  # the queries have no more of a class


def test_the_interval_is_that_of_the_mean():
    mean, half = fewshot.interval(torch.tensor([0.2, 0.4, 0.6, 0.8]))
    assert mean == pytest.approx(0.5) and half == pytest.approx(1.96 * 0.2581989 / 2)


def test_too_few_classes_are_said():
    with pytest.raises(ValueError, match="6 classes have 2 training images and a test image"):
        fewshot.episodes(*clusters(12, 0, 1.0), *clusters(12, 1, 1.0), 7, 2, 5, 3, seed=0)
