"""Which form of the rotation task gives the most for its time?

    python benchmarks/rotation_variants.py [--data fashion-mnist-sample] [--epochs 10] [--seeds 0 1 2] [--jobs 2] [--work FOLDER]
        [--methods byol,simclr,simsiam,mocov2,swav] [--variants 'paper;shared;...'] [--weight 1]
        [--known CSV] [--report]

For each method, at the learning rate that suits its plain run (on the sample that of methods_sample.py and convergence_sample.py,
else the best of three):

1. Seconds a step of every variant over the plain step: interleaved, in rotated order, medians of paired ratios.
2. The weight of each variant on its own: the best in the mean over the methods, with a seed that is none of those in the table;
   or one for all, without trials of weights and rates, where an earlier table has chosen it (--weight).
3. Paired seeds at *equal epochs*, and at *equal compute*: a variant whose step takes r times as long gets 1/r of the epochs,
   rounded, with the whole schedule in them. Against the paper's recipe nothing is rounded: its accuracy at exactly the compute
   of the other run is read between its two lengths, on a line over the logarithm of the epochs, seed by seed.

Runs are single processes with one thread, --jobs at a time; one that is finished in --work, or stands in a table of --known,
is not run again, and several of these scripts may share a folder if they have different methods. --data cifar10-folder is
CIFAR-10 as JPEG files, of $ROTSSL_DATA/cifar10-jpeg.tar.gz; 10% of the training images are held back. BatchNorm is torch's own
and the precision bf16, as on a GPU; fp32 where the processor only emulates bf16. Writes
benchmarks/results/rotation_variants_DATA_EPOCHS[_SEEDS]_DATE.{md,csv}; --report writes them from the runs that are there.
"""

import argparse
import csv
import datetime
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import RESULTS, cifar10_folder, command, commit, machine, spread, train, trainer

from rotssl import journal
from rotssl.engine import emulates_bf16
from rotssl.journal import Points
from rotssl.reporting.convergence import paired_difference

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
    "quarter, half resolution": "the same at half the side",
    "joint": "two extra views in one forward with the method's views",
    "independent": "in place, each student view by an angle of its own, the teacher's upright",
    "shared": "in place, all views of an image by one angle",
    "shared, half": "the same for every second image",
    "shared, quarter": "the same for every fourth image",
    "shared, weight to 0": "shared, the weight falling to 0 along a cosine",
    "shared, fewer": "shared, the share of rotated images falling from 1 to 1/8 along a cosine",
}
WEIGHTS = (0.3, 1.0, 3.0)
SEEDS = [0, 1, 2]
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
        self.tuned: dict[str, dict[float, float]] = {}
        self.weights = {"plain": 0.0}

    def cell(self, variant: str, weight: float, epochs: int, seed: int) -> Cell:
        """A run of this study."""
        return Cell(self.data, self.method, self.lr, variant, weight, epochs, seed)

    def know(self, file: Path) -> None:
        """Take the runs and ratios of this study from a table that an earlier start wrote."""
        with file.open(newline="") as rows:
            for row in csv.DictReader(rows):
                kinds = Cell.__annotations__
                told = {key: kinds[key](row[key]) for key in Cell._fields if key in row}
                cell = Cell(**{"precision": "bf16", **told})  # the first tables do not name it
                if (cell.data, cell.method, cell.precision) == (self.data, self.method, PRECISION):
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


def weights(studies: Sequence[Study], given: float | None) -> dict[str, float]:
    """Of each variant the weight that is given, or that is best in the mean over the methods, of those that all of them tried."""
    chosen = {"plain": 0.0}
    if given is not None:
        return dict.fromkeys(studies[0].variants, given) | chosen
    for v in studies[0].variants:
        common = [w for w in WEIGHTS if all(w in study.tuned.get(v, {}) for study in studies)]
        if common:
            chosen[v] = max(common, key=lambda w: sum(study.tuned[v][w] for study in studies))
    return chosen


def final(points: Points, key: str = "knn/top1") -> float:
    """Of the last epoch; 0 for a run that failed."""
    return points[max(points)].get(key, 0.0) if points else 0.0


def gain(ours: Sequence[float] | None, theirs: Sequence[float] | None) -> str:
    """Mean and interval of the paired differences, in points."""
    if ours is None or theirs is None:
        return ""
    mean, low, high = (100 * value for value in paired_difference(list(ours), list(theirs)))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def pooled(each: Sequence[list[float] | None]) -> list[float] | None:
    """Seed by seed the mean over the methods; None if one has nothing."""
    found = [scores for scores in each if scores is not None]
    return [statistics.mean(column) for column in zip(*found, strict=True)] if len(found) == len(each) else None


def kept(ours: Sequence[float] | None, paper: Sequence[float] | None, plain: Sequence[float] | None) -> str:
    """Share of the paper's mean gain."""
    if ours is None or paper is None or plain is None:
        return ""
    whole = statistics.mean(paper) - statistics.mean(plain)
    return f"{100 * (statistics.mean(ours) - statistics.mean(plain)) / whole:.0f} %" if whole > 0.005 else "-"


def table(studies: Sequence[Study], variants: Sequence[str], metric: str) -> list[str]:
    """The rows of some methods together."""
    lines = [
        f"| variant | step | weight | {metric}, equal epochs | gain over plain | of the paper's | compute | {metric}, equal "
        "compute | gain over plain | gain over the paper's recipe, exactly equal compute |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for v in variants:
        here = {equal: pooled([s.scores(v, equal, metric) for s in studies]) for equal in ("epochs", "compute")}
        plain, paper = (pooled([s.scores(name, "epochs", metric) for s in studies]) for name in ("plain", "paper"))
        spent = statistics.mean(study.compute(v, "compute") for study in studies)
        cheap_paper = pooled([s.paper(s.compute(v, "compute"), metric) for s in studies])
        shown = {key: "" if values is None else spread(values) for key, values in here.items()}
        ratio = f"{statistics.median(study.ratios[v] for study in studies):.2f}"
        one = studies[0] if len(studies) == 1 else None
        row = [v, ratio, f"{studies[0].weights[v]:g}" if v in studies[0].weights else "", shown["epochs"]]
        row += ["", ""] if v == "plain" else [gain(here["epochs"], plain), kept(here["epochs"], paper, plain)]
        row += [f"{spent:.2f}" + (f", {one.share(v)} epochs" if one is not None else ""), shown["compute"]]
        row += ["" if v == "plain" else gain(here["compute"], plain)]
        row += ["" if v == "paper" else gain(here["compute"], cheap_paper)]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def report(studies: Sequence[Study], args: argparse.Namespace) -> None:
    """Write the tables and the points of all runs."""
    epochs, variants, data = args.epochs, studies[0].variants, studies[0].data
    lines = [
        f"# Forms of the rotation task on {data}, {epochs} epochs, {datetime.date.today()}",
        "",
        f"Command: `{command()}`, commit {commit()}.",
        f"Machine: {machine()}; one thread a run. Paired seeds {', '.join(map(str, args.seeds))}; top-1 on validation after the "
        "last epoch, %: mean (range); gains in points with 95% Student t intervals over the pairs.",
        f"Encoder small, batch 256, {PRECISION}, BatchNorm; 5,000 images. Step: seconds over the plain step's (median of 9 "
        f"interleaved pairs). Equal compute: {epochs} plain epochs, or {epochs} / step, rounded, steps up to {CHEAP:g} as 1; "
        "what comes of it, in plain runs, is under compute. The accuracy of the paper's recipe at exactly the compute of "
        "another run is read between its two lengths, on a line over the logarithm of the epochs.",
        f"Weight: of {', '.join(f'{w:g}' for w in WEIGHTS)} the best in the mean over the methods, at {args.tuning_epochs} "
        f"epochs with seed {TUNING_SEED}."
        if args.weight is None
        else "Weight and rates: as given, which the trials of an earlier table chose.",
        *([f"Among the runs are those of {', '.join(file.name for file in args.known)}."] if args.known else []),
        "",
        *(f"- {v}: {MEANING[v]}" for v in variants),
    ]
    if args.weight is None:
        lines += [
            "",
            "kNN of the trials of the weights, mean over the methods:",
            "",
            f"| variant | {' | '.join(f'{w:g}' for w in WEIGHTS)} |",
            f"|---|{'---|' * len(WEIGHTS)}",
        ]
    for v in [v for v in variants if v != "plain" and args.weight is None]:
        each = [[study.tuned.get(v, {}).get(w) for study in studies] for w in WEIGHTS]
        row = [f"{100 * statistics.mean(found):.1f}" if None not in found else "" for found in each]  # type: ignore[arg-type]
        lines.append(f"| {v} | {' | '.join(row)} |")
    for metric in METRICS:
        lines += ["", f"## Mean of {', '.join(study.method for study in studies)}: {metric}", ""]
        lines += table(studies, variants, metric)
    for study in studies:
        for metric in METRICS:
            lines += ["", f"## {study.method}, lr {study.lr:g}: {metric}", ""]
            lines += table([study], variants, metric)
    lines += [
        "",
        "## Loss of the method in the last epoch, and accuracy of the rotations",
        "",
        "Means over the seeds, at equal epochs. Negatives that are turned another way are easy ones: if they all are told apart "
        "by that, the loss of a method that pushes them away falls by ln 4 = 1.39.",
        "",
        f"| variant | {' | '.join(study.method for study in studies)} |",
        f"|---|{'---|' * len(studies)}",
    ]
    for v in variants:
        shown = []
        for study in studies:
            loss, right = (study.mean(v, key) for key in ("loss/ssl", "rotation/accuracy"))
            shown.append("" if loss is None else f"{loss:.2f}" + (f", {100 * right:.0f} %" if right else ""))
        lines.append(f"| {v} | {' | '.join(shown)} |")
    seeds = "" if args.seeds == SEEDS else f"_seeds{'-'.join(map(str, args.seeds))}"
    target = args.output / f"rotation_variants_{data}_{epochs}ep{seeds}_{datetime.date.today()}"
    args.output.mkdir(parents=True, exist_ok=True)
    target.with_suffix(".md").write_text("\n".join(lines) + "\n")
    with target.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*Cell._fields, "step", *COLUMNS])
        for study in studies:
            for cell, points in sorted(study.runs.items()):
                last = points[max(points)] if points else {}
                step = study.ratios.get(cell.variant, "")
                writer.writerow([*cell, step, *(f"{last[key]:.4f}" if key in last else "" for key in COLUMNS)])
    print("\n".join(lines))


def main() -> None:
    """Run all cells and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, default="fashion-mnist-sample")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--tuning-epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--methods", default=",".join(RATES))
    parser.add_argument("--variants", default=";".join(VARIANTS), help="separated by semicolons")
    parser.add_argument("--weight", type=float, default=None, help="of all variants, instead of trials")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", default=None, help="folder of the runs; default: a temporary one")
    parser.add_argument("--known", type=Path, nargs="+", default=[], help="tables (csv) of earlier starts")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    names = ["plain", *(v for v in args.variants.split(";") if v != "plain")]
    with (
        tempfile.TemporaryDirectory() as scratch,
        multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool,
    ):
        work = args.work or scratch
        if args.data == "cifar10-folder" and not args.report:
            cifar10_folder(Path(work), 50_000)
        studies = [Study(args.data, m, args.epochs, args.seeds, names, work) for m in args.methods.split(",")]
        hands = None if args.report else pool
        for study, file in itertools.product(studies, args.known):
            study.know(file)
        for study in studies:
            study.time(hands)
        for study in studies if args.weight is None else []:
            study.tune(hands, args.tuning_epochs)
        for study in studies:
            study.weights = weights(studies, args.weight)
            study.run(hands)
        report(studies, args)


if __name__ == "__main__":
    sys.exit(main())
