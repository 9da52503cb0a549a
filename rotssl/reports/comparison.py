"""The numbers of a comparison: the gain and the savings of each variant over its baseline, and which variant to use.

Results depend only on the runs, not on their order. Costs are called ``epochs``, ``device_seconds`` and ``flops``; every value
that depends on measured time is stored under a key or in a field with ``seconds`` in its name.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from rotssl.reports.curves import measured
from rotssl.reports.groups import Conditions, LeftOut, Variant, baseline_of
from rotssl.reports.ranking import Ranking, rank
from rotssl.reports.reach import COSTS, Reach, has_cost, last_point, mean_of, reaches
from rotssl.reports.statistics import Estimate, paired_difference
from rotssl.tracking.reader import TrackedRun

SLACK = 0.01  # a run may exceed the given cost by this share

Match = Callable[[Variant], tuple[Variant | None, str]]


@dataclass(frozen=True)
class Final:
    """Accuracy at the last epoch over seeds, as fractions."""

    mean: float
    low: float
    high: float
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """A cell at one budget, or over all its budgets, against its baseline there.

    Attributes:
        family: of the cell.
        variant: of the cell.
        budget: in epochs; over all budgets: the baseline's longest, whose final accuracy is the target.
        final: over all complete seeds; None over all budgets.
        cost: mean total cost of a run; None over all budgets.
        baseline: the baseline's family and variant, or None.
        remark: why there is no baseline or no number.
        paired: seeds that both have.
        missing: seeds that only one of them has.
        gain: gain over the baseline, as a fraction.
        reach: by cost; None if the metric was measured only at the end of the runs.
    """

    family: str
    variant: str
    budget: int
    final: Final | None = None
    cost: Mapping[str, float] | None = None
    baseline: tuple[str, str] | None = None
    remark: str = ""
    paired: tuple[int, ...] = ()
    missing: tuple[int, ...] = ()
    gain: Estimate | None = None
    reach: Mapping[str, Reach] | None = None

    @property
    def is_baseline(self) -> bool:
        """Whether the cell is its own baseline."""
        return self.baseline == (self.family, self.variant)


@dataclass(frozen=True)
class Fit:
    """The longest runs of a variant that fit into the total cost of its baseline at one budget.

    Attributes:
        family: of the cell.
        variant: of the cell.
        baseline: its baseline's family and variant.
        budget: the baseline's, in epochs.
        limit: the baseline's mean total cost.
        fitting: the variant's budget that fits, or None.
        final: its accuracy over seeds.
        gain: gain over the baseline, over the seeds that both have.
        paired: these seeds.
        mean: accuracy over these seeds.
    """

    family: str
    variant: str
    baseline: tuple[str, str]
    budget: int
    limit: float
    fitting: int | None = None
    final: Final | None = None
    gain: Estimate | None = None
    paired: tuple[int, ...] = ()
    mean: float | None = None

    @property
    def is_baseline(self) -> bool:
        """Whether the cell is its own baseline."""
        return self.baseline == (self.family, self.variant)


@dataclass(frozen=True)
class Recommendation:
    """The recommended variant of a family, at its longest budget.

    Attributes:
        family: of the cells.
        best: row with the highest mean over the seeds that all ranked rows share.
        second: row with the second highest, or None.
        ranking: of all variants of the family at this budget.
        lead: of the best over the second, over the shared seeds.
        separated: whether the lead's interval is above 0.
        cheaper: which of the two needs fewer FLOPs; None if they need the same or were not counted.
    """

    family: str
    best: Row
    second: Row | None
    ranking: Ranking
    lead: Estimate | None = None
    separated: bool = False
    cheaper: str | None = None


@dataclass(frozen=True)
class Comparison:
    """The complete result of a comparison."""

    metric: str
    target: float | None
    baseline: Conditions
    cells: Sequence[Variant]
    rows: Sequence[Row]
    cheapest: Sequence[Row]
    equal: Mapping[str, Sequence[Fit]]
    recommendations: Sequence[Recommendation]
    left_out: Sequence[LeftOut]


def compare_cells(
    cells: Sequence[Variant], left_out: Sequence[LeftOut], wanted: Conditions, metric: str, target: float | None = None
) -> Comparison:
    """Compare cells with their baselines.

    Args:
        cells: cells in display order.
        left_out: runs that are not compared.
        wanted: conditions that a baseline fulfils.
        metric: name of the metric, a fraction; larger is better.
        target: level to reach; None: the final value of the baseline with the same seed and budget.
    """

    def match(cell: Variant) -> tuple[Variant | None, str]:
        return baseline_of(cell, cells, wanted)

    rows = [_row(cell, budget, match, metric, target) for cell in cells for budget in cell.runs]
    costs = [cost for cost in COSTS[1:] if all(has_cost(run, cost) for run in _runs(cells))]
    return Comparison(
        metric=metric,
        target=target,
        baseline=wanted,
        cells=cells,
        rows=rows,
        cheapest=[_cheapest(cell, match, metric, target) for cell in cells],
        equal={cost: [fit for cell in cells for fit in _fits(cell, match, metric, cost)] for cost in costs},
        recommendations=_recommend(cells, rows, metric),
        left_out=sorted(left_out, key=lambda entry: (entry.run.name, entry.reason, entry.run.run_id)),
    )


def _runs(cells: Iterable[Variant]) -> Iterable[TrackedRun]:
    return (run for cell in cells for by_seed in cell.runs.values() for run in by_seed.values())


def _final(runs: Mapping[int, TrackedRun], metric: str) -> Final:
    values = [last_point(run)[metric] for run in runs.values()]
    return Final(mean_of(values), min(values), max(values), tuple(sorted(runs)))


def gain(ours: Mapping[int, TrackedRun], theirs: Mapping[int, TrackedRun], metric: str) -> Estimate | None:
    """Mean difference of the final metric over the seeds that both have; None if there are none."""
    pairs = sorted(
        (last_point(ours[seed])[metric], last_point(theirs[seed])[metric]) for seed in ours.keys() & theirs.keys()
    )
    if len(pairs) < 2:
        return Estimate(pairs[0][0] - pairs[0][1]) if pairs else None
    return Estimate(*paired_difference([a for a, _ in pairs], [b for _, b in pairs]))


def _row(cell: Variant, budget: int, match: Match, metric: str, target: float | None) -> Row:
    ours = cell.runs[budget]
    cost = {
        key: mean_of(last_point(run)[f"cost/{key}"] for run in ours.values()) for key in COSTS if _all_have(ours, key)
    }
    row = Row(cell.family, cell.variant, budget, _final(ours, metric), cost)
    base, why = match(cell)
    if base is None:
        return replace(row, remark=why)
    theirs = base.runs.get(budget, {})
    name, paired = (base.family, base.variant), sorted(ours.keys() & theirs.keys())
    missing = tuple(sorted(ours.keys() ^ theirs.keys()))
    if not paired:
        remark = f"{base.variant} has no complete run of {budget} epochs" + (" with these seeds" if theirs else "")
        return replace(row, baseline=name, remark=remark, missing=missing)
    levels = [last_point(theirs[seed])[metric] if target is None else target for seed in paired]
    pairs = [({budget: ours[seed]}, {budget: theirs[seed]}) for seed in paired]
    # A run that was measured only at its end does not show when it reached a level.
    seen = all(measured(run.points, metric) for pair in pairs for ways in pair for run in ways.values())
    return replace(
        row,
        baseline=name,
        paired=tuple(paired),
        missing=missing,
        gain=gain(ours, theirs, metric),
        reach=reaches(pairs, levels, metric) if seen else None,
    )


def _all_have(runs: Mapping[int, TrackedRun], cost: str) -> bool:
    return all(has_cost(run, cost) for run in runs.values())


def _cheapest(cell: Variant, match: Match, metric: str, target: float | None) -> Row:
    """The row over all budgets; only seeds with runs of every budget on both sides count, since a lost run is not a slow one."""
    base, why = match(cell)
    if base is None:
        return Row(cell.family, cell.variant, max(cell.runs), remark=why)
    name, longest = (base.family, base.variant), max(base.runs)
    row = Row(cell.family, cell.variant, longest, baseline=name)
    ours, theirs = (set.intersection(*(set(runs) for runs in side.runs.values())) for side in (cell, base))
    paired = sorted(ours & theirs)
    if not paired:
        return replace(row, remark="no seed has runs of every budget on both sides")
    levels = [last_point(base.runs[longest][seed])[metric] if target is None else target for seed in paired]
    pairs = [
        ({b: runs[seed] for b, runs in cell.runs.items()}, {b: runs[seed] for b, runs in base.runs.items()})
        for seed in paired
    ]
    seeds = {seed for side in (cell, base) for runs in side.runs.values() for seed in runs}
    missing = tuple(sorted(seeds - set(paired)))
    return replace(row, paired=tuple(paired), missing=missing, reach=reaches(pairs, levels, metric))


def _fits(cell: Variant, match: Match, metric: str, cost: str) -> list[Fit]:
    base, _ = match(cell)
    if base is None:
        return []

    def total(runs: Mapping[int, TrackedRun]) -> float:
        return mean_of(last_point(run)[f"cost/{cost}"] for run in runs.values())

    fits = []
    for budget, theirs in base.runs.items():
        limit, name = total(theirs), (base.family, base.variant)
        # The budgets are in ascending order; take the longest, whose schedule had the most room.
        fitting = [other for other, runs in cell.runs.items() if total(runs) <= limit * (1 + SLACK)]
        fit = Fit(cell.family, cell.variant, name, budget, limit)
        if fitting:
            ours = cell.runs[fitting[-1]]
            paired = tuple(sorted(ours.keys() & theirs.keys()))
            fit = replace(
                fit,
                fitting=fitting[-1],
                final=_final(ours, metric),
                gain=gain(ours, theirs, metric),
                paired=paired,
                mean=mean_of(last_point(ours[seed])[metric] for seed in paired) if paired else None,
            )
        fits.append(fit)
    return fits


def _recommend(cells: Sequence[Variant], rows: Sequence[Row], metric: str) -> list[Recommendation]:
    found = []
    for family in dict.fromkeys(cell.family for cell in cells):
        members = {cell.variant: cell for cell in cells if cell.family == family}
        counts = Counter(budget for cell in members.values() for budget in cell.runs)
        budget = max([b for b, count in counts.items() if count > 1] or counts)
        there = {row.variant: row for row in rows if row.family == family and row.budget == budget}
        # Variants are ordered plain first, weights ascending: of equal means the smaller weight wins.
        runs = {variant: cell.runs.get(budget, {}) for variant, cell in members.items()}
        finals = {
            variant: {seed: last_point(run)[metric] for seed, run in own.items()} for variant, own in runs.items()
        }
        ranking = rank(finals, [variant for variant, row in there.items() if row.is_baseline])
        best = there[ranking.order[0]]
        if len(ranking.order) == 1:
            found.append(Recommendation(family, best, None, ranking))
            continue
        second = there[ranking.order[1]]
        ours, theirs = ({seed: runs[row.variant][seed] for seed in ranking.seeds} for row in (best, second))
        lead = gain(ours, theirs, metric)
        separated = lead is not None and lead.low is not None and lead.low > 0
        found.append(Recommendation(family, best, second, ranking, lead, separated, _cheaper(best, second)))
    return found


def _cheaper(one: Row, other: Row) -> str | None:
    flops = [(row.cost or {}).get("flops") for row in (one, other)]
    if flops[0] is None or flops[1] is None or math.isclose(flops[0], flops[1], rel_tol=SLACK):
        return None
    return one.variant if flops[0] < flops[1] else other.variant
