"""What curves say: the cost of reaching a level, and differences and ratios between paired seeds."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from rotssl.runs.journal import Points

_ENUMERATED = 5  # so many seeds have 5^5 = 3125 resamples
_RESAMPLES = 20000


@dataclass(frozen=True)
class Estimate:
    """A number over paired seeds and the ends of its interval, which a single seed does not have.

    Attributes:
        value: the number.
        low: lower end.
        high: upper end.
        is_range: whether the ends are those of the seeds themselves: so few seeds show no more.
    """

    value: float
    low: float | None = None
    high: float | None = None
    is_range: bool = False


@dataclass(frozen=True)
class Crossing:
    """Where a curve first is at a level.

    Attributes:
        cost: there.
        at_most: whether it was there by its first recorded epoch already, so that the cost is an upper bound. Not so for a run
            that was measured at its end only: it is taken as a whole, and costs what it costs.
    """

    cost: float
    at_most: bool


def cost_to_reach(points: Points, target: float, cost: str = "cost/epochs", metric: str = "knn/top1") -> float | None:
    """The cost at which the metric first is at the target, or None where it never is.

    Between two recorded epochs both are taken as linear. Epochs without the metric or the cost, or where the metric is not
    finite, are passed over. A run that is there at its first recorded epoch already gets that epoch's cost, an upper bound.

    Args:
        points: of one run.
        target: level of the metric.
        cost: ``cost/epochs``, ``cost/train_seconds``, ``cost/device_seconds`` or ``cost/flops``.
        metric: the larger, the better.
    """
    found = crossing(points, target, cost, metric)
    return None if found is None else found.cost


def crossing(points: Points, target: float, cost: str, metric: str) -> Crossing | None:
    """The same as cost_to_reach(), with a word on whether it is a bound."""
    before: tuple[float, float] | None = None
    for _, point in sorted(points.items()):
        value = point.get(metric, math.nan)
        if not math.isfinite(value) or cost not in point:
            continue
        if value >= target:
            if before is None or value == target:
                return Crossing(point[cost], before is None and measured(points, metric))
            share = (target - before[0]) / (value - before[0])
            return Crossing(before[1] + share * (point[cost] - before[1]), False)
        before = value, point[cost]
    return None


def measured(points: Points, metric: str) -> bool:
    """Whether the metric was measured within a run, and not at the end of several epochs only."""
    return sum(metric in point for point in points.values()) > 1 or len(points) == 1


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of the differences between pairs, and the ends of its Student t interval.

    Args:
        ours: one value a seed, at least two.
        theirs: the same seeds in the same order.
        level: of confidence.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} values cannot be paired with {len(theirs)}")
    difference = np.subtract(ours, theirs)
    mean, error = float(difference.mean()), float(stats.sem(difference))
    half = float(stats.t.ppf((1 + level) / 2, len(difference) - 1)) * error
    return mean, mean - half, mean + half


def paired_ratio(above: Sequence[float], below: Sequence[float], level: float = 0.95) -> Estimate:
    """Geometric mean of the ratios of pairs, and its percentile bootstrap interval.

    All resamples of up to five pairs are enumerated (of two or three, each is likelier than 2.5%, so that the 95% interval is the
    range of the ratios); beyond, 20,000 are drawn with a fixed seed. The order of the pairs does not matter, and
    swapping the arguments gives the reciprocals (where resamples are drawn, nearly).

    Args:
        above: one positive value a seed, at least one.
        below: the same seeds in the same order.
        level: of confidence.

    Raises:
        ValueError: no pairs, or values that are not positive.
    """
    if len(above) != len(below) or len(above) == 0:
        raise ValueError(f"{len(above)} values cannot be paired with {len(below)}")
    if min(*above, *below) <= 0:
        raise ValueError("a ratio takes positive values")
    logs, count = np.sort(np.log(above) - np.log(below)), len(above)
    value = math.exp(float(logs.mean()))
    if count == 1:
        return Estimate(value)
    if count <= _ENUMERATED:
        chosen = np.array(list(itertools.product(range(count), repeat=count)))
    else:
        chosen = np.random.default_rng(0).integers(count, size=(_RESAMPLES, count))
    means, tail = logs[chosen].mean(axis=1), (1 - level) / 2
    low = float(np.quantile(means, tail, method="inverted_cdf"))
    high = -float(np.quantile(-means, tail, method="inverted_cdf"))
    # The resample that is one pair throughout is likelier than the tail: the ends are the lowest and the highest ratio.
    return Estimate(value, math.exp(low), math.exp(high), is_range=count**-count > tail)
