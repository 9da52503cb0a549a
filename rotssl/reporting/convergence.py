"""What curves say: the cost of reaching a level, and differences between paired seeds."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from rotssl.journal import Points


def cost_to_reach(points: Points, target: float, cost: str = "cost/epochs", metric: str = "knn/top1") -> float | None:
    """The cost at the first recorded epoch whose metric is at least the target, or None where it never is.

    Args:
        points: of one run.
        target: level of the metric.
        cost: ``cost/epochs``, ``cost/train_seconds``, ``cost/device_seconds`` or ``cost/flops``.
        metric: the larger, the better.
    """
    for epoch in sorted(points):
        if points[epoch].get(metric, float("-inf")) >= target:
            return points[epoch][cost]
    return None


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
