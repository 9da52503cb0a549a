"""Does rotation prediction make BYOL learn faster on the embedded sample?

    python benchmarks/convergence_sample.py [--seeds 3] [--epochs 10] [--jobs 2] [--work FOLDER]

1. The learning rate is chosen for the *plain* run: the best mean kNN top-1 on validation over the seeds, of four rates.
2. With that rate, rotation weights 0.3, 1 and 3, as two extra views (the paper's recipe) and in place with a shared angle, of
   fewer and fewer images (the default); same seeds, so same initial weights, sample order and crops (paired).
3. For scale, the same kNN on raw pixels and on the untrained encoder.
4. The table: last-epoch kNN, its paired difference to the plain run with a 95% Student t interval, and the epochs and training
   seconds until the plain run's final accuracy of the same seed is reached, interpolated between epochs.

Cells are independent single-process runs with one thread each, --jobs at a time. A cell that is finished in --work is not run
again. Writes benchmarks/results/convergence_sample_DATE.{md,csv,png}.
"""

import argparse
import csv
import datetime
import multiprocessing
import os
import statistics
import tempfile
from pathlib import Path

from common import RESULTS, command, commit, machine, spread, train, trainer

from rotssl.reports.curves import cost_to_reach
from rotssl.reports.statistics import paired_difference
from rotssl.runs.curve import save_convergence
from rotssl.runs.journal import Points

RATES = (0.06, 0.12, 0.24, 0.48)
WEIGHTS = (0.3, 1.0, 3.0)
MODES = {"two extra views": "extra", "in place": "in_place"}
Cell = tuple[float, str, float, int]  # learning rate, mode, weight, seed


def run_cell(task: tuple[Cell, int, str]) -> tuple[Cell, Points]:
    """One run, in this process."""
    (lr, mode, weight, seed), epochs, work = task
    overrides = {
        "optim.lr": lr,
        "rotation.mode": mode,
        "rotation.weight": weight,
        "train.seed": seed,
        "train.epochs": epochs,
        "tracking.run_name": f"lr{lr:g}-{mode}-w{weight:g}-seed{seed}-epochs{epochs}",
        "storage.path": work,
    }
    return (lr, mode, weight, seed), train(overrides)


def references(seeds: range, work: str) -> list[tuple[str, list[float]]]:
    """KNN top-1 without any training: raw pixels, and the encoder's initial weights with calibrated BatchNorm."""
    import torch

    from rotssl.evaluation.knn import knn_top1
    from rotssl.evaluation.measure import encode_share

    untrained = []
    for seed in seeds:
        run = trainer({"train.seed": seed, "storage.path": f"{work}/untrained", "tracking.run_name": f"seed{seed}"})
        with torch.no_grad():
            for images, _ in [*run.batches(0), *run.batches(1)]:
                run.model.encoder.train()(run.augment.evaluation(images))
        bank, queries = run.splits.train, run.splits.validation
        features = [
            encode_share(run.model.encoder, part, run.augment, torch.device("cpu"), run.layout)
            for part in (bank, queries)
        ]
        labels = torch.from_numpy(bank.labels), torch.from_numpy(queries.labels)
        untrained.append(knn_top1(features[0], labels[0], features[1], labels[1]))
        pixels = [run.augment.evaluation(torch.from_numpy(part.images)).flatten(1) for part in (bank, queries)]
        raw = knn_top1(pixels[0], labels[0], pixels[1], labels[1])
    return [("raw pixels", [raw]), ("untrained encoder, BatchNorm calibrated", untrained)]


def main() -> None:
    """Run all cells and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", default=None, help="folder of the runs; default: a temporary one")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    seeds = range(args.seeds)
    os.environ["OMP_NUM_THREADS"] = "1"
    with (
        tempfile.TemporaryDirectory() as scratch,
        multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool,
    ):
        work = args.work or scratch

        def run(cells: list[Cell]) -> dict[Cell, Points]:
            return dict(pool.imap_unordered(run_cell, [(cell, args.epochs, work) for cell in cells], chunksize=1))

        runs = run([(lr, "extra", 0.0, seed) for lr in RATES for seed in seeds])

        def finals(lr: float, mode: str, weight: float) -> list[float]:
            return [runs[lr, mode, weight, seed][args.epochs]["knn/top1"] for seed in seeds]

        rates = {lr: finals(lr, "extra", 0.0) for lr in RATES}
        best = max(RATES, key=lambda lr: statistics.mean(rates[lr]))
        scale = references(seeds, work)
        runs |= run([(best, mode, weight, seed) for mode in MODES.values() for weight in WEIGHTS for seed in seeds])

    plain = rates[best]
    reach = [runs[best, "extra", 0.0, seed][args.epochs]["knn/top1"] for seed in seeds]
    lines = [
        f"# BYOL with and without rotation on fashion-mnist-sample, {args.epochs} epochs, {datetime.date.today()}",
        "",
        f"Command: `{command()}`, commit {commit()}.",
        f"Machine: {machine()}; {args.jobs} runs at a time, one thread each. Times are of a shared machine: compare with care.",
        f"{args.seeds} paired seeds; kNN top-1 (k=200, T=0.1) on the 1,000 validation images, last epoch, %: mean (range).",
        "",
        "## Learning rate, chosen for the plain run",
        "",
        "| lr | kNN top-1, plain |",
        "|---|---|",
        *(f"| {lr:g}{' (chosen)' if lr == best else ''} | {spread(values)} |" for lr, values in rates.items()),
        "",
        f"## Rotation, at lr {best:g}",
        "",
        "| run | weight | kNN top-1 | gain, points (95% interval) | epochs to plain's final | s to it | s, whole run |",
        "|---|---|---|---|---|---|---|",
    ]

    def seconds(mode: str, weight: float) -> float:
        return statistics.median(runs[best, mode, weight, seed][args.epochs]["cost/train_seconds"] for seed in seeds)

    def reaching(mode: str, weight: float, cost: str, digits: int) -> str:
        found = [cost_to_reach(runs[best, mode, weight, seed], reach[seed], cost) for seed in seeds]
        return ", ".join("not reached" if value is None else f"{value:.{digits}f}" for value in found)

    def row(label: str, mode: str, weight: float) -> str:
        values = finals(best, mode, weight)
        gain, low, high = (100 * v for v in paired_difference(values, plain))
        shown = f"{gain:+.1f} ({low:+.1f} to {high:+.1f})" if weight else ""
        costs = [reaching(mode, weight, *cost) for cost in (("cost/epochs", 1), ("cost/train_seconds", 0))]
        return (
            f"| {label} | {weight:g} | {spread(values)} | {shown} | {' | '.join(costs)} | {seconds(mode, weight):.0f} |"
        )

    lines += [f"| {label} | | {spread(values)} | | | | |" for label, values in scale]
    lines.append(row("plain", "extra", 0.0))
    lines += [row(label, mode, weight) for label, mode in MODES.items() for weight in WEIGHTS]
    target = args.output / f"convergence_sample_{datetime.date.today()}"
    args.output.mkdir(parents=True, exist_ok=True)
    target.with_suffix(".md").write_text("\n".join(lines) + "\n")
    with target.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["lr", "mode", "weight", "seed", "epoch", "knn_top1", "rotation_accuracy", "train_seconds"])
        for (lr, mode, weight, seed), points in sorted(runs.items()):
            for epoch, p in sorted(points.items()):
                writer.writerow(
                    [
                        lr,
                        mode,
                        weight,
                        seed,
                        epoch,
                        p["knn/top1"],
                        p.get("rotation/accuracy", ""),
                        f"{p['cost/train_seconds']:.2f}",
                    ]
                )
    curves = {"plain": runs[best, "extra", 0.0, 0]} | {
        f"{label}, weight 1": runs[best, mode, 1.0, 0] for label, mode in MODES.items()
    }
    save_convergence(curves, target.with_suffix(".png"), title="BYOL on fashion-mnist-sample, seed 0")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
