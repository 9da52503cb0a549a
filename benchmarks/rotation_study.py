"""The runs of rotation_variants.py: forms of the task, one method on one data set, what was measured of them."""

import csv
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import train, trainer

from rotssl.engine.hardware import emulates_bf16
from rotssl.runs import journal
from rotssl.runs.journal import Points

PAPER = {"rotation.mode": "extra"}
IN_PLACE = {"rotation.mode": "in_place", "rotation.fraction_end": None}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"rotation.weight": 0.0},
    "paper": PAPER,
    "one view": {**PAPER, "rotation.views": 1},
    "quarter": {**PAPER, "rotation.fraction": 0.25},
    "half resolution": {**PAPER, "rotation.resolution": 0.5},
    "quarter, half resolution": {**PAPER, "rotation.fraction": 0.25, "rotation.resolution": 0.5},
    "joint": {**PAPER, "rotation.joint": True},
    "independent": {**IN_PLACE, "rotation.angles": "independent"},
    "shared": IN_PLACE,
    "shared, half": {**IN_PLACE, "rotation.fraction": 0.5},
    "shared, quarter": {**IN_PLACE, "rotation.fraction": 0.25},
    "shared, weight to 0": {**IN_PLACE, "rotation.schedule": "cosine"},
    "shared, fewer": {**IN_PLACE, "rotation.fraction_end": 0.125},
}
MEANING = {
    "plain": "no rotation",
    "paper": "two extra views in a forward of their own: the reference",
    "one view": "one extra view",
    "quarter": "two extra views of a quarter of the batch",
    "half resolution": "two extra views at half the side",
    "quarter, half resolution": "two extra views of a quarter of the batch, at half the side",
    "joint": "two extra views in one forward with the method's views",
    "independent": "in place, each student view by an angle of its own, the teacher's upright",
    "shared": "in place, all views of an image by one angle",
    "shared, half": "in place, every second image, all its views by one angle",
    "shared, quarter": "in place, every fourth image, all its views by one angle",
    "shared, weight to 0": "shared, the weight falling to 0 along a cosine",
    "shared, fewer": "shared, the share of rotated images falling from 1 to 1/8 along a cosine",
}
WEIGHTS = (0.3, 1.0, 3.0)
TUNING_SEED = 100
# The best of the plain run on the sample (methods_sample.py, convergence_sample.py); elsewhere the best of it, half and double.
RATES = {"byol": 0.24, "simclr": 0.24, "simsiam": 0.06, "mocov2": 0.12, "swav": 0.48}
DATA: dict[str, dict[str, Any]] = {
    "fashion-mnist-sample": {},
    "cifar10-folder": {"data.name": "imagefolder", "data.limit": 5000},
}
PRECISION = "fp32" if emulates_bf16() else "bf16"
CHEAP = 1.05  # a step up to so many times as long counts as no longer
METRICS = {"kNN": "knn/top1", "linear": "linear/top1"}
COLUMNS = ["knn/top1", "linear/top1", "rotation/accuracy", "loss/ssl", "feature/std", "cost/train_seconds"]


class Cell(NamedTuple):
    """A run."""

    data: str
    method: str
    lr: float
    variant: str
    weight: float
    epochs: int
    seed: int
    precision: str = PRECISION


def fields(cell: Cell, work: str) -> dict[str, Any]:
    """The configuration of a run."""
    name = "-".join(map(str, cell)).replace(" ", "_").replace(",", "")
    root = {"data.root": f"{work}/cifar10"} if cell.data == "cifar10-folder" else {}
    return {
        **DATA[cell.data],
        **root,
        "method.name": cell.method,
        "optim.lr": cell.lr,
        "rotation.weight": cell.weight,
        **VARIANTS[cell.variant],
        "model.norm": "batch",
        "train.precision": cell.precision,
        "train.seed": cell.seed,
        "train.epochs": cell.epochs,
        "evaluation.knn_every": cell.epochs,
        "tracking.run_name": name,
        "storage.path": work,
    }


def run_cell(task: tuple[Cell, str]) -> tuple[Cell, Points]:
    """One run, in this process."""
    cell, work = task
    values = fields(cell, work)
    folder = Path(work) / "rotssl" / values["tracking.run_name"]
    points = journal.read(folder) if (folder / "encoder.json").exists() else train(values)
    return cell, points


def step_ratios(data: str, method: str, variants: Sequence[str], work: str, rounds: int = 9) -> dict[str, float]:
    """Seconds of a step over those of the plain step, medians of the pairs of each round."""
    with tempfile.TemporaryDirectory() as scratch:
        engines = {}
        for variant in variants:
            values = fields(Cell(data, method, RATES[method], variant, 1.0, 1, 0), work)
            engine = trainer(values | {"storage.path": scratch})  # whose first step, left out here, writes a picture
            engine.parallel.train()
            engines[variant] = engine, itertools.cycle(itertools.islice(engine.batches(0), 1, 4))
        taken: dict[str, list[float]] = {variant: [] for variant in variants}
        for r in range(rounds + 2):  # the first two are not counted
            for k in range(len(variants)):
                variant = variants[(k + r) % len(variants)]
                engine, batches = engines[variant]
                started = time.perf_counter()
                engine.step(*next(batches))
                taken[variant].append(time.perf_counter() - started)
    pairs = {v: [a / b for a, b in zip(taken[v], taken["plain"], strict=True)][2:] for v in variants}
    return {v: round(statistics.median(pairs[v]), 3) for v in variants}


def timed(task: tuple[str, str, Sequence[str], str]) -> dict[str, float]:
    """The ratios of a method, measured once for each folder of runs."""
    data, method, variants, work = task
    path = Path(work) / f"ratios-{data}-{method}-{PRECISION}.json"
    known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    missing = [v for v in variants if v not in known]
    if missing:
        known |= step_ratios(data, method, ["plain", *(v for v in missing if v != "plain")], work)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known))
    return {v: known[v] for v in variants}


class Study:
    """One method on one data set.

    Args:
        data: key of DATA.
        method: name.
        epochs: of the plain run.
        seeds: of the table.
        variants: keys of VARIANTS, ``plain`` among them.
        work: folder of the runs.
    """

    def __init__(
        self, data: str, method: str, epochs: int, seeds: Sequence[int], variants: Sequence[str], work: str
    ) -> None:
        self.data, self.method, self.epochs, self.seeds, self.variants = data, method, epochs, seeds, variants
        self.work, self.runs = work, dict[Cell, Points]()
        self.lr, self.rates = RATES[method], dict[float, float]()
        self.ratios: dict[str, float] = {}
        self.known: set[Path] = set()
        self.tuned: dict[str, dict[float, float]] = {}
        self.weights = {"plain": 0.0}

    def cell(self, variant: str, weight: float, epochs: int, seed: int) -> Cell:
        """A run of this study."""
        return Cell(self.data, self.method, self.lr, variant, weight, epochs, seed)

    def know(self, file: Path) -> None:
        """Take the runs and ratios of this study, of this precision, from a table that an earlier start wrote."""
        with file.open(newline="") as rows:
            for row in csv.DictReader(rows):
                kinds = Cell.__annotations__
                told = {key: kinds[key](row[key]) for key in Cell._fields if key in row}
                cell = Cell(**{"precision": "bf16", **told})  # the first tables do not name it
                if (cell.data, cell.method, cell.precision) == (self.data, self.method, PRECISION):
                    self.known.add(file)
                    self.runs[cell] = {cell.epochs: {key: float(row[key]) for key in COLUMNS if row[key]}}
                    if row.get("step"):
                        self.ratios[cell.variant] = float(row["step"])

    def need(self, cells: Sequence[Cell], pool: Any) -> None:
        """Run what is not there yet; without a pool, only take what is there."""
        missing = [cell for cell in dict.fromkeys(cells) if cell not in self.runs]
        if pool is not None:
            self.runs |= dict(pool.imap_unordered(run_cell, [(cell, self.work) for cell in missing], 1))
            return
        for cell in missing:
            folder = Path(self.work) / "rotssl" / fields(cell, self.work)["tracking.run_name"]
            if (folder / "encoder.json").exists():
                self.runs[cell] = journal.read(folder)

    def time(self, pool: Any) -> None:
        """Time the steps."""
        task = (self.data, self.method, [v for v in self.variants if v not in self.ratios], self.work)
        if task[2]:
            self.ratios |= pool.apply(timed, (task,)) if pool is not None else timed(task)

    def tune(self, pool: Any, tuning_epochs: int) -> None:
        """Choose the rate, and try all weights."""
        if self.data != "fashion-mnist-sample":
            tried = [self.cell("plain", 0.0, tuning_epochs, TUNING_SEED)._replace(lr=f * self.lr) for f in (0.5, 1, 2)]
            self.need(tried, pool)
            self.rates = {cell.lr: final(self.runs[cell]) for cell in tried if cell in self.runs}
            self.lr = max(self.rates, key=lambda lr: self.rates[lr], default=self.lr)
        on = [v for v in self.variants if v != "plain"]
        trial = {(v, w): self.cell(v, w, tuning_epochs, TUNING_SEED) for v in on for w in WEIGHTS}
        self.need([*trial.values()], pool)
        for (v, w), cell in trial.items():
            if cell in self.runs:
                self.tuned.setdefault(v, {})[w] = final(self.runs[cell])

    def run(self, pool: Any) -> None:
        """The runs of the table."""
        lengths = {v: sorted({self.epochs, self.share(v)}) for v in self.weights}
        cells = [self.cell(v, w, e, seed) for seed in self.seeds for v, w in self.weights.items() for e in lengths[v]]
        self.need(cells, pool)

    def share(self, variant: str) -> int:
        """Epochs that take as long as the plain run."""
        ratio = self.ratios[variant]
        return self.epochs if ratio <= CHEAP else max(1, round(self.epochs / ratio))

    def scores(self, variant: str, equal: str, metric: str = "kNN") -> list[float] | None:
        """Of all seeds, at equal ``epochs`` or ``compute``; None if one is not there."""
        if variant not in self.weights:
            return None
        epochs = self.epochs if equal == "epochs" else self.share(variant)
        cells = [self.cell(variant, self.weights[variant], epochs, seed) for seed in self.seeds]
        return [final(self.runs[c], METRICS[metric]) for c in cells] if all(c in self.runs for c in cells) else None

    def compute(self, variant: str, equal: str) -> float:
        """Time of a run, as a share of the plain run's."""
        return self.ratios[variant] * (self.epochs if equal == "epochs" else self.share(variant)) / self.epochs

    def paper(self, compute: float, metric: str) -> list[float] | None:
        """Of all seeds, what the paper's recipe reaches with so much compute, between its two lengths or just beyond."""
        short, long = (self.scores("paper", equal, metric) for equal in ("compute", "epochs"))
        if short is None or long is None:
            return None
        at = math.log(compute / self.compute("paper", "compute")) / math.log(self.epochs / self.share("paper"))
        return [a + at * (b - a) for a, b in zip(short, long, strict=True)]

    def mean(self, variant: str, key: str) -> float | None:
        """Of a metric of the last epoch, at equal epochs, over the runs that have it."""
        if variant not in self.weights:
            return None
        cells = [self.cell(variant, self.weights[variant], self.epochs, seed) for seed in self.seeds]
        last = [points[max(points)] for points in map(self.runs.get, cells) if points]
        found = [point[key] for point in last if key in point]
        return statistics.mean(found) if found else None


def final(points: Points, key: str = "knn/top1") -> float:
    """Of the last epoch; 0 for a run that failed."""
    return points[max(points)].get(key, 0.0) if points else 0.0
