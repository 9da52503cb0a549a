"""Recorded runs sorted into cells: what differs between them, how that is called, and which cell is whose baseline.

A cell holds the runs that differ in seed and budget (``train.epochs``) only. Each budget is a run with a schedule of its own.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rotssl.config import NOT_IDENTITY
from rotssl.config.fields import ConfigError, nearest
from rotssl.config.tasks import TASKS as REGISTRY
from rotssl.runs.journal import collapsed
from rotssl.tracking.reader import TrackedRun

TASKS = tuple(sorted(REGISTRY))
# What is measured, not what is trained.
_NOT_COMPARED = (*NOT_IDENTITY, "train.seed", "train.epochs", "evaluation.knn_every", "evaluation.linear")
# What other fields often follow from: those that do are no axes of their own.
_ANCHORS = ("method.name", "data.name", "encoder.name")
_FOLLOWS_BUDGET = ("method.", "optim.")  # such as a warm-up that is a share of the run
# What ``auto`` makes of others.
_FOLLOWS_TASK = {f"{task}.{leaf}": of for task in TASKS for leaf, of in REGISTRY[task].config.FOLLOWS.items()}

Params = dict[str, str | None]


@dataclass(frozen=True)
class LeftOut:
    """A run that takes no part, and why."""

    run: TrackedRun
    reason: str


@dataclass(frozen=True)
class Variant:
    """Complete runs of one configuration.

    Attributes:
        family: what the cell is apart from auxiliary tasks, in words: ``byol``, ``byol, lr 0.12``.
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
        """Of the auxiliary tasks: what variants are sorted by."""
        return tuple(_weight(self.params, task) for task in TASKS)


@dataclass(frozen=True)
class Conditions:
    """What makes a cell the baseline of those that agree with it in the rest.

    Attributes:
        fields: field -> canonical value.
        given: whether the user named them.
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
    """The same text for numbers that are equal: ``1`` and ``1.0``."""
    try:
        return repr(float(value))
    except ValueError:
        return value


def shown(value: str | None) -> str:
    """A canonical value as people write it."""
    if value is None:
        return "not set"
    try:
        return f"{float(value):.10g}"
    except ValueError:
        return value.lower() if value in ("True", "False", "None") else value


def budget_of(run: TrackedRun) -> int:
    """The epochs that a run was asked for."""
    return int(run.params["train.epochs"])


def seed_of(run: TrackedRun) -> int:
    """Its seed."""
    return int(run.params["train.seed"])


def active(params: Mapping[str, str]) -> Params:
    """The fields that may separate cells: without those of tasks that are off, in canonical form."""
    kept: Params = {f"{task}.weight": canonical("0") for task in TASKS}  # older runs don't know the newer tasks
    kept |= {key: canonical(value) for key, value in params.items() if not key.startswith(_NOT_COMPARED)}
    return {key: value for key, value in kept.items() if _matters(key, kept)}


def _matters(key: str, fields: Params) -> bool:
    """Whether a field has a meaning for such a run: those of a task don't where it is off."""
    section = key.split(".")[0]
    if key.endswith(".weight") or section not in (*TASKS, "tasks"):
        return True
    return any(_weight(fields, task) > 0 for task in TASKS if section in (task, "tasks"))


def _weight(params: Mapping[str, str | None], task: str) -> float:
    return float(params.get(f"{task}.weight") or 0)


def sift(records: Iterable[TrackedRun], metric: str) -> tuple[list[TrackedRun], list[LeftOut]]:
    """Complete runs, and the others with the reason; sweeps and evaluations are in neither.

    Of several complete runs of one configuration, budget and seed the oldest counts.

    Args:
        records: of the tracking store.
        metric: that a complete run has at its last epoch.
    """
    used: dict[tuple[object, ...], TrackedRun] = {}
    left: list[LeftOut] = []
    runs = [run for run in records if run.tags.get("kind") not in ("sweep", "evaluation")]
    for run in sorted(runs, key=lambda run: (run.started, run.run_id)):
        reason = _why_not(run, metric)
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
    return collapsed(run.points)


def axes_of(params: Sequence[tuple[Params, int]]) -> list[str]:
    """The fields that separate cells: those that differ and don't merely follow from method, data or encoder.

    A field of the method or the optimizer that follows from one of these and the budget together (a warm-up that is a share of
    the run, say) doesn't separate either, for within a budget it tells nothing apart. Those of the auxiliary tasks always do, but
    for one that is as ``auto`` makes it of others.

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


def _given(asked: Collection[str], params: Sequence[tuple[Params, int]], seeds: Sequence[int]) -> list[str] | None:
    """Of the fields that a sweep varied, those that differ; None where they do not tell all runs apart."""
    axes = [key for key in sorted(asked) if len({fields.get(key) for fields, _ in params if _matters(key, fields)}) > 1]
    told = {(seed, budget, *map(fields.get, axes)) for (fields, budget), seed in zip(params, seeds, strict=True)}
    return axes if len(told) == len(params) else None


def cells_of(runs: Sequence[TrackedRun], asked: Collection[str] | None = None) -> list[Variant]:
    """The cells of complete runs, in an order that depends on what they are: plain first, weights ascending.

    Args:
        runs: of which no two have one configuration, budget and seed.
        asked: the fields that their sweep varied. Without it, or where it does not tell all runs apart (those of a sweep
            that was changed, say), the runs must show what separates them (``axes_of``).
    """
    known = [(active(run.params), budget_of(run)) for run in runs]
    axes = _given(asked, known, [seed_of(run) for run in runs]) if asked is not None else None
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
            words = [f"{task} weight {shown(params[f'{task}.weight'])}"]
            others = [axis for axis in values if axis.startswith(f"{task}.") and not axis.endswith(".weight")]
            words += [f"{axis.split('.')[1]} {shown(values[axis])}" for axis in others if values[axis] is not None]
            parts.append(", ".join(words))
    if not parts:
        return "plain"
    shared = [f"{axis.split('.')[1]} {shown(values[axis])}" for axis in values if axis.startswith("tasks.")]
    return ", ".join([" + ".join(parts), *shared])


def conditions(text: str | None, cells: Sequence[Variant]) -> Conditions:
    """What makes a cell a baseline: as the user says, ``key=value,key=value``, or all auxiliary weights 0.

    Raises:
        ConfigError: no such form, no such field, or no cell with these values.
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
            raise ConfigError(f"--baseline: the runs have no field {key!r} to compare{nearest(key, known)}")
        fields[key] = canonical(
            {"true": "True", "false": "False", "null": "None", "none": "None"}.get(value.lower(), value)
        )
    found = Conditions(fields, given=True)
    if not any(_fulfils(cell, found) for cell in cells):
        values = {key: sorted({shown(cell.params.get(key)) for cell in cells}) for key in found.fields}
        there = "; ".join(f"{key} is {', '.join(value)}" for key, value in values.items())
        raise ConfigError(f"--baseline: no complete run has {found}; in the complete runs {there}")
    return found


def _fulfils(cell: Variant, wanted: Conditions) -> bool:
    return all(cell.params.get(key) == value for key, value in wanted.fields.items())


def baseline_of(cell: Variant, cells: Sequence[Variant], wanted: Conditions) -> tuple[Variant | None, str]:
    """The one cell that fulfils the conditions and agrees with this one in all sections but theirs; or None and why."""

    def fixed(other: Variant) -> Params:
        return {key: value for key, value in other.axes.items() if key.split(".")[0] not in wanted.free}

    candidates = [other for other in cells if _fulfils(other, wanted)]
    matching = [other for other in candidates if fixed(other) == fixed(cell)]
    if len(matching) == 1:
        return matching[0], ""
    if len(matching) > 1:
        names = "; ".join(other.variant for other in matching)
        return None, f"{len(matching)} configurations have {wanted} and agree in the rest: {names}"
    return None, f"no complete run with {wanted} agrees in {', '.join(fixed(cell)) or 'the rest'}"
