"""What shows that a run collapsed or diverged."""

import math

import pytest

from rotssl.runs.health import collapsed, diverged, ill


def test_a_run_is_collapsed_by_its_last_epoch():
    points = {1: {"knn/top1": 0.1}, 2: {"knn/top1": 0.2}}
    assert collapsed(points) is None and collapsed({}) is None  # no word of it
    points[1]["feature/std"] = 0.0
    points[2]["feature/std"] = 0.1
    assert collapsed(points) is None
    points[2]["feature/std"] = 0.0999
    assert "0.0999 at epoch 2" in collapsed(points)
    points[2]["feature/std"] = math.nan
    assert collapsed(points) is not None


def test_a_run_is_diverged_by_a_loss_far_above_that_of_its_first_epoch():
    points = {1: {"loss/ssl": -0.5, "loss/rotation": 1.4, "cost/flops": 1.0}, 2: {"loss/ssl": 19.0, "cost/flops": 1e9}}
    assert diverged(points) is None and diverged({}) is None and diverged({1: {"loss/ssl": 1e9}}) is None
    points[3] = {"loss/ssl": 0.5, "loss/rotation": 1383.6, "loss/jigsaw": 1e9}  # jigsaw began later
    assert diverged(points) == "diverged: loss/rotation 1.38e+03 at epoch 3, 1.4 at epoch 1"
    points[3]["loss/rotation"] = 28.0
    assert diverged(points) is None
    points[4] = {"loss/ssl": 20.1}
    assert diverged(points) is not None


FALLS = [
    ("feature/std", (0.9, 0.8, 0.6, 0.29), "fell to 0.29 at epoch 4, from 0.9"),
    ("feature/std", (0.9, 0.8, 0.6, 0.31), None),  # not a third of the highest yet
    ("feature/std", (0.9, 0.2, 0.2, 0.2), None),  # not falling
    ("feature/std", (0.9, 0.8, 0.2), None),  # not for three epochs
    ("feature/effective_rank", (60.0, None, 30.0, None, 20.0, 12.0), "fell to 12 at epoch 6, from 60"),
    ("feature/effective_rank", (60.0, 30.0, 20.0, 12.0, None), None),  # not measured at the last epoch
    ("feature/effective_rank", (60.0, 1.99), "1.99 at epoch 2, below 2"),
    ("feature/effective_rank", (3.0, 12.0, 8.0, 6.0, 4.5), None),
]


@pytest.mark.parametrize(("key", "values", "words"), FALLS)
def test_a_run_collapses_by_a_fall_too(key, values, words):
    points = {e: {} if value is None else {key: value} for e, value in enumerate(values, 1)}
    found = collapsed(points)
    assert found is None if words is None else found == f"collapsed: {key} {words}"


def test_a_run_is_ill_for_all_that_it_has():
    assert ill({1: {"loss/ssl": 1.0}}) == ""
    points = {1: {"loss/ssl": 1.0}, 2: {"loss/ssl": 99.0, "feature/std": 0.01}}
    assert (
        ill(points)
        == "collapsed: feature/std 0.01 at epoch 2, below 0.1; diverged: loss/ssl 99 at epoch 2, 1 at epoch 1"
    )
