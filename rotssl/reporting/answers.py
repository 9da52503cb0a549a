"""A comparison in words: what to take and why, what the runs share, and what to be careful about."""

import datetime
from collections import Counter
from collections.abc import Iterable, Sequence

from rotssl.journal import RunRecord
from rotssl.reporting.cells import Cell, seed_of
from rotssl.reporting.comparison import Comparison, Fit, Reach, Recommendation, Row
from rotssl.reporting.sheets import COST_NAMES, amount, name_of, percent, points, target_of, times

_PROTOCOLS = {"knn/top1": "knn_protocol", "linear/top1": "linear_protocol"}
# Tag or field -> how it is called among the facts.
_FACTS = {
    "data.name": "data",
    "encoder.name": "encoder",
    "knn_k": "neighbours of kNN",
    "device": "device",
    "world_size": "workers",
    "precision": "precision",
    "git_commit": "git commit",
}
_TIMING = ("device", "world_size", "precision")


def headline(found: Comparison, choice: Recommendation) -> tuple[list[str], list[str]]:
    """What to take and why, in sentences; the second list is what depends on measured time."""
    best, second, metric = choice.best, choice.second, name_of(found.metric)
    assert best.final is not None
    start = f"{choice.family}, {best.budget} epochs: "
    if second is None:
        only = f"{best.variant} alone has complete runs ({metric} {percent(best.final.mean)}), so there is nothing to choose."
        return [start + only], []
    lines, timed = [start + _choice(choice, metric)], list[str]()
    if best.is_baseline:
        if choice.separated:
            lines.append(
                "The auxiliary tasks do not help here."
                if not found.baseline.given
                else "No variant beats the baseline."
            )
        return lines, timed
    if best.baseline is None or best.gain is None:
        return [*lines, f"There is no gain to state: {best.remark}."], timed
    base = _base_name(best)
    if best.baseline != (second.family, second.variant):  # else it has been said
        gain = f"{best.variant} gains {points(best.gain)} points over {base} ({_seed_count(len(best.paired))})"
        open_ = best.gain.low is not None and best.gain.low <= 0
        lines.append(gain + ("; the interval includes 0, so the gain is not established." if open_ else "."))
    for cost, reach in (best.reach or {}).items():
        (timed if "seconds" in cost else lines).append(_saving(best, cost, reach, target_of(found)))
    for cost, fits in found.equal.items():
        fitting = [fit for fit in fits if (fit.baseline, fit.budget) == (best.baseline, best.budget) and fit.final]
        (timed if "seconds" in cost else lines).append(_equal(cost, fitting))
    return lines, timed


def _equal(cost: str, fits: Sequence[Fit]) -> str:
    best = max(fits, key=lambda fit: fit.final.mean if fit.final else 0)  # the baseline fits itself, so there is one
    assert best.final is not None
    is_base = best.baseline == (best.family, best.variant)
    gained = "the baseline itself" if is_base else f"{best.variant}, with {best.fitting} epochs"
    more = "" if is_base else f", {points(best.gain)} points"
    limit = f"the {COST_NAMES[cost]} of {best.budget} epochs of the baseline ({amount(best.limit, cost)})"
    return f"With {limit}, the best is {gained}: {percent(best.final.mean)}{more}."


def _seed_count(count: int) -> str:
    return f"{count} paired seeds" if count > 1 else "one seed"


def _base_name(row: Row) -> str:
    assert row.baseline is not None
    return row.baseline[1] if row.baseline[0] == row.family else ", ".join(row.baseline)


def _choice(choice: Recommendation, metric: str) -> str:
    best, second, lead = choice.best, choice.second, choice.lead
    assert best.final is not None and second is not None and second.final is not None
    score = f"{metric} {percent(best.final.mean)}"
    count = _seed_count(len(set(best.final.seeds) & set(second.final.seeds)))
    if choice.separated:
        ahead = f"It leads the next best, {second.variant}, by {points(lead)} points ({count})."
        return f"take {best.variant} ({score}). {ahead}"
    if lead is None:
        why = "no seed has both"
    elif lead.low is None:
        why = f"a single seed has both: difference {100 * lead.value:+.1f} points"
    else:
        why = f"difference {points(lead)} points, {count}"
    less = f"; of the two, {choice.cheaper} takes fewer FLOPs" if choice.cheaper else ""
    return (
        f"{best.variant} has the best mean ({score}), but the seeds do not separate it from {second.variant} "
        f"({percent(second.final.mean)}; {why}){less}."
    )


def _saving(row: Row, cost: str, reach: Reach, target: str) -> str:
    head = f"Speed-up in {COST_NAMES[cost]} to {target}: "
    if reach.speed_up is not None and reach.ours is not None and reach.theirs is not None:
        return head + f"{times(reach.speed_up)}, {amount(reach.ours, cost)} in place of {amount(reach.theirs, cost)}."
    if reach.ours is None:
        return head + f"not reached ({reach.reached} of {len(row.paired)} seeds reach it)."
    return head + f"the baseline does not reach it ({reach.baseline_reached} of {len(row.paired)} seeds do)."


def facts(cells: Sequence[Cell], metric: str) -> tuple[list[tuple[str, str]], list[str]]:
    """What the runs share, as (name, value), and warnings about what they should share but don't."""
    runs = [run for cell in cells for by_seed in cell.runs.values() for run in by_seed.values()]
    protocol = _PROTOCOLS.get(metric, "protocol")
    rows = [("measure", f"{name_of(metric)} on validation, last epoch: {_values(runs, protocol)}")]
    rows.append(("seeds", ", ".join(map(str, sorted({seed_of(run) for run in runs})))))
    rows += [(label, _values(runs, key)) for key, label in _FACTS.items()]
    days = sorted(datetime.datetime.fromtimestamp(run.started / 1000, datetime.UTC).date() for run in runs)
    rows.append(("started", f"{days[0]}" if days[0] == days[-1] else f"{days[0]} to {days[-1]}"))
    warnings = []
    if len(_counts(runs, protocol)) > 1:
        warnings.append("The runs were not all measured by the same protocol: their accuracies cannot be compared.")
    mixed = [_FACTS[key] for key in _TIMING if len(_counts(runs, key)) > 1]
    if mixed:
        warnings.append(f"The runs differ in {', '.join(mixed)}: compare their times with care.")
    return rows, warnings


def _counts(runs: Iterable[RunRecord], key: str) -> Counter[str]:
    return Counter(run.tags.get(key) or run.params.get(key) or "not recorded" for run in runs)


def _values(runs: Iterable[RunRecord], key: str) -> str:
    found = _counts(runs, key)
    short = {value: value[:12] if key == "git_commit" else value for value in found}
    if len(found) == 1:
        return short[next(iter(found))]
    return "; ".join(f"{short[value]} ({count} runs)" for value, count in sorted(found.items()))
