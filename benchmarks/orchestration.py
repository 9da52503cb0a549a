"""What does the cluster cost an epoch, in steady state?

    python benchmarks/orchestration.py [--pairs 3] [--epochs 8] [--encoder small] [--limit N] [--quick] [--work FOLDER]

Pairs of runs, the order changing from pair to pair: the engine under LocalRuntime, without MLflow, against jobs/pretrain.py
on one Ray Train worker with everything on. Both train on one thread, and write the same journal and the same checkpoints. An
epoch is the wall time between two lines of the journal, so all that happens between epochs is in it; the first one, which warms
up, is left out. Writes benchmarks/results/orchestration_DATE.md and .csv.
"""

import argparse
import csv
import datetime
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import RESULTS, command, commit, machine, shown, trainer

from rotssl.runs import journal

ROOT = RESULTS.parent.parent
LOOK_S = 0.005  # how often the journal is looked at


@dataclass
class Epochs:
    """Seconds of each epoch of a run but the first: wall time, and the part of it that is training."""

    wall: list[float]
    training: list[float]

    @property
    def between(self) -> list[float]:
        """The rest: evaluation, journal, checkpoint, reports."""
        return [wall - training for wall, training in zip(self.wall, self.training, strict=True)]


def run(name: str, workers: int, epochs: int, fields: Mapping[str, Any], work: Path) -> Epochs:
    """One run in a process of its own, watched from outside.

    Raises:
        RuntimeError: it failed.
    """
    fields = {**fields, "storage.path": str(work), "tracking.run_name": name, "train.epochs": epochs}
    fields |= {"scaling.num_workers": workers}
    if workers:
        flags = [part for key, value in fields.items() for part in (f"--{key}", str(value))]
        command = [sys.executable, str(ROOT / "jobs" / "pretrain.py"), *flags]
    else:
        code = f"import sys; sys.path.insert(0, {str(RESULTS.parent)!r}); from common import train; train({fields!r})"
        command = [sys.executable, "-c", code]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local"}
    folder = work / "rotssl" / name
    path, seen, ends = folder / journal.Journal.NAME, 0, []
    with (work / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment)
        while process.poll() is None:
            size = path.stat().st_size if path.exists() else 0
            if size > seen:
                seen = size
                ends.append(time.perf_counter())
            time.sleep(LOOK_S)
    if process.returncode != 0 or len(ends) != epochs:
        raise RuntimeError(f"{name} ended with {process.returncode} after {len(ends)} epochs; see {log.name}")
    points = journal.read(folder)
    seconds = [points[epoch]["cost/train_seconds"] for epoch in sorted(points)]
    wall, training = ([after - before for before, after in pairwise(clock)] for clock in (ends, seconds))
    return Epochs(wall, training)


def parts(fields: Mapping[str, Any], work: Path, repeats: int = 9) -> dict[str, list[float]]:
    """Seconds of what the end of an epoch consists of, one after the other in this process."""
    from rotssl.runs import checkpoint
    from rotssl.runs.journal import Journal
    from rotssl.tracking import store
    from rotssl.tracking import writer as tracking

    engine = trainer({**fields, "storage.path": str(work), "scaling.num_workers": 0})
    engine.step(*next(engine.batches(0)))  # so that the optimizer has its state
    uri = store.default_uri(str(work))
    run_id = tracking.open_run(uri, "parts", "parts", None, {}, {}, work / "artifacts")
    book, tracker = Journal(work / "parts"), tracking.Tracker(uri, run_id)
    points: journal.Points = {}
    taken: dict[str, list[float]] = {}

    def timed(part: str, call: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = call()
        taken.setdefault(part, []).append(time.perf_counter() - started)
        return result

    for epoch in range(1, repeats + 1):
        points[epoch] = {f"metric/{i}": float(i) for i in range(17)} | {"cost/epochs": float(epoch)}
        timed("journal", functools.partial(book.append, epoch, points[epoch]))
        state = timed("copy of the state", lambda: checkpoint.snapshot(engine.state(1)))
        timed("writing it", functools.partial(checkpoint.save, state, work / "parts" / checkpoint.name(1)))
        timed("MLflow", functools.partial(tracker.sync, points))
    size = (work / "parts" / checkpoint.name(1) / checkpoint.FILE).stat().st_size
    return {f"{part} ({size / 1e6:.1f} MB)" if part == "writing it" else part: each[1:] for part, each in taken.items()}


def main() -> None:
    """Run the pairs and write what they show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--encoder", default="small", help="encoder.name")
    parser.add_argument("--limit", type=int, default=None, help="data.limit; default: the whole sample")
    parser.add_argument("--quick", action="store_true", help="one pair of 3 epochs on 1,024 images, and no files")
    parser.add_argument("--work", type=Path, default=None, help="folder of the runs, empty; default: a temporary one")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.epochs, args.limit = 1, 3, 1024
    fields = {"data.name": "fashion-mnist-sample", "encoder.name": args.encoder, "evaluation.linear": False}
    fields |= {} if args.limit is None else {"data.limit": args.limit}
    found: list[dict[str, Epochs]] = []
    with tempfile.TemporaryDirectory(prefix="rotssl-orchestration-") as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        for pair in range(args.pairs):
            kinds = [("local", 0), ("ray", 1)]
            taken = {
                kind: run(f"{kind}{pair}", workers, args.epochs, fields, work)
                for kind, workers in (kinds if pair % 2 == 0 else kinds[::-1])
            }
            found.append(taken)
            print(pair, {kind: f"{statistics.median(each.wall):.2f} s" for kind, each in taken.items()}, flush=True)
        pieces = parts(fields, work)
    lines = [
        f"# What the cluster costs an epoch, {datetime.date.today()}",
        "",
        f"Command: `{command()}`, commit {commit()}.",
        f"Machine: {machine()}; shared with others. {args.pairs} pairs of runs of {args.epochs} epochs, one thread each,",
        "the first epoch left out. BYOL with rotation in place on fashion-mnist-sample"
        f"{f' ({args.limit} images)' if args.limit else ''}, encoder {args.encoder}, kNN every epoch.",
        "",
        "| an epoch, median (range) over all pairs | without Ray, no MLflow | one Ray Train worker, everything on "
        "| Ray over local: median of the pairs' ratios (range) |",
        "|---|---|---|---|",
    ]
    for label, part in (("wall time", "wall"), ("training", "training"), ("between trainings", "between")):
        cells = []
        for kind in ("local", "ray"):
            values = [value for taken in found for value in getattr(taken[kind], part)]
            cells.append(f"{statistics.median(values):.3f} s ({min(values):.3f} to {max(values):.3f})")
        ratios = [
            statistics.median(getattr(taken["ray"], part)) / statistics.median(getattr(taken["local"], part))
            for taken in found
        ]
        lines.append(f"| {label} | {cells[0]} | {cells[1]} | {shown(ratios, '.3f')} |")
    extra = [statistics.median(taken["ray"].between) - statistics.median(taken["local"].between) for taken in found]
    share = [value / statistics.median(taken["local"].wall) for value, taken in zip(extra, found, strict=True)]
    lines += [
        "",
        f"What Ray, reports and MLflow add between two trainings: median {1000 * statistics.median(extra):.0f} ms "
        f"({1000 * min(extra):.0f} to {1000 * max(extra):.0f}), {statistics.median(share):.1%} of an epoch "
        f"({min(share):.1%} to {max(share):.1%}). The ratio of the wall times has the machine's other load in it as well.",
    ]
    lines += [
        "",
        "The end of an epoch in parts, each alone in one process, ms: "
        + ", ".join(f"{part} {shown([1000 * s for s in each], '.0f')}" for part, each in pieces.items())
        + ". The copy is on the training thread, the others beside it.",
    ]
    print("\n".join(lines))
    if args.quick:
        return
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"orchestration_{datetime.date.today()}"
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["pair", "kind", "epoch", "wall_s", "training_s"])
        for pair, taken in enumerate(found):
            for kind, each in taken.items():
                for epoch, (wall, training) in enumerate(zip(each.wall, each.training, strict=True), start=2):
                    writer.writerow([pair, kind, epoch, f"{wall:.4f}", f"{training:.4f}"])


if __name__ == "__main__":
    main()
