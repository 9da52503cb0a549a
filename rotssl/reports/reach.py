"""The cost of reaching a level of accuracy, over paired seeds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rotssl.reports.curves import Crossing, crossing
from rotssl.reports.statistics import Estimate, paired_ratio
from rotssl.tracking.reader import TrackedRun

COSTS = ("epochs", "flops", "device_seconds")

Ways = Mapping[int, TrackedRun]  # budget -> run, of one seed


@dataclass(frozen=True)
class Reach:
    """The cost of reaching the target, over the paired seeds.

    Attributes:
        ours: mean cost of the variant, or None if a seed never reaches the target.
        theirs: mean cost of the baseline, likewise.
        reached: number of seeds in which the variant reaches the target.
        baseline_reached: number of seeds in which the baseline does.
        speed_up: baseline's cost over ours, if both reach the target in every seed and ``bound`` is not ``none``.
        budgets: budgets of the runs that the variant's costs come from, one per seed.
        bound: ``at least`` or ``at most`` if the speed-up is a bound of the true one, because one side has reached the target by
            its first measured epoch in any seed; ``none`` if both have, so that there is no ratio; else None.
        at_most: whether our cost is an upper bound.
        baseline_at_most: whether the baseline's cost is an upper bound.
    """

    ours: float | None
    theirs: float | None
    reached: int
    baseline_reached: int
    speed_up: Estimate | None
    budgets: tuple[int, ...]
    bound: str | None = None
    at_most: bool = False
    baseline_at_most: bool = False


def last_point(run: TrackedRun) -> Mapping[str, float]:
    """The metrics of a run's last epoch."""
    return run.points[max(run.points)]


def has_cost(run: TrackedRun, cost: str) -> bool:
    """Whether a run recorded its cost in this unit."""
    return last_point(run).get(f"cost/{cost}", 0) > 0


def mean_of(values: Iterable[float]) -> float:
    """The mean, independent of the order of the values."""
    values = list(values)
    return math.fsum(values) / len(values)


def reaches(pairs: Sequence[tuple[Ways, Ways]], levels: Sequence[float], metric: str) -> dict[str, Reach]:
    """The cost of reaching each seed's level, by unit; units that some run lacks are left out.

    Args:
        pairs: for each seed, our runs and the baseline's.
        levels: level of each seed.
        metric: name of the metric, a fraction; larger is better.
    """
    everything = [run for pair in pairs for ways in pair for run in ways.values()]
    return {
        cost: _reach(pairs, levels, cost, metric) for cost in COSTS if all(has_cost(run, cost) for run in everything)
    }


def _reach(pairs: Sequence[tuple[Ways, Ways]], levels: Sequence[float], cost: str, metric: str) -> Reach:
    """The cost of reaching each seed's level by the cheapest of its runs, ours and the baseline's."""

    def cheapest(ways: Ways, level: float) -> tuple[Crossing, int] | None:
        found = {budget: crossing(run.points, level, f"cost/{cost}", metric) for budget, run in ways.items()}
        there = [(at.cost, budget) for budget, at in found.items() if at is not None]
        if not there:
            return None
        # If the cost of any run is an upper bound, that run may have been the cheapest.
        return Crossing(min(there)[0], any(at is not None and at.at_most for at in found.values())), min(there)[1]

    ours = [cheapest(mine, level) for (mine, _), level in zip(pairs, levels, strict=True)]
    theirs = [cheapest(base, level) for (_, base), level in zip(pairs, levels, strict=True)]
    we, they = ([value[0].cost for value in side if value is not None] for side in (ours, theirs))
    everywhere = len(we) == len(they) == len(pairs)
    ends = [any(value is not None and value[0].at_most for value in side) for side in (ours, theirs)]
    bound = {(True, True): "none", (True, False): "at least", (False, True): "at most"}.get((ends[0], ends[1]))
    return Reach(
        ours=mean_of(we) if len(we) == len(pairs) else None,
        theirs=mean_of(they) if len(they) == len(pairs) else None,
        reached=len(we),
        baseline_reached=len(they),
        speed_up=paired_ratio(they, we) if everywhere and bound != "none" else None,
        budgets=tuple(value[1] for value in ours if value is not None),
        bound=bound if everywhere else None,
        at_most=ends[0],
        baseline_at_most=ends[1],
    )
