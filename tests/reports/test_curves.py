"""Where curves cross a level, and numbers over paired seeds with their intervals."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from rotssl.reports.curves import cost_to_reach, crossing
from rotssl.reports.statistics import Estimate, paired_difference, paired_ratio


def curve(*values, **more):
    """Points, given backwards, of which each epoch costs 10 FLOPs and the first one 3 seconds more."""
    return {
        epoch: {"cost/epochs": epoch, "cost/flops": 10.0 * epoch, "cost/device_seconds": 2.0 * epoch + 3}
        | ({} if value is None else {"knn/top1": value})
        | more
        for epoch, value in reversed(list(enumerate(values, 1)))
    }


@pytest.mark.parametrize(
    ("values", "target", "expected"),
    [
        ((0.1, 0.5, 0.3, 0.6), 0.5, 2),  # reached exactly, and lost again
        ((0.1, 0.5, 0.3, 0.6), 0.55, 3 + 0.25 / 0.3),
        ((0.1, 0.5, 0.3, 0.6), 0.2, 1.25),
        ((0.1, 0.5, 0.5, 0.5), 0.5, 2),  # a plateau at the target
        ((0.5, 0.4, 0.5), 0.5, 1),
        ((0.7, 0.8), 0.5, 1),  # there at the first point already
        ((0.1, 0.5), 0.6, None),
        ((None, 0.5), 0.4, 2),
        ((None, 0.2, None, 0.6), 0.4, 3),  # evaluated every second epoch
        ((math.nan, 0.5), 0.4, 2),
        ((0.2, math.nan, 0.6), 0.4, 2),
        ((0.2, math.inf), 0.4, None),
        ((None,), 0.0, None),
        ((), 0.0, None),
    ],
)
def test_cost_to_reach_is_where_the_curve_first_crosses(values, target, expected):
    reached = pytest.approx(expected) if expected is not None else None
    assert cost_to_reach(curve(*values), target) == reached
    for cost, line in (("cost/flops", lambda e: 10 * e), ("cost/device_seconds", lambda e: 2 * e + 3)):
        assert cost_to_reach(curve(*values), target, cost) == (pytest.approx(line(expected)) if expected else None)


def test_a_level_reached_at_the_first_point_has_a_bound_for_a_cost():
    def at(points, target):
        found = crossing(points, target, "cost/epochs", "knn/top1")
        return found and (found.cost, found.at_most)

    points = curve(0.5, 0.4, 0.7)
    assert [at(points, target) for target in (0.3, 0.5, 0.7, 0.8)] == [(1, True), (1, True), (3, False), None]
    assert at(curve(None, 0.5, 0.6), 0.4) == (2, True) and at(curve(0.5), 0.5) == (1, True)
    assert at(curve(None, None, 0.6), 0.4) == (3, False)  # measured at the end only: the cost is that of the run


def test_cost_to_reach_passes_over_points_without_the_cost():
    points = curve(0.2, 0.4, 0.6)
    del points[2]["cost/flops"]
    assert cost_to_reach(points, 0.4, "cost/flops") == 20
    assert cost_to_reach(points, 0.4, "cost/seconds") is None


@pytest.mark.parametrize("seed", range(5))
def test_a_higher_target_never_costs_less_and_epochs_stay_in_the_run(seed):
    gen = np.random.default_rng(seed)
    for _ in range(50):
        points = curve(*gen.uniform(0, 1, gen.integers(1, 8)))
        costs = [cost_to_reach(points, target) for target in np.linspace(0, 1, 41)]
        reached = [cost for cost in costs if cost is not None]
        assert costs[: len(reached)] == reached == sorted(reached)
        assert all(1 <= cost <= len(points) for cost in reached)


@pytest.mark.parametrize("level", [0.9, 0.95])
@pytest.mark.parametrize("count", [2, 5])
def test_paired_difference_is_scipy_s(count, level):
    gen = np.random.default_rng(count)
    theirs = gen.uniform(0.5, 0.9, count)
    ours = theirs + gen.normal(0.05, 0.02, count)
    expected = stats.ttest_rel(ours, theirs).confidence_interval(level)
    got = paired_difference(ours.tolist(), theirs.tolist(), level)
    assert got == pytest.approx((np.mean(ours - theirs), expected.low, expected.high), rel=1e-9)


@pytest.mark.parametrize("function", [paired_difference, paired_ratio])
def test_runs_that_are_no_pairs_are_refused(function):
    with pytest.raises(ValueError, match="cannot be paired"):
        function([0.1, 0.2], [0.1, 0.2, 0.3])


def values(estimate):
    return estimate.value, estimate.low, estimate.high


def test_the_bootstrap_of_two_and_three_seeds_by_hand():
    assert paired_ratio([6.0], [2.0]) == Estimate(pytest.approx(3.0))
    # Ratios 2 and 8: a quarter of the resamples is (2, 2), a quarter (8, 8), the rest has the mean 4.
    assert values(paired_ratio([4, 8], [2, 1])) == pytest.approx((4, 2, 8))
    assert values(paired_ratio([4, 8], [2, 1], level=0.4)) == pytest.approx((4, 4, 4))  # 30% are in each half's middle
    # Ratios 1, 2 and 4: 1 in 27 is all 1, which is more than 2.5% and less than 5%; 3 in 27 have the mean of (1, 1, 2).
    assert values(paired_ratio([1, 2, 4], [1, 1, 1])) == pytest.approx((2, 1, 4))
    for pairs in (2, 3, 4):
        assert paired_ratio(list(range(1, pairs + 1)), [1] * pairs).is_range is (pairs < 4)
    assert not paired_ratio([1, 2, 4], [1, 1, 1], level=0.9).is_range and not paired_ratio([6.0], [2.0]).is_range
    assert values(paired_ratio([1, 2, 4], [1, 1, 1], level=0.9)) == pytest.approx((2, 2 ** (1 / 3), 4 / 2 ** (1 / 3)))


@pytest.mark.parametrize("count", [2, 3, 4, 5, 7])
def test_the_order_of_seeds_does_not_matter_and_swapping_gives_the_reciprocal(count):
    gen = np.random.default_rng(count)
    above, below = gen.uniform(1, 9, (2, count))
    found = paired_ratio(above, below)
    assert found.low <= found.value <= found.high and found.low < found.high
    for order in itertools.islice(itertools.permutations(range(count)), 0, None, 7):
        assert paired_ratio(above[list(order)], below[list(order)]) == found
    swapped = paired_ratio(below, above)
    near = 1e-9 if count <= 5 else 0.03  # drawn resamples are not mirrored
    assert values(swapped) == pytest.approx((1 / found.value, 1 / found.high, 1 / found.low), rel=near)


def test_many_seeds_give_nearly_the_interval_of_the_normal_law():
    logs = np.random.default_rng(0).normal(0.5, 0.3, 60)
    found = paired_ratio(np.exp(logs), np.ones(60))
    half = 1.96 * logs.std() / math.sqrt(60)
    assert np.log(values(found)) == pytest.approx([logs.mean(), logs.mean() - half, logs.mean() + half], abs=0.01)


def test_a_ratio_takes_positive_values():
    with pytest.raises(ValueError, match="positive"):
        paired_ratio([1.0, 0.0], [1.0, 1.0])
