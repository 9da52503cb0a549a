"""How long from the command to the first step, and where does it go?

    python benchmarks/startup.py [--runs 3] [--workers 0 1 2] [--quick]

Starts jobs/pretrain.py's own path in new processes, without Ray and on one and two Ray Train workers, the order changing from run
to run, and notes the clock as its functions begin and end; the functions are wrapped from outside, in the workers too. The files
are in the system's cache after the first start, which is left out. Writes benchmarks/results/startup_DATE.md.
"""

import argparse
import datetime
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, command, commit, machine, shown

ROOT = RESULTS.parent.parent
FIELDS = {"data.limit": 512, "train.epochs": 1, "evaluation.knn_every": 0, "evaluation.linear": False}
# What is shown, in the order in which it happens; the parts of a worker are rank 0's.
PARTS = (
    "imports of the driver",
    "configuration and data checked",
    "Ray: import and cluster",
    "MLflow: import, store, run",
    "Ray Train until its worker runs",
    "torch and engine imported",
    "images",
    "model and optimizer",
    "DDP",
    "FLOPs counted",
    "first step",
    "the rest",
)


class Clock:
    """Adds lines of (part, start, end) to a file, from any process."""

    def __init__(self, file: str) -> None:
        self.file = file

    def note(self, part: str, start: float, end: float) -> None:
        """Seconds since 1970, which all processes of a machine share."""
        with open(self.file, "a") as out:
            out.write(json.dumps([part, start, end]) + "\n")

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Note how long a function of a module or class takes, each time."""
        inner: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.time()
            try:
                return inner(*args, **kwargs)
            finally:
                self.note(part, start, time.time())

        setattr(owner, name, timed)


def watch_engine(clock: Clock) -> None:
    """Wrap what a worker does before and in its first step."""
    start = time.time()
    from rotssl.base import distributed
    from rotssl.engine import trainer

    clock.note("torch and engine imported", start, time.time())
    clock.wrap(trainer, "build_pretrainer", "model and optimizer")
    clock.wrap(trainer, "build_optimizer", "model and optimizer")
    clock.wrap(trainer, "CostCurve", "FLOPs counted")
    clock.wrap(trainer.Trainer, "step", "step")
    clock.wrap(distributed, "data_parallel", "DDP")


def child(file: str, began: float, workers: int, storage: str) -> int:
    """One start, in a process of its own; returns the exit code."""
    clock = Clock(file)
    from rotssl import lifecycle
    from rotssl.commands import pretrain
    from rotssl.config.cli import parse
    from rotssl.tracking import writer

    clock.note("imports of the driver", began, time.time())
    clock.wrap(lifecycle, "prepare", "configuration and data checked")
    clock.wrap(writer, "open_run", "MLflow: import, store, run")
    if workers == 0:
        from rotssl.data import datasets

        inner = lifecycle._run_here

        def here(*args: Any) -> Any:
            watch_engine(clock)
            return inner(*args)

        lifecycle._run_here = here  # type: ignore[assignment]
        clock.wrap(lifecycle, "_check_local_gpu", "torch and engine imported")
        clock.wrap(datasets, "load", "images")
    else:
        from rotssl.runtimes import ray_cluster, ray_train

        start = time.time()
        ray = ray_cluster.import_ray()
        clock.note("Ray: import and cluster", start, time.time())
        clock.wrap(ray, "init", "Ray: import and cluster")
        fit, work = ray_train.fit, ray_train._work

        def started(*args: Any) -> Any:
            clock.note("fit", time.time(), time.time())
            return fit(*args)

        def watched(task: dict[str, Any]) -> Any:  # pickled with what it refers to, since it is of the main module
            import ray.train

            if ray.train.get_context().get_world_rank() == 0:
                clock.note("worker", time.time(), time.time())
                watch_engine(clock)
                clock.wrap(ray, "get", "images")
            return work(task)

        ray_train.fit, ray_train._work = started, watched
    flags = FIELDS | {"storage.path": storage, "scaling.num_workers": workers}
    words = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    return pretrain.run(parse(words, "jobs/pretrain.py", ""))


def start(workers: int) -> dict[str, float]:
    """Seconds of each part of one start, and ``whole``, from the command to the end of the first step.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryDirectory(prefix="rotssl-startup-") as folder:
        file = Path(folder, "clock")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local"}
        began = time.time()
        words = ["--child", str(file), str(began), str(workers), folder]
        done = subprocess.run(
            [sys.executable, __file__, *words], env=environment, capture_output=True, text=True, timeout=300
        )
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-3000:])
        notes = [json.loads(line) for line in file.read_text().splitlines()]
    end = min(end for part, _, end in notes if part == "step")
    taken = dict.fromkeys(PARTS, 0.0)
    for part, first, last in notes:
        if part in taken and last <= end:
            taken[part] += last - first
        elif part == "step" and last == end:
            taken["first step"] = last - first
    if workers:
        fit, worker = (next(first for part, first, _ in notes if part == name) for name in ("fit", "worker"))
        taken["Ray Train until its worker runs"] = worker - fit
    whole = end - began
    taken["the rest"] = whole - sum(taken.values())
    return taken | {"whole": whole}


def main() -> None:
    """Start a few times and write where the time went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="one run of each, and no files")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    found: dict[int, list[dict[str, float]]] = {workers: [] for workers in args.workers}
    if not args.quick:
        start(args.workers[-1])
    for i in range(1 if args.quick else args.runs):
        for workers in args.workers if i % 2 == 0 else args.workers[::-1]:
            found[workers].append(start(workers))
            print(workers, f"{found[workers][-1]['whole']:.1f} s", flush=True)
    labels = [f"{workers} Ray Train worker{'s' * (workers > 1)}" if workers else "without Ray" for workers in found]
    lines = [
        f"# From the command to the first step, {datetime.date.today()}",
        "",
        f"Command: `{command()}`, commit {commit()}.",
        f"Machine: {machine()}; shared with others. Seconds, median (range) of {len(found[args.workers[0]])} starts each, on",
        "a cluster of their own; BYOL with rotation in place on fashion-mnist-sample; files in the system's cache.",
        "",
        f"| | {' | '.join(labels)} |",
        f"|---|{'---|' * len(labels)}",
    ]

    def row(label: str, values: Sequence[Sequence[float]]) -> str:
        return f"| {label} | " + " | ".join(shown(each, ".1f") for each in values) + " |"

    lines += [row(part, [[run[part] for run in runs] for runs in found.values()]) for part in (*PARTS, "whole")]
    print("\n".join(lines))
    if not args.quick:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / f"startup_{datetime.date.today()}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(child(sys.argv[2], float(sys.argv[3]), int(sys.argv[4]), sys.argv[5]))
    main()
