"""Does rotation prediction help every method on the embedded sample?

    python benchmarks/methods_sample.py [--seeds 3] [--epochs 10] [--jobs 2] [--work FOLDER] [--methods simclr,byol]

1. For each method, the learning rate of the *plain* run: the best kNN top-1 on validation, of three rates; while the best is at
   an end of them, the next one (a factor of 2) is tried too. One seed, which is none of those in the table.
2. At that rate and with that seed, the rotation weight: the best of two.
3. The table: plain and with rotation (two extra views, the paper's recipe), paired seeds, equal epochs; kNN and linear top-1 of
   the last epoch on validation, and their differences with 95% Student t intervals.
4. For three methods, the same with the rotated pass kept out of BatchNorm's running statistics.

Cells are independent single-process runs with one thread each, --jobs at a time. A cell that is finished in --work is not run
again. Writes benchmarks/results/methods_sample_DATE.{md,csv}.
"""

import argparse
import csv
import datetime
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from common import RESULTS, command, commit, machine, spread, train

from rotssl.config.methods import METHODS
from rotssl.reports.statistics import paired_difference
from rotssl.runs.journal import Points

RATES = {
    "simclr": (0.03, 0.06, 0.12),
    "mocov2": (0.03, 0.06, 0.12),
    "byol": (0.12, 0.24, 0.48),
    "simsiam": (0.06, 0.12, 0.24),
    "swav": (0.06, 0.12, 0.24),
    "barlow": (0.0005, 0.001, 0.002),
    "vicreg": (0.005, 0.01, 0.02),
    "dino": (0.0005, 0.001, 0.002),
}  # of others: the registry's, its half and its double
# At the encoder, rotation's gradient with weight 1 is 3 to 20 times that of the method in the first epochs, as measured by
# tasks.log_gradients_every; with Barlow Twins and VICReg, whose losses are sums, that takes some hundreds and about 10.
WEIGHTS = dict.fromkeys(METHODS, (0.3, 1.0)) | {"barlow": (300.0, 1000.0), "vicreg": (3.0, 10.0)}
STATISTICS_KEPT = ("simclr", "byol", "swav")
TUNING_SEED = 100
METRICS = {"kNN": "knn/top1", "linear": "linear/top1"}
Cell = tuple[str, float, float, bool, int]  # method, learning rate, rotation weight, update_bn, seed


def run_cell(task: tuple[Cell, int, str]) -> tuple[Cell, Points]:
    """One run, in this process."""
    cell, epochs, work = task
    method, lr, weight, update_bn, seed = cell
    name = f"{method}-{METHODS[method].optimizer}-lr{lr:g}-w{weight:g}{'' if update_bn else '-bn-kept'}-seed{seed}-epochs{epochs}"
    overrides = {
        "method.name": method,
        "optim.lr": lr,
        "rotation.weight": weight,
        "rotation.mode": "extra",
        "rotation.update_bn": update_bn,
        "train.seed": seed,
        "train.epochs": epochs,
        "tracking.run_name": name,
        "storage.path": work,
    }
    return cell, train(overrides)


def final(points: Points, epochs: int, metric: str = "knn/top1") -> float:
    """The metric of the last epoch; 0 for a run that failed before it."""
    return points.get(epochs, {}).get(metric, 0.0)


class Study:
    """The runs so far, and how to get more of them."""

    def __init__(self, execute: Callable[[list[Cell]], dict[Cell, Points]], epochs: int) -> None:
        self.execute, self.epochs, self.runs = execute, epochs, dict[Cell, Points]()

    def need(self, cells: Sequence[Cell]) -> None:
        """Run what is not there yet."""
        self.runs |= self.execute([cell for cell in dict.fromkeys(cells) if cell not in self.runs])

    def score(self, cell: Cell, metric: str = "knn/top1") -> float:
        """Last epoch's value."""
        return final(self.runs[cell], self.epochs, metric)

    def rates(self, methods: Sequence[str]) -> dict[str, dict[float, float]]:
        """Rate -> kNN of each method, with the best inside of the rates tried (or six of them tried)."""
        rate = {m: METHODS[m].lr for m in methods}
        tried = {m: list(RATES.get(m, (rate[m] / 2, rate[m], 2 * rate[m]))) for m in methods}
        while True:
            self.need([(m, lr, 0.0, True, TUNING_SEED) for m in methods for lr in tried[m]])
            found = {m: {lr: self.score((m, lr, 0.0, True, TUNING_SEED)) for lr in sorted(tried[m])} for m in methods}
            more = False
            for m in methods:
                best = max(found[m], key=lambda lr: found[m][lr])
                beyond = {min(tried[m]): best / 2, max(tried[m]): best * 2}.get(best)
                if beyond is not None and len(tried[m]) < 6:
                    tried[m].append(beyond)
                    more = True
            if not more:
                return found


def main() -> None:
    """Run all cells and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--work", default=None, help="folder of the runs; default: a temporary one")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    methods, seeds = args.methods.split(","), range(args.seeds)
    os.environ["OMP_NUM_THREADS"] = "1"
    with (
        tempfile.TemporaryDirectory() as scratch,
        multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool,
    ):
        work = args.work or scratch
        study = Study(
            lambda cells: dict(pool.imap_unordered(run_cell, [(cell, args.epochs, work) for cell in cells], 1)),
            args.epochs,
        )
        rates = study.rates(methods)
        best = {m: max(rates[m], key=lambda lr: rates[m][lr]) for m in methods}
        study.need([(m, best[m], w, True, TUNING_SEED) for m in methods for w in WEIGHTS[m]])
        tuned = {m: {w: study.score((m, best[m], w, True, TUNING_SEED)) for w in WEIGHTS[m]} for m in methods}
        weight = {m: max(tuned[m], key=lambda w: tuned[m][w]) for m in methods}
        study.need([(m, best[m], w, True, seed) for seed in seeds for m in methods for w in (0.0, weight[m])])
        kept = [m for m in STATISTICS_KEPT if m in methods]
        study.need([(m, best[m], weight[m], False, seed) for seed in seeds for m in kept])

    def scores(method: str, on: bool, metric: str, update_bn: bool = True) -> list[float]:
        chosen = weight[method] if on else 0.0
        return [study.score((method, best[method], chosen, update_bn, seed), METRICS[metric]) for seed in seeds]

    def gain(ours: list[float], theirs: list[float]) -> str:
        mean, low, high = (100 * value for value in paired_difference(ours, theirs))
        return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"

    lines = [
        f"# All methods with and without rotation on fashion-mnist-sample, {args.epochs} epochs, {datetime.date.today()}",
        "",
        f"Command: `{command()}`, commit {commit()}.",
        f"Machine: {machine()}; {args.jobs} runs at a time, one thread each.",
        f"{args.seeds} paired seeds; top-1 on the 1,000 validation images, last epoch, %: mean (range). kNN: k=200, T=0.1.",
        "Gains in points with 95% Student t intervals over the pairs. Rotation: two extra views (the paper's recipe).",
        "",
        "| method | lr | weight | kNN, plain | kNN, rotation | gain | linear, plain | linear, rotation | gain |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for m in methods:
        cells = [m, f"{best[m]:g}", f"{weight[m]:g}"]
        for metric in METRICS:
            plain, rotated = scores(m, False, metric), scores(m, True, metric)
            cells += [spread(plain), spread(rotated), gain(rotated, plain)]
        lines.append(f"| {' | '.join(cells)} |")
    cells = ["mean of the methods", "", ""]
    for metric in METRICS:
        plain, rotated = (
            [statistics.mean(column) for column in zip(*(scores(m, on, metric) for m in methods), strict=True)]
            for on in (False, True)
        )
        cells += [spread(plain), spread(rotated), gain(rotated, plain)]
    lines.append(f"| {' | '.join(cells)} |")
    for metric in METRICS:
        better = [
            m for m in methods if statistics.mean(scores(m, True, metric)) > statistics.mean(scores(m, False, metric))
        ]
        lines += ["", f"{metric}: rotation helps {len(better)} of {len(methods)} methods on the mean of the seeds."]
    if kept:
        lines += [
            "",
            "## The rotated pass and BatchNorm's running statistics",
            "",
            "| method | kNN, update_bn true | kNN, false | gain of false | linear, true | linear, false | gain of false |",
            "|---|---|---|---|---|---|---|",
        ]
        for m in kept:
            cells = [m]
            for metric in METRICS:
                with_it, without = scores(m, True, metric), scores(m, True, metric, False)
                cells += [spread(with_it), spread(without), gain(without, with_it)]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"## Chosen with seed {TUNING_SEED}: kNN top-1, %",
        "",
        "| method | learning rate, plain | rotation weight, at the chosen rate |",
        "|---|---|---|",
    ]
    for m in methods:
        shown = [
            ", ".join(f"{key:g}: {100 * value:.1f}" for key, value in table[m].items()) for table in (rates, tuned)
        ]
        lines.append(f"| {m} | {' | '.join(shown)} |")
    target = args.output / f"methods_sample_{datetime.date.today()}"
    args.output.mkdir(parents=True, exist_ok=True)
    target.with_suffix(".md").write_text("\n".join(lines) + "\n")
    columns = ["knn/top1", "linear/top1", "rotation/accuracy", "loss/ssl", "feature/std", "cost/train_seconds"]
    with target.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "lr", "weight", "update_bn", "seed", "epoch", *columns])
        for cell, points in sorted(study.runs.items()):
            for epoch, p in sorted(points.items()):
                writer.writerow([*cell, epoch, *(f"{p[key]:.4f}" if key in p else "" for key in columns)])
    print("\n".join(lines))


if __name__ == "__main__":
    main()
