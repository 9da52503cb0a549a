"""The tables of a comparison as text, shared by the terminal and the page."""

from collections.abc import Sequence
from dataclasses import dataclass

from rotssl.reports.comparison import Comparison, Final, Fit, Row
from rotssl.reports.groups import LeftOut, budget_of, seed_of
from rotssl.reports.reach import COSTS, Reach
from rotssl.reports.statistics import Estimate

COST_NAMES = {"epochs": "epochs", "flops": "FLOPs", "device_seconds": "device time"}
METRIC_NAMES = {
    "knn/top1": "kNN top-1",
    "linear/top1": "linear probe top-1",
    "test/knn/top1": "kNN top-1 on test",
    "test/linear/top1": "linear probe top-1 on test",
}

_AT_MOST = "\u2264"  # before a cost that is an upper bound
SHARED_MACHINE = (
    "Trials that share a machine slow each other down and so increase each other's device time; FLOPs are not affected."
)


@dataclass(frozen=True)
class Table:
    """A table of text, whose cells may have several lines.

    Attributes:
        title: title in a few words.
        caption: how to read the table.
        headers: one per column.
        rows: one text per column; the first ``names`` columns hold names, the others numbers.
        names: number of columns that hold names.
    """

    title: str
    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1


def is_remark(text: str) -> bool:
    """Whether a cell of a numeric column holds words, which may be wrapped."""
    return max(map(len, text.split("\n"))) > 28


def percent(value: float) -> str:
    """A fraction in percent: 73.1%."""
    return f"{100 * value:.1f}%"


def points(estimate: Estimate | None) -> str:
    """A difference of fractions in percentage points, with its interval if any: +6.1 (+1.2 to +11.0)."""
    if estimate is None:
        return ""
    if estimate.low is None or estimate.high is None:
        return f"{_signed(estimate.value)} (one seed)"
    return f"{_signed(estimate.value)} ({_signed(estimate.low)} to {_signed(estimate.high)})"


def _signed(difference: float) -> str:
    return f"{round(100 * difference, 1) + 0.0:+.1f}"  # adding 0 turns -0.0 into +0.0


def times(estimate: Estimate, bound: str | None = None) -> str:
    """A ratio with its interval if any: 2.5x (2.0 to 3.3), at least 2.5x (range 2.0 to 3.3)."""
    value = f"{bound} {estimate.value:.2f}x" if bound else f"{estimate.value:.2f}x"
    if estimate.low is None or estimate.high is None:
        return f"{value} (one seed)"
    return f"{value} ({'range ' if estimate.is_range else ''}{estimate.low:.2f} to {estimate.high:.2f})"


def amount(value: float, cost: str) -> str:
    """A cost with its unit: 7.3, 1.27 PFLOP, 43 s, 3.4 h."""
    size, unit = scale(value, cost)
    return _number(value / size, cost) + ("" if cost == "epochs" else f" {unit}")


def scale(largest: float, cost: str) -> tuple[float, str]:
    """The size and the name of the unit for costs up to this one."""
    sizes = [(1.0, "s"), (60.0, "min"), (3600.0, "h")]
    if cost == "flops":
        sizes = [(1.0, "FLOP"), (1e9, "GFLOP"), (1e12, "TFLOP"), (1e15, "PFLOP"), (1e18, "EFLOP")]
    elif cost == "epochs":
        return 1.0, "epochs"
    least = 1 if cost == "flops" else 2  # 100 s rather than 1.67 min
    return max(size for size in sizes if size[0] <= max(largest / least, 1.0))


def name_of(metric: str) -> str:
    """The readable name of a metric."""
    return METRIC_NAMES.get(metric, metric)


def target_of(found: Comparison) -> str:
    """The level that runs should reach, in words."""
    return f"{percent(found.target)}" if found.target is not None else "the baseline's final accuracy"


# --- tables --------------------------------------------------------------------------------------------------------------------


def tables_of(found: Comparison) -> list[Table]:
    """All tables of a comparison."""
    metric, target, own = name_of(found.metric), target_of(found), found.target is None
    budgets = sorted({row.budget for row in found.rows})
    several = len({cell.family for cell in found.cells}) > 1
    tables = []
    for budget in budgets:
        rows = [row for row in found.rows if row.budget == budget]
        tables.append(_budget_table(budget, rows, several, metric, "its own final accuracy" if own else target, own))
    if len(budgets) > 1:
        tables.append(_cheapest_table(found, several, target))
    tables += [_equal_table(cost, fits, several, metric) for cost, fits in found.equal.items() if fits]
    if found.left_out:
        tables.append(_left_table(found.left_out))
    return tables


def _name(row: Row | Fit, several: bool) -> str:
    return f"{row.family}, {row.variant}" if several else row.variant


def _seeds(row: Row) -> str:
    count = len(row.paired) if row.paired else len(row.final.seeds) if row.final else 0
    lost = f"\nwithout {', '.join(map(str, row.missing))}" if row.missing else ""
    return f"{count}{lost}"


def _accuracy(final: Final | None) -> str:
    if final is None:
        return ""
    spread = f"\n{100 * final.low:.1f} to {100 * final.high:.1f}" if len(final.seeds) > 1 else ""
    return percent(final.mean) + spread


def _stacked(text: str) -> str:
    """An estimate with its interval on a separate line, because the columns are narrow."""
    text = text.replace("at least ", "at least\n").replace("at most ", "at most\n")
    return text.replace(" (range ", ", range\n(").replace(" (", "\n(")


def _reaches(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells for the cost of reaching the target, one column per cost."""
    heads, columns = [], []
    for cost in COSTS:
        found = [(row, (row.reach or {}).get(cost)) for row in rows]
        if any(reach is not None for _, reach in found):
            largest = max(
                (side or 0.0 for _, reach in found if reach for side in (reach.ours, reach.theirs)), default=0.0
            )
            size, unit = scale(largest, cost)
            heads.append(f"speed-up,\n{COST_NAMES[cost]}" + (f"\n({unit})" if cost != "epochs" else ""))
            columns.append([_reach(row, reach, cost, size) for row, reach in found])
    return heads, [list(cells) for cells in zip(*columns, strict=True)] if columns else [[] for _ in rows]


def _reach(row: Row, reach: Reach | None, cost: str, size: float) -> str:
    if reach is None:
        return ""
    count = len(row.paired)
    own = "" if reach.ours is None else _AT_MOST * reach.at_most + _number(reach.ours / size, cost)
    if reach.ours is None:
        return f"not reached\n{reach.reached} of {count} seeds"
    if row.is_baseline:
        return own
    if reach.theirs is not None:
        head = "both by their first\nmeasured epoch" if reach.speed_up is None else times(reach.speed_up, reach.bound)
        theirs = _AT_MOST * reach.baseline_at_most + _number(reach.theirs / size, cost)
        return f"{_stacked(head)}\n{own} vs {theirs}"
    return f"{own} vs\nnot reached\n{reach.baseline_reached} of {count} seeds"


def _number(value: float, cost: str) -> str:
    return f"{value:.1f}" if cost == "epochs" else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _speed_up(target: str, own: bool, rows: Sequence[Row]) -> str:
    reaching = (
        f"{target}, divided by the variant's" if not own else f"{target}, divided by the variant's cost of the same"
    )
    text = (
        f"Speed-up: the baseline's cost of reaching {reaching}, with a 95% interval (for two or three seeds: the range); "
        "below it, the variant's cost vs the baseline's."
    )
    found = [reach for row in rows for reach in (row.reach or {}).values()]
    if any(reach.at_most or reach.baseline_at_most for reach in found):
        text += f" {_AT_MOST}: already reached at the first measured epoch; the true cost may be lower, the speed-up is a bound."
    return text


def _budget_table(budget: int, rows: Sequence[Row], several: bool, metric: str, target: str, own: bool) -> Table:
    heads, costs = _reaches(rows)
    lines = []
    for row, cells in zip(rows, costs, strict=True):
        gain = "baseline" if row.is_baseline else _stacked(points(row.gain)) or row.remark
        lines.append([_name(row, several), _seeds(row), _accuracy(row.final), gain, *cells])
    caption = f"Runs of {budget} epochs with their full schedule, against the baseline with the same length and seeds. "
    if heads:
        caption += _speed_up(target, own, rows)
    elif any(row.paired for row in rows):
        caption += f"{metric} was measured only at the end of the runs, so the cost of reaching a level is unknown."
    names = ["variant", "seeds", f"{metric}\nmean, range", "gain, points\n(95% interval)"]
    return Table(f"{budget} epochs", caption.strip(), [*names, *heads], lines)


def _cheapest_table(found: Comparison, several: bool, target: str) -> Table:
    heads, costs = _reaches(found.cheapest)
    lines = []
    for row, cells in zip(found.cheapest, costs, strict=True):
        used = sorted({budget for reach in (row.reach or {}).values() for budget in reach.budgets})
        lines.append([_name(row, several), _seeds(row), row.remark or ", ".join(map(str, used)) or "none", *cells])
    own = found.target is None
    caption = (
        "The cheapest run of any length, for the variant and for the baseline. "
        + _speed_up("the final accuracy of its longest runs" if own else target, own, found.cheapest)
        + " Only seeds for which both have runs of every length count."
    )
    names = ["variant", "seeds", "epochs of\nthese runs"]
    return Table("Cheapest run over all lengths", caption, [*names, *heads], lines)


def _equal_table(cost: str, fits: Sequence[Fit], several: bool, metric: str) -> Table:
    budgets = sorted({fit.budget for fit in fits})
    grouped: dict[str, dict[int, str]] = {}
    for fit in fits:
        text = "none fits"
        if fit.final is not None:
            gained = "baseline" if fit.is_baseline else points(fit.gain)
            text = f"{percent(fit.final.mean)} in {fit.fitting} epochs\n{gained}"
        grouped.setdefault(_name(fit, several), {})[fit.budget] = text
    rows = [[name, *(cells.get(budget, "") for budget in budgets)] for name, cells in grouped.items()]
    limits = {budget: {amount(fit.limit, cost) for fit in fits if fit.budget == budget} for budget in budgets}
    heads = [
        f"{COST_NAMES[cost]} of {budget}\nbaseline epochs" + (f": {texts.pop()}" if len(texts) == 1 else "")
        for budget, texts in limits.items()
    ]
    caption = (
        f"{metric} at the end of the longest complete runs that take no more {COST_NAMES[cost]} than the baseline "
        "(tolerance 1%), and their gain in points (95% interval). A longer run cut off in mid-schedule would not be comparable."
    )
    if cost == "device_seconds":
        caption += f" {SHARED_MACHINE}"
    return Table(f"Accuracy at equal {COST_NAMES[cost]}", caption, ["variant", *heads], rows)


def _left_table(left: Sequence[LeftOut]) -> Table:
    rows = []
    for entry in left:
        known = "train.epochs" in entry.run.params and entry.reason != "not a pretraining run"
        facts = [str(seed_of(entry.run)), str(budget_of(entry.run))] if known else ["", ""]
        rows.append([entry.run.name, entry.reason, *facts])
    caption = "Only runs that completed their full schedule and did neither collapse nor diverge are counted above."
    return Table("Left out", caption, ["run", "why", "seed", "epochs"], rows, 2)
