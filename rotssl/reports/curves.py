"""The cost at which the curve of a run reaches a level."""

import math
from dataclasses import dataclass

from rotssl.runs.journal import Points


@dataclass(frozen=True)
class Crossing:
    """The point where a curve first reaches a level.

    Attributes:
        cost: cost at that point.
        at_most: whether the level was already reached at the first recorded epoch, so that the cost is an upper bound. False
            for a run that was measured only at its end, whose cost is the cost of the whole run.
    """

    cost: float
    at_most: bool


def cost_to_reach(points: Points, target: float, cost: str = "cost/epochs", metric: str = "knn/top1") -> float | None:
    """The cost at which the metric first reaches the target, or None if it never does.

    Both are interpolated linearly between recorded epochs. Epochs without the cost or a finite metric are skipped. If the target
    is already reached at the first recorded epoch, the result is that epoch's cost, an upper bound.

    Args:
        points: points of one run.
        target: level of the metric.
        cost: ``cost/epochs``, ``cost/train_seconds``, ``cost/device_seconds`` or ``cost/flops``.
        metric: name of the metric; larger is better.
    """
    found = crossing(points, target, cost, metric)
    return None if found is None else found.cost


def crossing(points: Points, target: float, cost: str, metric: str) -> Crossing | None:
    """Like cost_to_reach(), together with whether the cost is a bound."""
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
    """Whether the metric was measured during the run, not only at the end of several epochs."""
    return sum(metric in point for point in points.values()) > 1 or len(points) == 1
