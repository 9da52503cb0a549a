"""A comparison in words: the recommendations, the facts that the runs share, and warnings."""

import datetime
from collections import Counter
from collections.abc import Iterable, Sequence

from rotssl.reports.comparison import Comparison, Fit, Recommendation, Row
from rotssl.reports.groups import LeftOut, Variant, seed_of
from rotssl.reports.reach import Reach
from rotssl.reports.tables import COST_NAMES, amount, name_of, percent, points, target_of, times
from rotssl.tracking.reader import TrackedRun

_PROTOCOLS = {"knn/top1": "knn_protocol", "linear/top1": "linear_protocol"}
# Tag or field -> its name among the facts.
_FACTS = {
    "data.name": "data",
    "encoder.name": "encoder",
    "knn_k": "kNN neighbours",
    "device": "device",
    "world_size": "workers",
    "precision": "precision",
    "evaluation_precision": "precision of the evaluation",
    "git_commit": "git commit",
}
SWITCHED_OFF = "switched_off"
LABELS = "labels_in_pretraining"
_TIMING = ("device", "world_size", "precision")


def headline(found: Comparison, choice: Recommendation) -> tuple[list[str], list[str]]:
    """The recommendation in sentences; the second list holds those that depend on measured time."""
    best, second, metric = choice.best, choice.second, name_of(found.metric)
    start = f"{choice.family}, {best.budget} epochs: "
    if second is None and choice.ranking.unranked:
        return [f"{start}too few shared seeds to rank {best.variant} against the others.", _unranked(choice)], []
    if second is None:
        score = f"{metric} {percent(choice.ranking.means[0])}"
        return [f"{start}only {best.variant} has complete runs ({score}), so there is no choice to make."], []
    lines, timed = [start + _choice(choice, metric)], list[str]()
    if choice.ranking.unranked:
        lines.append(_unranked(choice))
    if best.is_baseline:
        if choice.separated:
            lines.append(
                "The auxiliary tasks do not help here."
                if not found.baseline.given
                else "No variant beats the baseline."
            )
        return lines, timed
    if best.baseline is None or best.gain is None:
        return [*lines, f"The gain cannot be stated: {best.remark}."], timed
    base = _base_name(best)
    # If the runner-up is the baseline, over the same seeds, its lead has been stated above.
    if best.baseline != (second.family, second.variant) or best.paired != choice.ranking.seeds:
        gain = f"{best.variant} gains {points(best.gain)} points over {base} ({_seed_count(len(best.paired))})"
        open_ = best.gain.low is not None and best.gain.low <= 0
        lines.append(gain + ("; the interval includes 0, so the gain is not established." if open_ else "."))
    for cost, reach in (best.reach or {}).items():
        (timed if "seconds" in cost else lines).append(_saving(best, cost, reach, target_of(found)))
    for cost, fits in found.equal.items():
        fitting = [fit for fit in fits if (fit.baseline, fit.budget) == (best.baseline, best.budget) and fit.final]
        (timed if "seconds" in cost else lines).append(_equal(cost, fitting))
    return lines, timed


def _unranked(choice: Recommendation) -> str:
    of = f"of {choice.ranking.total} seeds" if choice.ranking.total > 1 else "of 1 seed"
    return f"not ranked: {', '.join(f'{variant} ({count} {of})' for variant, count in choice.ranking.unranked)}."


def _equal(cost: str, fits: Sequence[Fit]) -> str:
    """The best variant at equal cost, by its gain over the baseline: a mean over incomplete seeds depends on which are left."""
    (best,) = (fit for fit in fits if fit.is_baseline)  # it fits itself
    every = len(best.paired)
    others = [fit for fit in fits if not fit.is_baseline and fit.gain is not None]
    most = max((len(fit.paired) for fit in others), default=0)
    for fit in others:
        if len(fit.paired) == most and fit.gain is not None and best.gain is not None:
            best = fit if fit.gain.value > best.gain.value else best  # the first of equals
    assert best.mean is not None
    gained = "the baseline itself" if best.is_baseline else f"{best.variant}, with {best.fitting} epochs"
    more = "" if best.is_baseline else f", {points(best.gain)} points"
    some = f", over {len(best.paired)} of {every} seeds" if len(best.paired) < every else ""
    limit = f"the {COST_NAMES[cost]} of {best.budget} baseline epochs ({amount(best.limit, cost)})"
    return f"With {limit}, the best is {gained}: {percent(best.mean)}{more}{some}."


def _seed_count(count: int) -> str:
    return f"{count} paired seeds" if count > 1 else "one seed"


def _base_name(row: Row) -> str:
    assert row.baseline is not None
    return row.baseline[1] if row.baseline[0] == row.family else ", ".join(row.baseline)


def _choice(choice: Recommendation, metric: str) -> str:
    best, second, lead, ranking = choice.best, choice.second, choice.lead, choice.ranking
    assert second is not None and lead is not None
    few = len(ranking.seeds) < ranking.total
    score = f"{metric} {percent(ranking.means[0])}"
    score += f" over the {len(ranking.seeds)} of {ranking.total} seeds that all ranked variants have" if few else ""
    count = _seed_count(len(ranking.seeds))
    if choice.separated:
        ahead = f"It leads the next best, {second.variant}, by {points(lead)} points ({count})."
        return f"take {best.variant} ({score}). {ahead}"
    less = f"; of the two, {choice.cheaper} needs fewer FLOPs" if choice.cheaper else ""
    if lead.value == 0 and not lead.low:
        return f"{best.variant} ({score}) and {second.variant} are equal ({count}){less}."
    single = f"a single seed has {'all' if few else 'both'}: "
    why = f"{single if lead.low is None else ''}difference {points(lead)} points"
    why += "" if lead.low is None else f", {count}"
    return (
        f"{best.variant} has the best mean ({score}), but the seeds do not separate it from {second.variant} "
        f"({percent(ranking.means[1])}; {why}){less}."
    )


def _saving(row: Row, cost: str, reach: Reach, target: str) -> str:
    head = f"Speed-up in {COST_NAMES[cost]} to {target}: "
    if reach.ours is not None and reach.theirs is not None:
        if reach.speed_up is None:
            return head + "unknown, because both reach it by their first measured epoch."
        ours, theirs = (
            ("at most " if at_most else "") + amount(value, cost)
            for value, at_most in ((reach.ours, reach.at_most), (reach.theirs, reach.baseline_at_most))
        )
        return head + f"{times(reach.speed_up, reach.bound)}, {ours} instead of {theirs}."
    if reach.ours is None:
        return head + f"not reached ({reach.reached} of {len(row.paired)} seeds reach it)."
    return head + f"the baseline does not reach it ({reach.baseline_reached} of {len(row.paired)} seeds do)."


def facts(
    cells: Sequence[Variant], metric: str, left_out: Sequence[LeftOut] = ()
) -> tuple[list[tuple[str, str]], list[str]]:
    """The facts that the runs share, as (name, value), and warnings about those that they should share but do not."""
    runs = [run for cell in cells for by_seed in cell.runs.values() for run in by_seed.values()]
    protocol = _PROTOCOLS.get(metric, "protocol")
    rows = [("measure", f"{name_of(metric)} on validation, last epoch: {_values(runs, protocol)}")]
    rows.append(("seeds", ", ".join(map(str, sorted({seed_of(run) for run in runs})))))
    rows += [(label, _values(runs, key)) for key, label in _FACTS.items()]
    days = sorted(datetime.datetime.fromtimestamp(run.started / 1000, datetime.UTC).date() for run in runs)
    rows.append(("started", f"{days[0]}" if days[0] == days[-1] else f"{days[0]} to {days[-1]}"))
    warnings = []
    if len(_counts(runs, protocol)) > 1:
        warnings.append("The runs were not all measured with the same protocol: their accuracies cannot be compared.")
    if len(_counts(runs, "evaluation_precision")) > 1:
        warnings.append(
            "The encoders were measured in different precision, which moves an accuracy by about 0.1 points."
        )
    mixed = [_FACTS[key] for key in _TIMING if len(_counts(runs, key)) > 1]
    if mixed:
        warnings.append(f"The runs differ in {', '.join(mixed)}: their times may not be comparable.")
    warnings = labels_used(runs) + warnings + switched_off(runs)
    stopped = sum(entry.run.tags.get("status_reason", "").startswith("stopped by ") for entry in left_out)
    if stopped:
        whose = "runs were stopped early by a scheduler; their variants are"
        whose = whose if stopped > 1 else "run was stopped early by a scheduler; its variant is"
        warnings.append(f"{stopped} {whose} represented by the seeds that ran to the end.")
    return rows, warnings


def switched_off(runs: Sequence[TrackedRun]) -> list[str]:
    """A warning if the guard switched off a task of some runs; empty if of none."""
    off = Counter(run.tags[SWITCHED_OFF] for run in runs if SWITCHED_OFF in run.tags)
    if not off:
        return []
    return [f"In {sum(off.values())} of {len(runs)} runs a task was switched off: {next(iter(off))}."]


def labels_used(runs: Sequence[TrackedRun]) -> list[str]:
    """A warning if labels changed the training of some runs; empty if of none."""
    told = Counter(run.tags[LABELS] for run in runs if LABELS in run.tags)
    if not told:
        return []
    return [f"LABELS WERE USED IN PRETRAINING in {sum(told.values())} of {len(runs)} runs: {'; '.join(sorted(told))}."]


def _counts(runs: Iterable[TrackedRun], key: str) -> Counter[str]:
    return Counter(run.tags.get(key) or run.params.get(key) or "not recorded" for run in runs)


def _values(runs: Iterable[TrackedRun], key: str) -> str:
    found = _counts(runs, key)
    short = {value: value[:12] if key == "git_commit" else value for value in found}
    if len(found) == 1:
        return short[next(iter(found))]
    return "; ".join(f"{short[value]} ({count} runs)" for value, count in sorted(found.items()))
