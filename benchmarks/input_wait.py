"""Does the step wait for its batch, and does a thread that cuts out the next one help?

    python benchmarks/input_wait.py [--rounds 6] [--steps 10] [--images 20000] [--quick] [--output FOLDER]

BYOL with the small encoder on CIFAR-10 as a folder of JPEGs, batch 256: with so light a step the input weighs most. Images in
memory or mapped from disk, each with and without the thread, in rounds of a rotating order; a round runs some steps of each. The
ratio is that of the median step to the one of the same round in memory without the thread. The disk store also with its pages
dropped from the page cache before each turn, so that they are read from the disk.
Writes benchmarks/results/input_wait_DATE.md.
"""

import argparse
import datetime
import itertools
import mmap
import os
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, cifar10_folder, command, commit, machine, trainer

from rotssl.data.loader import AHEAD


def drop_pages(images: np.memmap[Any, Any], cache: Path) -> None:
    """Forget what the page cache holds of the stores, so that they are read from the disk."""
    images._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]  # mapped pages are not dropped
    for file in cache.glob("*.npy"):
        with file.open("rb") as store:
            os.posix_fadvise(store.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def turn(run: Any, steps: int) -> tuple[float, float]:
    """Median seconds of a step with its batch, and the share of the time that it waited for the batch; after a first step."""
    batches = run.batches(0)
    run.step(*next(batches))
    waited, taken = run.loader.waited, [time.perf_counter()]
    for images, ctx in islice(batches, steps):
        run.step(images, ctx)
        taken.append(time.perf_counter())
    batches.close()
    share = (run.loader.waited - waited) / (taken[-1] - taken[0])
    return statistics.median(b - a for a, b in itertools.pairwise(taken)), share


def main() -> None:
    """Run the rounds and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--quick", action="store_true", help="one round of two steps, on one thread, and no files")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.steps, args.images = 1, 2, 2000
    import torch

    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        fields = {
            "data.name": "imagefolder",
            "data.root": str(cifar10_folder(work)),
            "data.cache": str(work / "cache"),
            "data.limit": args.images,
            "rotation.weight": 0,
            "scaling.num_workers": 0,
            "storage.path": str(work / "results"),
        }
        runs = {store: trainer({**fields, "data.store": store}) for store in ("memory", "disk")}
        disk = runs["disk"].splits.train.images
        lines = [
            f"# Does the step wait for its batch, {datetime.date.today()}",
            "",
            f"Command: `{command()}`, commit {commit()}.",
            f"Machine: {machine()}.",
            f"BYOL without rotation, small encoder, {args.images} images of 32 x 32, batch 256; {args.rounds} rounds of "
            f"{args.steps} steps each. Ratios and waits: median over the rounds (range).",
            "",
            "| torch threads | images | input thread | step, median | over memory without the thread | share waited |",
            "|---|---|---|---|---|---|",
        ]
        for threads in (1,) if args.quick else (1, 2):
            torch.set_num_threads(threads)
            kinds = [
                (place, ahead) for place in ("memory", "disk", "disk, not in the page cache") for ahead in (0, AHEAD)
            ]
            found: dict[tuple[str, int], list[tuple[float, float]]] = {kind: [] for kind in kinds}
            for i in range(args.rounds):
                for place, ahead in kinds[i % len(kinds) :] + kinds[: i % len(kinds)]:
                    run = runs[place.split(",")[0]]
                    run.loader.ahead = ahead
                    if place.startswith("disk,"):
                        drop_pages(disk, work / "cache")
                    found[place, ahead].append(turn(run, args.steps))
                    print(
                        f"{threads} threads, round {i}, {place}, {ahead} ahead: {found[place, ahead][-1]}", flush=True
                    )
            for (place, ahead), values in found.items():
                seconds, shares = zip(*values, strict=True)
                ratios = [s / base for s, (base, _) in zip(seconds, found["memory", 0], strict=True)]
                lines.append(
                    f"| {threads} | {place} | {'yes' if ahead else 'no'} | {1000 * statistics.median(seconds):.1f} ms "
                    f"| {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) "
                    f"| {statistics.median(shares):.2%} ({min(shares):.2%} to {max(shares):.2%}) |"
                )
    print("\n".join(lines))
    if args.quick:
        return
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"input_wait_{datetime.date.today()}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
