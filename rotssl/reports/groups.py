"""Grouping of recorded runs into cells: the fields that differ between cells, their names, and the baseline of each cell.

The runs of a cell differ only in seed and budget (``train.epochs``). Each budget is a separate run with its own schedule.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rotssl.config import NOT_IDENTITY
from rotssl.config.fields import ConfigError, nearest
from rotssl.config.methods import METHODS
from rotssl.config.tasks import TASKS as REGISTRY
from rotssl.runs import health
from rotssl.tracking.reader import TrackedRun

TASKS = tuple(sorted(REGISTRY))
# Fields that affect what is measured, not what is trained.
_NOT_COMPARED = (*NOT_IDENTITY, "train.seed", "train.epochs", "evaluation.knn_every", "evaluation.linear")
# Fields that determine others; a field that follows from one of them is not an axis.
_ANCHORS = ("method.name", "data.name", "encoder.name")
AUTO = "auto"
_FOLLOWS_BUDGET = ("method.", "optim.")  # such as a warm-up that is a share of the run
# Fields that ``auto`` derives from others.
_FOLLOWS_TASK = {f"{task}.{leaf}": of for task in TASKS for leaf, of in REGISTRY[task].config.FOLLOWS.items()}

Params = dict[str, str | None]


@dataclass(frozen=True)
class LeftOut:
    """A run that is not compared, and why."""

    run: TrackedRun
    reason: str


@dataclass(frozen=True)
class Variant:
    """Complete runs of one configuration.

    Attributes:
        family: everything except the auxiliary tasks, in words: ``byol``, ``byol, lr 0.12``.
        variant: its auxiliary tasks, in words: ``plain``, ``rotation weight 0.3``.
        axes: the fields that differ between cells, and their values here.
        params: all compared fields of one of its runs.
        runs: budget in epochs -> seed -> run.
    """

    family: str
    variant: str
    axes: Params
    params: Params
    runs: Mapping[int, Mapping[int, TrackedRun]]

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of the auxiliary tasks, by which variants are sorted."""
        return tuple(_weight(self.params, task) for task in TASKS)


@dataclass(frozen=True)
class Conditions:
    """The fields that make a cell the baseline of the cells that agree with it in all others.

    Attributes:
        fields: field -> canonical value.
        given: whether the user specified them.
    """

    fields: Mapping[str, str]
    given: bool

    def __str__(self) -> str:
        return ", ".join(f"{key}={shown(value)}" for key, value in self.fields.items())

    @property
    def free(self) -> set[str]:
        """The sections in which a cell may differ from its baseline."""
        sections = {key.split(".")[0] for key in self.fields} | {"tasks"}
        return sections | ({"optim"} if "method.name" in self.fields else set())


def canonical(value: str) -> str:
    """A canonical text, equal for equal numbers such as ``1`` and ``1.0``."""
    try:
        return repr(float(value))
    except ValueError:
        return value


def shown(value: str | None) -> str:
    """A canonical value in readable form."""
    if value is None:
        return "not set"
    try:
        return f"{float(value):.10g}"
    except ValueError:
        return value.lower() if value in ("True", "False", "None") else value


def budget_of(run: TrackedRun) -> int:
    """The number of epochs that a run was configured for."""
    return int(run.params["train.epochs"])


def seed_of(run: TrackedRun) -> int:
    """The seed of a run."""
    return int(run.params["train.seed"])


def active(params: Mapping[str, str]) -> Params:
    """The fields that may separate cells, in canonical form, without those of inactive tasks."""
    kept: Params = {f"{task}.weight": canonical("0") for task in TASKS}  # older runs don't know the newer tasks
    kept |= {key: canonical(value) for key, value in params.items() if not key.startswith(_NOT_COMPARED)}
    return {key: value for key, value in kept.items() if _matters(key, kept)}


def _matters(key: str, fields: Params) -> bool:
    """Whether a field has an effect on such a run; fields of an inactive task have none."""
    section, _, leaf = key.partition(".")
    if leaf == "weight" or section not in (*TASKS, "tasks"):
        return True
    if leaf == "share" and fields.get(f"{section}.weight") != AUTO:
        return False
    return any(_weight(fields, task) > 0 for task in TASKS if section in (task, "tasks"))


def _weight(params: Mapping[str, str | None], task: str) -> float:
    """The weight of a task; infinite if its share sets it."""
    weight = params.get(f"{task}.weight") or "0"
    return math.inf if weight == AUTO else float(weight)


def sift(
    records: Iterable[TrackedRun], metric: str, supervised: bool = False
) -> tuple[list[TrackedRun], list[LeftOut]]:
    """Complete runs, and the others with the reason; sweeps and evaluations are in neither list.

    Of several complete runs with the same configuration, budget and seed, only the oldest counts.

    Args:
        records: runs of the tracking store.
        metric: metric that a complete run has at its last epoch.
        supervised: whether runs of a method that learns from labels count; they have no place in a ranking.
    """
    used: dict[tuple[object, ...], TrackedRun] = {}
    left: list[LeftOut] = []
    runs = [run for run in records if run.tags.get("kind") not in ("sweep", "evaluation")]
    for run in sorted(runs, key=lambda run: (run.started, run.run_id)):
        apart = run.params.get("method.name") in METHODS.unlisted and not supervised
        reason = "it learns from labels: see jobs/analyze.py" if apart else _why_not(run, metric)
        if reason is None:
            params = active(run.params)
            first = used.setdefault((tuple(sorted(params.items())), budget_of(run), seed_of(run)), run)
            reason = None if first is run else f"the same configuration and seed as {first.name}, which is older"
        if reason is not None:
            left.append(LeftOut(run, reason))
    return list(used.values()), left


def _why_not(run: TrackedRun, metric: str) -> str | None:
    if not all(run.params.get(key, "").isdecimal() for key in ("train.epochs", "train.seed")):
        return "not a pretraining run"
    budget, done, why = budget_of(run), max(run.points, default=0), run.tags.get("status_reason", "")
    if not (set(range(1, budget + 1)) <= set(run.points) or (run.status == "FINISHED" and done == budget)):
        at = f"at epoch {done} of {budget}"
        known = f": {why}" if why else ""
        return {
            "FAILED": f"failed {at}{known}",
            "KILLED": f"interrupted {at}" if why == "interrupted" else f"stopped {at}{known}",
            "FINISHED": f"incomplete in MLflow: its last point is {at}",
        }.get(run.status, f"still running, {at}")
    value = run.points[budget].get(metric)
    if value is None or not math.isfinite(value):
        return f"no {metric} at the last epoch"
    return health.ill(run.points) or None


def axes_of(params: Sequence[tuple[Params, int]]) -> list[str]:
    """The fields that separate cells: those that differ and do not merely follow from method, data or encoder.

    A field of the method or the optimizer that follows from one of these together with the budget (for example a warm-up that is
    a share of the run) does not separate cells either, because it is constant within a budget. Fields of the auxiliary tasks
    always separate cells, except those that ``auto`` derived from others.

    Args:
        params: active fields and budget of each run.
    """
    keys = sorted({key for fields, _ in params for key in fields})
    varying = [key for key in keys if len({fields.get(key) for fields, _ in params if _matters(key, fields)}) > 1]

    def follows(key: str, anchors: Sequence[str], with_budget: bool) -> bool:
        seen: dict[object, str | None] = {}
        for fields, budget in params:
            origin = *(fields.get(anchor) for anchor in anchors), budget if with_budget else 0
            if seen.setdefault(origin, fields.get(key)) != fields.get(key):
                return False
        return True

    return [
        key
        for key in varying
        if key in _ANCHORS
        or (key.split(".")[0] in TASKS and key not in _FOLLOWS_TASK)
        or not any(
            follows(key, anchors, with_budget)
            for anchors in ([_FOLLOWS_TASK[key]] if key in _FOLLOWS_TASK else [(anchor,) for anchor in _ANCHORS])
            for with_budget in ((False, True) if key.startswith(_FOLLOWS_BUDGET) else (False,))
        )
    ]


def _given(asked: Collection[str], params: Sequence[tuple[Params, int]]) -> list[str] | None:
    """The fields varied by a sweep that differ between runs; None if runs that agree in them differ in others."""
    axes = [key for key in sorted(asked) if len({fields.get(key) for fields, _ in params if _matters(key, fields)}) > 1]
    seen: dict[object, Params] = {}
    for fields, budget in params:
        if seen.setdefault((budget, *map(fields.get, axes)), fields) != fields:
            return None
    return axes


def cells_of(runs: Sequence[TrackedRun], asked: Collection[str] | None = None) -> list[Variant]:
    """The cells of complete runs, in an order that depends only on their content: plain first, weights ascending.

    Args:
        runs: complete runs, no two with the same configuration, budget and seed.
        asked: the fields varied by their sweep. Without them, or if they do not distinguish all runs (for example because the
            sweep was changed), the separating fields are inferred from the runs (``axes_of``).
    """
    known = [(active(run.params), budget_of(run)) for run in runs]
    axes = _given(asked, known) if asked is not None else None
    axes = axes_of(known) if axes is None else axes
    grouped: dict[tuple[str | None, ...], list[tuple[TrackedRun, Params]]] = {}
    for run, (fields, _) in zip(runs, known, strict=True):
        grouped.setdefault(tuple(fields.get(axis) for axis in axes), []).append((run, fields))
    cells: list[Variant] = []
    for key, members in grouped.items():
        by_budget: dict[int, dict[int, TrackedRun]] = {}
        for run, _ in sorted(members, key=lambda member: seed_of(member[0])):
            by_budget.setdefault(budget_of(run), {})[seed_of(run)] = run
        values = dict(zip(axes, key, strict=True))
        params = min((fields for _, fields in members), key=lambda fields: sorted(map(str, fields.items())))
        family, variant = _family(values, params), _variant(values, params)
        cells.append(Variant(family, variant, values, params, dict(sorted(by_budget.items()))))

    def place(cell: Variant) -> tuple[object, ...]:
        outer = [_sortable(cell.axes[axis]) for axis in axes if outside(axis)]
        return cell.params.get("method.name") or "", outer, cell.weights, cell.variant

    return sorted(cells, key=place)


def _sortable(value: str | None) -> tuple[float, str]:
    try:
        return float(value or "inf"), ""
    except ValueError:
        return math.inf, value or ""


def outside(key: str) -> bool:
    """Whether a field belongs to no auxiliary task."""
    return key.split(".")[0] not in (*TASKS, "tasks")


def _family(values: Params, params: Params) -> str:
    parts = [params.get("method.name") or "unknown method"]
    outer = [axis for axis in values if outside(axis) and axis != "method.name"]
    leaves = [axis.split(".")[1] for axis in outer]
    for axis, leaf in zip(outer, leaves, strict=True):
        name = "" if axis in _ANCHORS else f"{leaf if leaves.count(leaf) == 1 else axis} "
        parts.append(name + shown(values[axis]))
    return ", ".join(parts)


def _variant(values: Params, params: Params) -> str:
    parts = []
    for task in TASKS:
        if _weight(params, task) > 0:
            size = "share" if params[f"{task}.weight"] == AUTO else "weight"
            words = [f"{task} {size} {shown(params.get(f'{task}.{size}'))}"]
            told = f"{task}.weight", f"{task}.share"
            others = [axis for axis in values if axis.startswith(f"{task}.") and axis not in told]
            words += [f"{axis.split('.')[1]} {shown(values[axis])}" for axis in others if values[axis] is not None]
            parts.append(", ".join(words))
    if not parts:
        return "plain"
    shared = [f"{axis.split('.')[1]} {shown(values[axis])}" for axis in values if axis.startswith("tasks.")]
    return ", ".join([" + ".join(parts), *shared])


def conditions(text: str | None, cells: Sequence[Variant]) -> Conditions:
    """The conditions of a baseline: those given by the user as ``key=value,key=value``, or all auxiliary weights 0.

    Raises:
        ConfigError: the text is malformed, a field is unknown, or no cell has these values.
    """
    if text is None:
        return Conditions({f"{task}.weight": canonical("0") for task in TASKS}, given=False)
    fields: dict[str, str] = {}
    known = {key for cell in cells for key in cell.params}
    for part in re.split(r",(?=[\w.]+=)", text):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not value:
            raise ConfigError(f"--baseline: got {text!r}, expected key=value,key=value such as rotation.weight=0")
        if key not in known:
            raise ConfigError(f"--baseline: got {key!r}, expected a field of the compared runs{nearest(key, known)}")
        fields[key] = canonical(
            {"true": "True", "false": "False", "null": "None", "none": "None"}.get(value.lower(), value)
        )
    found = Conditions(fields, given=True)
    if not any(_fulfils(cell, found) for cell in cells):
        values = {key: sorted({shown(cell.params.get(key)) for cell in cells}) for key in found.fields}
        there = "; ".join(f"{key} is {', '.join(value)}" for key, value in values.items())
        raise ConfigError(f"--baseline: no complete run has {found}; in the complete runs, {there}")
    return found


def _fulfils(cell: Variant, wanted: Conditions) -> bool:
    return all(cell.params.get(key) == value for key, value in wanted.fields.items())


def baseline_of(cell: Variant, cells: Sequence[Variant], wanted: Conditions) -> tuple[Variant | None, str]:
    """The only cell that fulfils the conditions and otherwise agrees with this one, or None and the reason."""

    def fixed(other: Variant) -> Params:
        return {key: value for key, value in other.axes.items() if key.split(".")[0] not in wanted.free}

    candidates = [other for other in cells if _fulfils(other, wanted)]
    matching = [other for other in candidates if fixed(other) == fixed(cell)]
    if len(matching) == 1:
        return matching[0], ""
    if len(matching) > 1:
        names = "; ".join(other.variant for other in matching)
        return None, f"{len(matching)} configurations have {wanted} and are otherwise equal: {names}"
    return None, f"no complete run with {wanted} has the same {', '.join(fixed(cell)) or 'other fields'}"
