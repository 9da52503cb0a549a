"""What does ASHA save on a sweep of one budget, and does it still find the weight that the full sweep finds?

    python benchmarks/asha_sample.py [--seeds 3] [--epochs 10] [--work FOLDER]

Runs jobs/ablate.py twice on the embedded sample, rotation weights 0, 0.3, 1 and 3: without a scheduler, then with ASHA (reduction
factor 2, grace of one epoch; baselines always run to the end). The trials have the same configurations and seeds, so what it
lets finish is identical. Whom it stops depends on who comes first: the curves of the full sweep are also replayed to the same
scheduler in many random orders. Writes benchmarks/results/asha_sample_DATE.md. A sweep that --work holds is not run again.
"""

import argparse
import datetime
import heapq
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from common import RESULTS, command, commit, machine, spread

from rotssl import config as cfg
from rotssl.config.sweep import SweepConfig
from rotssl.reports.statistics import paired_difference
from rotssl.runs import journal
from rotssl.runtimes import ray_tune

ROOT = RESULTS.parent.parent
WEIGHTS = (0.0, 0.3, 1.0, 3.0)
REPLAYS = 500


def sweep(scheduler: str, seeds: int, epochs: int, work: Path) -> tuple[dict[tuple[float, int], dict], dict, float]:
    """Run one sweep; returns the journal of each (weight, seed) beside its status, the report, and the seconds that it took."""
    file = work / f"{scheduler}.yaml"
    recipe = ROOT / "jobs" / "recipes" / "byol_fashion_mnist_sample.yaml"
    content = {
        "sweep": {"recipe": str(recipe), "seeds": seeds, "scheduler": scheduler},
        "grid": {"rotation.weight": list(WEIGHTS)},
        "train": {"epochs": epochs},
    }
    file.write_text(yaml.safe_dump(content))
    started = time.monotonic()
    command = [sys.executable, str(ROOT / "jobs" / "ablate.py"), "--config", str(file), "--storage.path", str(work)]
    subprocess.run(command, check=True)
    clock = work / f"{scheduler}.seconds"  # of the start that ran the trials
    if not clock.exists():
        clock.write_text(str(time.monotonic() - started))
    taken = float(clock.read_text())
    trials = {}
    for path in (work / scheduler).glob("byol-*/run.json"):
        record = json.loads(path.read_text())
        key = record["config"]["rotation.weight"], record["config"]["train.seed"]
        trials[key] = {"status": record["status"], "points": journal.read(path.parent)}
    report = json.loads((work / scheduler / scheduler / "report" / "report.json").read_text())
    return trials, report, taken


class _Trial:
    """As much of Tune's trials as its schedulers look at."""

    def __init__(self, index: int) -> None:
        self.trial_id, self.config = str(index), {"trial": index}


def replay(full: dict[tuple[float, int], dict], epochs: int, seed: int) -> tuple[int, dict[float, list[float]]]:
    """ASHA on recorded curves, in a random order, two trials at a time, each epoch taking up to a fifth more or less.

    Returns:
        The epochs that were run, and weight -> final kNN of the trials that were let finish.
    """
    gen = np.random.default_rng(seed)
    keys = [list(full)[i] for i in gen.permutation(len(full))]
    shared = {"train.epochs": epochs, "storage.path": "."}
    configs = [cfg.build({**shared, "rotation.weight": weight, "train.seed": s}) for weight, s in keys]
    rule = ray_tune.scheduler(SweepConfig(scheduler="asha"), configs)
    trials, run = [_Trial(i) for i in range(len(keys))], 0
    finals: dict[float, list[float]] = {}
    waiting, active = list(range(len(keys))), []  # active: (time of the next epoch's end, index, that epoch)

    def take(now: float) -> None:
        i = waiting.pop(0)
        rule.on_trial_add(None, trials[i])
        heapq.heappush(active, (now + duration(i, 1), i, 1))

    def duration(i: int, epoch: int) -> float:
        points = full[keys[i]]["points"]
        before = points[epoch - 1]["cost/train_seconds"] if epoch > 1 else 0.0
        return (points[epoch]["cost/train_seconds"] - before) * gen.uniform(0.8, 1.2)

    for _ in range(2):
        take(0.0)
    while active:
        now, i, epoch = heapq.heappop(active)
        run += 1
        knn = full[keys[i]]["points"][epoch]["knn/top1"]
        action = rule.on_trial_result(None, trials[i], {"epoch": epoch, "knn/top1": knn})
        if action == "CONTINUE" and epoch < epochs:
            heapq.heappush(active, (now + duration(i, epoch + 1), i, epoch + 1))
            continue
        if epoch == epochs:
            finals.setdefault(keys[i][0], []).append(knn)
        if waiting:
            take(now)
    return run, finals


def main() -> None:
    """Run both sweeps and write the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--work", type=Path, default=None, help="folder of the runs; default: a temporary one")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        full, _, full_time = sweep("none", args.seeds, args.epochs, work)
        asha, report, asha_time = sweep("asha", args.seeds, args.epochs, work)
    seeds = range(args.seeds)

    def finals(weight: float) -> list[float]:
        return [full[weight, seed]["points"][args.epochs]["knn/top1"] for seed in seeds]

    def run_epochs(trials: dict) -> int:
        return sum(len(trial["points"]) for trial in trials.values())

    best = max(WEIGHTS, key=lambda weight: statistics.mean(finals(weight)))
    (choice,) = report["recommendations"]
    fields = {entry["variant"]: entry["fields"] for entry in report["configurations"]}
    chosen = float(fields[choice["best"]]["rotation.weight"])
    loss, low, high = (100 * value for value in paired_difference(finals(chosen), finals(best)))
    same = all(
        trial["points"][epoch]["knn/top1"] == full[key]["points"][epoch]["knn/top1"]
        for key, trial in asha.items()
        for epoch in trial["points"]
    )
    saved = 1 - run_epochs(asha) / run_epochs(full)
    total, kept, savings = run_epochs(full), 0, []
    for order in range(REPLAYS):
        run, finished = replay(full, args.epochs, order)
        savings.append(1 - run / total)
        pick = max(finished, key=lambda weight: statistics.mean(finished[weight]))
        kept += paired_difference(finals(pick), finals(best))[2] >= 0
    lines = [
        f"# ASHA on a sweep of one budget, {datetime.date.today()}",
        "",
        f"Command: `{command()}`, commit {commit()}.",
        f"Machine: {machine()}; two trials at a time, one thread each.",
        f"BYOL with rotation in place on fashion-mnist-sample, {args.epochs} epochs, weights "
        f"{', '.join(f'{w:g}' for w in WEIGHTS)} x {args.seeds} seeds ({len(full)} trials); ASHA: reduction factor 2, "
        "grace of one epoch, baselines run to the end.",
        "",
        "| | epochs run | by the clock | best weight |",
        "|---|---|---|---|",
        f"| every trial to the end | {run_epochs(full)} | {full_time:.0f} s | {best:g} |",
        f"| ASHA | {run_epochs(asha)} | {asha_time:.0f} s | {chosen:g} |",
        "",
        f"Epochs saved: {saved:.0%}. In the full sweep, the final kNN top-1 of the weight that ASHA recommends differs from "
        f"the best weight's by {loss:+.1f} points (95% interval {low:+.1f} to {high:+.1f}, {args.seeds} paired seeds).",
        f"Replayed to the same scheduler in {REPLAYS} random orders of the trials, the full sweep's curves give a saving of "
        f"{statistics.median(savings):.0%} (median; 5 to 95%: {np.quantile(savings, 0.05):.0%} to "
        f"{np.quantile(savings, 0.95):.0%}), and a third or more in {np.mean(np.array(savings) >= 1 / 3):.0%} of them; in {kept} "
        "the weight with the best mean of its finished trials is within the seed interval of the full sweep's best.",
        f"Epochs that both ran have the same kNN: {'yes, all' if same else 'NO'}.",
        "",
        "| weight | kNN top-1 in the full sweep | epochs that ASHA gave it, by seed |",
        "|---|---|---|",
    ]
    for weight in WEIGHTS:
        given = ", ".join(str(len(asha[weight, seed]["points"])) for seed in seeds)
        lines.append(f"| {weight:g} | {spread(finals(weight))} | {given} |")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"asha_sample_{datetime.date.today()}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
