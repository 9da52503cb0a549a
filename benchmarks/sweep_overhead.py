"""What does a sweep cost beside its trials?

    python benchmarks/sweep_overhead.py [--direct 12] [--nested 3] [--epochs 8] [--work FOLDER]

Runs jobs/ablate.py twice: trials of one worker, two at a time in Ray Tune's actors, and trials of two Ray Train workers, one at a
time. The trials of a sweep have one configuration and different seeds, so they are of equal length; kNN is measured in their last
epoch only, so that nearly all of their time is training. The ideal is the sum of the training times over the number of slots; the
parts of the rest are read from MLflow's clocks. Writes benchmarks/results/sweep_overhead_DATE.md.
"""

import argparse
import datetime
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml
from common import RESULTS, command, commit, machine

ROOT = RESULTS.parent.parent


@dataclass
class Taken:
    """Seconds of a sweep. ``start_ups`` are those of each trial, from its run's beginning to its first step."""

    whole: float
    before: float
    trials: float
    ideal: float
    training: list[float]
    start_ups: list[float]


def sweep(name: str, seeds: int, epochs: int, workers: int, work: Path) -> Taken:
    """Run one sweep and take it apart."""
    from mlflow.tracking import MlflowClient

    file = work / f"{name}.yaml"
    content = {
        "sweep": {
            "recipe": str(ROOT / "jobs" / "recipes" / "byol_fashion_mnist_sample.yaml"),
            "seeds": seeds,
            "baseline": False,
        },
        "train": {"epochs": epochs},
        "evaluation": {"knn_every": epochs, "linear": False},
        "scaling": {"num_workers": workers},
    }
    file.write_text(yaml.safe_dump(content))
    command = [sys.executable, str(ROOT / "jobs" / "ablate.py"), "--config", str(file), "--storage.path", str(work)]
    began, started = time.time(), time.monotonic()
    subprocess.run(command, check=True)
    whole = time.monotonic() - started
    client = MlflowClient(f"sqlite:///{work}/mlflow.db")
    runs = client.search_runs(
        [client.get_experiment_by_name(name).experiment_id], "tags.kind = 'trial'", max_results=1000
    )
    training = [run.data.metrics["cost/train_seconds"] for run in runs]
    start_ups = []
    for run in runs:
        seconds = client.get_metric_history(run.info.run_id, "cost/train_seconds")
        first = min(seconds, key=lambda point: point.step)
        start_ups.append((first.timestamp - run.info.start_time) / 1000 - first.value)
    first, last = min(run.info.start_time for run in runs) / 1000, max(run.info.end_time for run in runs) / 1000
    slots = 2 // workers
    return Taken(whole, first - began, last - first, sum(training) / slots, training, start_ups)


def main() -> None:
    """Run both sweeps and write where the time went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--direct", type=int, default=12, help="trials of one worker")
    parser.add_argument("--nested", type=int, default=3, help="trials of two workers")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--work", type=Path, default=None, help="folder of the runs, empty; default: a temporary one")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    kinds = {"one worker, two trials at a time": (args.direct, 1), "two workers, one trial at a time": (args.nested, 2)}
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        found = {
            label: sweep(f"overhead-{workers}", seeds, args.epochs, workers, work)
            for label, (seeds, workers) in kinds.items()
        }
    lines = [
        f"# What a sweep costs beside its trials, {datetime.date.today()}",
        "",
        f"Command: `{command()}`, commit {commit()}.",
        f"Machine: {machine()}; shared with others. Each sweep was run once, from nothing, its cluster included.",
        f"BYOL with rotation in place on fashion-mnist-sample, {args.epochs} epochs; kNN in the last one only.",
        "",
        "| trials of | number | training, median (range) | ideal: training / slots | trials, first to last | over ideal "
        "| whole command | over ideal | before the first trial | start-up of a trial, median (range) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.1f} s ({min(values):.1f} to {max(values):.1f})"

    for label, taken in found.items():
        lines.append(
            f"| {label} | {len(taken.training)} | {spread(taken.training)} | {taken.ideal:.0f} s | {taken.trials:.0f} s "
            f"| {taken.trials / taken.ideal:.3f} | {taken.whole:.0f} s | {taken.whole / taken.ideal:.3f} "
            f"| {taken.before:.0f} s | {spread(taken.start_ups)} |"
        )
    nested = found["two workers, one trial at a time"]
    rest = nested.trials / (nested.ideal + sum(nested.start_ups))
    lines += ["", f"Trials of two workers: first to last over training plus start-up {rest:.3f}."]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"sweep_overhead_{datetime.date.today()}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
