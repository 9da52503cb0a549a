"""The plan of gain.py, gain_plan.yaml: its stages, and the cells that each of them needs."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gain_cells import Cell
from gain_steps import Steps, length

from rotssl.config.methods import METHODS
from rotssl.config.recipes import read_yaml
from rotssl.config.tasks import TaskSections

PLAIN = "plain"
METRICS = {"kNN": "knn/top1", "linear": "linear/top1"}
_TASKS = tuple(f.name for f in dataclasses.fields(TaskSections))

Content = Mapping[str, Any]


@dataclass(frozen=True)
class Halving:
    """Successive halving of each data set and method: the best share by the mean of kNN and linear goes on, and plain.

    Attributes:
        epochs: budgets, in plain epochs.
        keep: the share.
    """

    epochs: Sequence[int]
    keep: float


@dataclass(frozen=True)
class Stage:
    """A part of the study.

    Attributes:
        name: its key in the plan.
        data: names of data sets, as in Cell.
        methods: names of methods.
        forms: names of forms.
        seeds: seeds of each form.
        question: what it answers.
        grid: field -> values; their product, for every form. Fields of tasks do not apply to plain.
        factors: as ``grid``, times the field of ``base``, or the method's default (only optim.lr).
        variants: method -> name -> fields: further variants, beside the product.
        fields: fields of all its cells.
        base: whether the plan's ``base`` applies, or the stage's own.
        epochs: length of the plain runs.
        halving: instead of ``epochs``.
        final: whether it trains on all training images and is measured on the test split.
        equal: ``compute``: a form whose step takes r plain ones gets 1 / r of the epochs; or ``epochs``.
        curve: kNN is measured every so many epochs, 0: only at the end; by default every epoch in final stages.
        kept_of: label of a form: which share of its mean gain do the other forms have?
    """

    name: str
    data: Sequence[str]
    methods: Sequence[str]
    forms: Sequence[str]
    seeds: Sequence[int]
    question: str = ""
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    factors: Mapping[str, Sequence[float]] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    base: bool | Mapping[str, Mapping[str, Any]] = True
    epochs: int = 0
    halving: Halving | None = None
    final: bool = False
    equal: str = "compute"
    curve: int | None = None
    kept_of: str = ""

    @property
    def budgets(self) -> Sequence[int]:
        """Lengths of the plain runs, first to last."""
        return self.halving.epochs if self.halving else [self.epochs]

    @property
    def part(self) -> str:
        """What the stage's own fields leave of the data: ``, 5120 images at 24 pixels``; empty if all."""
        limit, side = (self.fields.get(f"data.{name}") for name in ("limit", "image_size"))
        return (f", {limit} images" if limit else "") + (f" at {side} pixels" if side else "")


@dataclass(frozen=True)
class Candidate:
    """A form of a method on a data set, with the values that the stage varies.

    Attributes:
        data: the data set.
        method: the method.
        form: key of the plan's forms.
        label: the form and what is varied; part of the cells' names.
        reference: label of the plain runs that it is compared with.
        fields: all that the plan says of it.
    """

    data: str
    method: str
    form: str
    label: str
    reference: str
    fields: Mapping[str, Any] = field(hash=False)


@dataclass(frozen=True)
class Row:
    """The runs of a candidate at a budget.

    Attributes:
        stage: their stage.
        candidate: what is run.
        budget: length of the plain runs, in epochs.
        ratio: seconds of a step over plain's; None: not timed.
        cells: one per seed; none if the length is not known.
    """

    stage: Stage
    candidate: Candidate
    budget: int
    ratio: float | None
    cells: tuple[Cell, ...]


class Results:
    """The cells that were run, in a folder; each is read once.

    Args:
        folder: with ``cells/``, a JSON file per cell, and ``steps.json``.
        common: fields of all runs.
    """

    def __init__(self, folder: Path, common: Mapping[str, Any]) -> None:
        self.folder, self.cells, self.common = folder, folder / "cells", common
        self.steps = Steps(folder / "steps.json")
        self._known: dict[str, Content] = {}

    def read(self, cell: Cell) -> Content | None:
        """The content of a cell's file, with epochs as numbers; None if it was not run.

        Raises:
            SystemExit: it was run with other fields than the plan's.
        """
        path = self.cells / f"{cell.name}.json"
        if cell.name not in self._known and path.exists():
            content = json.loads(path.read_text())
            content["points"] = {int(epoch): point for epoch, point in content["points"].items()}
            self._known[cell.name] = content
        content = self._known.get(cell.name)
        if content is not None and not same(
            {**content["common"], **content["fields"]}, {**self.common, **cell.fields}, cell.epochs
        ):
            raise SystemExit(f"{path} has other fields than the plan: name the form anew, or remove the file")
        return content

    def score(self, row: Row) -> float:
        """Mean of kNN and linear over the seeds; the lowest of all if a run failed."""
        found = [last(self.read(cell) or {}).get(key, math.nan) for cell in row.cells for key in METRICS.values()]
        mean = sum(found) / len(found)
        return -math.inf if math.isnan(mean) else mean


class Plan:
    """A plan.

    Args:
        path: of the YAML file.

    Raises:
        SystemExit: it has an unknown key, or two cells with one name.
    """

    def __init__(self, path: Path) -> None:
        content = read_yaml(path)
        self.common: dict[str, Any] = content.get("common") or {}
        self.base: dict[str, dict[str, Any]] = content.get("base") or {}
        self.forms: dict[str, dict[str, Any]] = content["forms"]
        self.defaults: list[str] = content.get("defaults") or []
        if unknown := set(self.defaults) - self.forms.keys():
            raise SystemExit(f"defaults: unknown: {', '.join(sorted(unknown))}")
        self.stages = {name: self._stage(name, dict(keys)) for name, keys in content["stages"].items()}
        seen: dict[str, Cell] = {}
        for stage in self.stages.values():
            labels = {""}
            for data, method, budget, seed in itertools.product(stage.data, stage.methods, stage.budgets, stage.seeds):
                for candidate in self.candidates(stage, data, method):
                    cell = self.cell(stage, candidate, budget, seed)
                    labels.add(candidate.label)
                    if not same(seen.setdefault(cell.name, cell).fields, cell.fields, None):
                        raise SystemExit(f"{stage.name}: there is another {cell.name}, of other fields")
            if stage.kept_of not in labels:
                raise SystemExit(f"{stage.name}: kept_of: there is no {stage.kept_of}")

    def _stage(self, name: str, keys: dict[str, Any]) -> Stage:
        halving = keys.pop("halving", None)
        unknown = keys.keys() - {f.name for f in dataclasses.fields(Stage)}
        unknown |= set(keys.get("forms", ())) - self.forms.keys() | set(keys.get("methods", ())) - METHODS.keys()
        unknown |= {key for form in self.forms.values() for key in form if "." not in key} - METHODS.keys()
        if unknown:
            raise SystemExit(f"{name}: unknown: {', '.join(sorted(unknown))}")
        stage = Stage(name, halving=Halving(**halving) if halving else None, **keys)
        if bool(stage.halving) == bool(stage.epochs) or (stage.halving and stage.final):
            raise SystemExit(f"{name}: expected epochs or halving, and no halving on the test split")
        if stage.equal not in ("compute", "epochs"):
            raise SystemExit(f"{name}: equal: expected compute or epochs, got {stage.equal}")
        return stage

    def candidates(self, stage: Stage, data: str, method: str) -> list[Candidate]:
        """All forms of a method on a data set, without repetition."""
        bases = self.base if stage.base is True else stage.base or {}
        base = {**bases.get(method, {}), **bases.get(f"{data}/{method}", {})}
        found: dict[str, Candidate] = {}
        for form, (suffix, varied) in itertools.product(stage.forms, self._varied(stage, method, base)):
            others = {key: value for key, value in varied.items() if key.split(".")[0] not in _TASKS}
            plain = PLAIN + (suffix if suffix is not None and others else _suffix(others))
            label = plain if form == PLAIN else form + (_suffix(varied) if suffix is None else suffix)
            own = self.forms[form]
            fields = {key: value for key, value in own.items() if "." in key} | own.get(method, {})
            fields = {**base, **stage.fields, **fields, **(others if form == PLAIN else varied)}
            found.setdefault(label, Candidate(data, method, form, label, plain, fields))
        return list(found.values())

    @staticmethod
    def _varied(stage: Stage, method: str, base: Mapping[str, Any]) -> Iterator[tuple[str | None, dict[str, Any]]]:
        """Name, if it has one, and fields of each variant."""
        values = dict(stage.grid)
        for key, factors in stage.factors.items():
            start = base.get(key, METHODS[method].lr if key == "optim.lr" else None)
            if start is None:
                raise SystemExit(f"{stage.name}: factors: nothing to multiply {key} of {method} with")
            values[key] = [start * factor for factor in factors]
        for chosen in itertools.product(*values.values()):
            yield None, dict(zip(values, chosen, strict=True))
        for name, fields in stage.variants.get(method, {}).items():
            yield f"-{name}", dict(fields)

    def cell(self, stage: Stage, candidate: Candidate, epochs: int, seed: int) -> Cell:
        """The run of a candidate with a seed."""
        curve = int(stage.final) if stage.curve is None else stage.curve
        fields = {**candidate.fields, "evaluation.knn_every": curve or epochs}
        return Cell(candidate.data, candidate.method, candidate.label, epochs, seed, stage.final, fields)

    def row(self, stage: Stage, candidate: Candidate, budget: int, steps: Steps) -> Row:
        """The runs of a candidate at a budget."""
        if candidate.form == PLAIN:
            ratio: float | None = 1.0
        else:
            entry = steps.find(candidate.data, candidate.method, candidate.fields)
            ratio = None if entry is None else entry["ratio"]
        if ratio is None and stage.equal == "compute":
            return Row(stage, candidate, budget, None, ())
        epochs = length(budget, ratio) if ratio is not None and stage.equal == "compute" else budget
        return Row(
            stage, candidate, budget, ratio, tuple(self.cell(stage, candidate, epochs, seed) for seed in stage.seeds)
        )

    def rows(self, stage: Stage, data: str, method: str, results: Results) -> list[Row]:
        """The rows of each budget, as far as it is known who goes on to it."""
        alive, found = self.candidates(stage, data, method), list[Row]()
        for budget in stage.budgets:
            rows = [self.row(stage, candidate, budget, results.steps) for candidate in alive]
            found += rows
            if stage.halving is None or any(not r.cells or any(results.read(c) is None for c in r.cells) for r in rows):
                break
            alive = [row.candidate for row in survivors(rows, stage.halving.keep, results)]
        return found

    def needed(self, stage: Stage, results: Results) -> list[Cell]:
        """The cells to run now: by data set, by seed, by form, so that all methods have the first forms first."""
        found = []
        for data in stage.data:
            rows = [row for method in stage.methods for row in self.rows(stage, data, method, results)]
            each = [(row, cell) for row in rows for cell in row.cells if results.read(cell) is None]
            each.sort(key=lambda both: (stage.seeds.index(both[1].seed), stage.forms.index(both[0].candidate.form)))
            found += [cell for _, cell in each]
        return found


def survivors(rows: Sequence[Row], keep: float, results: Results) -> list[Row]:
    """Plain, and the best share of the others, of which at least one."""
    plain = [row for row in rows if row.candidate.form == PLAIN]
    others = [row for row in rows if row.candidate.form != PLAIN]
    others.sort(key=lambda row: (-results.score(row), row.candidate.label))
    return plain + others[: max(1, math.ceil(keep * len(others)))]


def same(run: Mapping[str, Any], wanted: Mapping[str, Any], epochs: int | None) -> bool:
    """Whether a run of so many epochs has the wanted fields; it may measure more often than they say. None: however often."""
    every = "evaluation.knn_every"
    if epochs is None or wanted[every] == epochs or wanted[every] % run[every] == 0:
        run = {**run, every: wanted[every]}
    return dict(run) == dict(wanted)


def last(content: Content) -> Mapping[str, float]:
    """The metrics after the last epoch; none of a run that failed."""
    points = content.get("points")
    return points[max(points)] if points and not content["error"] else {}


def _suffix(varied: Mapping[str, Any]) -> str:
    """``-lr0.24`` for ``{"optim.lr": 0.24}``."""
    shown = {key.split(".")[-1]: value for key, value in varied.items()}
    numbers = {
        key: f"{v:g}" if isinstance(v, int | float) and not isinstance(v, bool) else v for key, v in shown.items()
    }
    return "".join(f"-{key}{value}" for key, value in numbers.items())
