"""How far off is what jobs/pretrain.py --dry-run predicts?

    python benchmarks/cost_model.py [--workers 1 2] [--encoders small resnet18] [--quick]

For two encoders and each number of workers: what rotssl.engine.estimate says after timing a few steps in a process of its own,
before and after a run of jobs/pretrain.py whose epochs it is about; compared are the training time of an epoch and the time
between two trainings (evaluation, and what is not in the prediction: journal, checkpoint, reports). The first epoch of the run
is left out.
Writes benchmarks/results/cost_model_DATE.md.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, command, commit, machine
from orchestration import run

# Encoder -> fields of a run whose epochs take some seconds on a CPU core.
RUNS: dict[str, dict[str, Any]] = {
    "small": {"encoder.name": "small"},
    "resnet18": {"encoder.name": "resnet18", "encoder.stem": "imagenet", "train.batch_size": 128, "data.limit": 768},
}
SAMPLE = {"data.name": "fashion-mnist-sample", "evaluation.linear": False}


def predict(fields: dict[str, Any], workers: int) -> dict[str, float]:
    """What the model says, in a process of its own, on one thread."""
    code = f"""
import json
from rotssl import config as cfg
from rotssl.engine import estimate as prediction
from rotssl.data import datasets
config = cfg.build({ {**fields, "scaling.num_workers": 1}!r})
info = datasets.inspect(config.data, config.evaluation.holdout)
config = cfg.resolve(config, info.image_size, info.train_size)
speed = prediction.measure(config)
training, evaluation = prediction.epoch(config, speed, info.train_size, {workers})
share = speed.utilization(config.train.batch_size // {workers})
print(json.dumps(dict(training=training, evaluation=evaluation, share=share, matmul=speed.matmul)))
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Predict, run, predict again, and write how far off that was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[n for n in (1, 2, 4) if n <= (os.cpu_count() or 1)])
    parser.add_argument("--encoders", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument(
        "--quick", action="store_true", help="the small encoder on 1,024 images, 3 epochs, and no files"
    )
    parser.add_argument("--work", type=Path, default=None, help="folder of the runs, empty; default: a temporary one")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    runs = {name: SAMPLE | RUNS[name] for name in args.encoders}
    if args.quick:
        runs, args.epochs = {"small": SAMPLE | RUNS["small"] | {"data.limit": 1024}}, 3
    lines = [
        f"# Prediction against measurement, {datetime.date.today()}",
        "",
        f"Command: `{command()}`, commit {commit()}.",
        f"Machine: {machine()}; shared with others. One thread a worker; BYOL with rotation in place on fashion-mnist-sample;",
        f"one run each of {args.epochs} epochs, the first left out, median (range). The prediction is the mean of one before the",
        "run and one after.",
        "",
        "| encoder | workers | training of an epoch, predicted (before, after) | measured | off by | evaluation, predicted "
        "| between two trainings, measured | share of the matrix-multiply rate, predicted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory(prefix="rotssl-cost-") as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        for name, fields in runs.items():
            for workers in args.workers:
                before = predict(fields, workers)
                taken = run(f"{name}{workers}", workers, args.epochs, fields, work)
                both = before, predict(fields, workers)
                said = {key: statistics.mean(each[key] for each in both) for key in before}
                measured = statistics.median(taken.training)
                lines.append(
                    f"| {name} | {workers} | {said['training']:.2f} s ({both[0]['training']:.2f}, {both[1]['training']:.2f}) "
                    f"| {measured:.2f} s ({min(taken.training):.2f} to {max(taken.training):.2f}) "
                    f"| {said['training'] / measured - 1:+.0%} | {said['evaluation']:.2f} s "
                    f"| {statistics.median(taken.between):.2f} s "
                    f"| {said['share']:.0%} of {said['matmul'] / 1e9:.0f} GFLOP/s |"
                )
                print(lines[-1], flush=True)
    print("\n".join(lines))
    if not args.quick:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / f"cost_model_{datetime.date.today()}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
