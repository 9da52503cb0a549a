"""Differences and ratios between paired seeds, with their intervals."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

_ENUMERATED = 5  # seeds; they have 5^5 = 3125 resamples

_RESAMPLES = 20000


@dataclass(frozen=True)
class Estimate:
    """A number over paired seeds with the ends of its interval, which a single seed does not have.

    Attributes:
        value: the number.
        low: lower end.
        high: upper end.
        is_range: whether the ends are the lowest and highest seed, because there are too few seeds for an interval.
    """

    value: float
    low: float | None = None
    high: float | None = None
    is_range: bool = False


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of the differences between pairs, and the ends of its Student t interval.

    Args:
        ours: one value per seed, at least two.
        theirs: values of the same seeds in the same order.
        level: confidence level.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} values cannot be paired with {len(theirs)}")
    difference = np.subtract(ours, theirs)
    mean, error = float(difference.mean()), float(stats.sem(difference))
    half = float(stats.t.ppf((1 + level) / 2, len(difference) - 1)) * error
    return mean, mean - half, mean + half


def paired_ratio(above: Sequence[float], below: Sequence[float], level: float = 0.95) -> Estimate:
    """Geometric mean of the ratios of pairs, and its percentile bootstrap interval.

    For up to five pairs all resamples are enumerated (for two or three, each is likelier than 2.5%, so the 95% interval is the
    range of the ratios); for more, 20,000 are drawn with a fixed seed. The order of the pairs does not matter, and swapping
    the arguments gives the reciprocals (approximately, if resamples are drawn).

    Args:
        above: one positive value per seed, at least one.
        below: values of the same seeds in the same order.
        level: confidence level.

    Raises:
        ValueError: there are no pairs, or a value is not positive.
    """
    if len(above) != len(below) or len(above) == 0:
        raise ValueError(f"{len(above)} values cannot be paired with {len(below)}")
    if min(*above, *below) <= 0:
        raise ValueError("expected positive values for a ratio")
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
    # If a resample of one repeated pair is likelier than the tail, the ends are the lowest and the highest ratio.
    return Estimate(value, math.exp(low), math.exp(high), is_range=count**-count > tail)
