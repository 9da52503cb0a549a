"""Should Ray Data decode a packed set? The same batches, made in Ray Data's actors and in the loader's threads.

    python benchmarks/ray_data.py --work FOLDER [--images 8000] [--rounds 5]

Makes JPEGs of ImageNet's sizes (made_up.py), packs them, and reads an epoch of two crops of each in new processes that take
turns. Ray Data gets the numbers of the steps and calls the loader's own function on them, in one actor for each core. The work
folder is emptied at the end. Needs $ROTSSL_DATA. Writes benchmarks/results/ray_data_DATE.md.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made_up
import numpy as np
from common import RESULTS, command, commit, import_path, machine, shown
from packed_sets import BATCH, CORES, SIDE, opened, pack

ABOUT = {
    "loader": "rotssl's loader, threads of the training process",
    "ray": "Ray Data, an actor for each core, preserve_order",
    "ray-any": "the same without preserve_order",
}


class Steps:
    """The batches of an epoch by the number of their step: two crops of each picture, as the loader cuts them."""

    def __init__(self, folder: str) -> None:
        import torch

        from rotssl.base import rng
        from rotssl.data.loader import Loader

        config, splits, augment = opened(Path(folder))
        self.loader = Loader(config, splits.train.images, torch.device("cpu"), augment=augment)
        self.order = rng.permutation(rng.key(config.train.seed, 0, "order"), len(splits.train))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch whose step has the number ``id``."""
        places = np.arange(BATCH) + BATCH * int(batch["id"][0])
        ctx = self.loader._context(0, int(batch["id"][0]), places)
        return {"id": batch["id"], "pixels": self.loader._cut(self.order[places], ctx).numpy()[None]}


def by_ray(folder: Path, ordered: bool) -> Iterator[int]:
    """Numbers of the steps as their batches arrive."""
    import ray

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = ordered
    context.enable_progress_bars = False
    count = Steps(str(folder)).loader.steps_per_epoch
    batches = ray.data.range(count, override_num_blocks=count).map_batches(
        Steps, fn_constructor_args=[str(folder)], batch_size=1, num_cpus=1, concurrency=CORES
    )
    for batch in batches.iter_batches(batch_size=1, prefetch_batches=2):
        assert batch["pixels"].shape[:2] == (1, BATCH)
        yield int(batch["id"][0])


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Seconds until the first batch and pictures a second after it, and whether the order was the loader's."""
    if name == "loader":
        loader = Steps(str(folder)).loader
        began = time.perf_counter()
        found: Iterator[int] = (i for i, _ in enumerate(loader.batches(0)))
    else:
        import ray

        # One more than the actors take, for the task that hands out numbers; without it both would wait for each other.
        ray.init("local", num_cpus=CORES + 1, log_to_driver=False, include_dashboard=False)
        began = time.perf_counter()
        found = by_ray(folder, name == "ray")
    first, seen = 0.0, []
    for number in found:
        first = first or time.perf_counter() - began
        seen.append(number)
    rate = (len(seen) - 1) * BATCH / (time.perf_counter() - began - first)
    return {"first": first, "rate": rate, "order": seen == sorted(seen)}


def report(args: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The page."""
    lines = [
        f"# Decoding in Ray Data, {datetime.date.today()}",
        "",
        f"Command: `{command()}`, commit {commit()}.",
        f"Machine: {machine()}.",
        f"{args.images:,} made-up JPEGs of ImageNet's sizes in a packed set; an epoch of two crops of {SIDE} x {SIDE}, batches "
        f"of {BATCH}; {args.rounds} rounds in turn, median (range). Ratios are taken within a round. Ray's start is not counted.",
        "",
        "| reader | pictures/s after the first batch | over the loader | first batch after, s | in order |",
        "|---|---|---|---|---|",
    ]
    for name, own in found.items():
        ratios = [a["rate"] / b["rate"] for a, b in zip(own, found["loader"], strict=True)]
        firsts, rates = ([each[key] for each in own] for key in ("first", "rate"))
        ordered = sum(each["order"] for each in own)
        lines.append(
            f"| {name} | {shown(rates, '.0f')} | {shown(ratios)} | {shown(firsts)} | {ordered} of {len(own)} epochs |"
        )
    return [*lines, "", *(f"- {name}: {text}." for name, text in ABOUT.items())]


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--read", choices=ABOUT, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        print(json.dumps(measure(args.read, args.work / "set")))
        return 0
    made_up.make(args.work / "jpegs", args.images, args.images // 200, CORES)
    pack(args.work / "jpegs", args.work / "set")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ABOUT}
    for i in range(-1, args.rounds):  # the first round fills the page cache
        for name in list(ABOUT)[:: 1 if i % 2 else -1]:
            told = [sys.executable, __file__, "--read", name, "--work", str(args.work)]
            done = subprocess.run(
                told, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": import_path()}
            )
            if i >= 0:
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    lines = report(args, found)
    print("\n".join(lines))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"ray_data_{datetime.date.today()}.md").write_text("\n".join(lines) + "\n")
    for name in ("jpegs", "set"):
        shutil.rmtree(args.work / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
