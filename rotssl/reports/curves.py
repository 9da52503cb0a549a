"""What curves say: the cost of reaching a level."""

import math
from dataclasses import dataclass

from rotssl.runs.journal import Points


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
