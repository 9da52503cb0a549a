"""Is the time of an epoch a straight line in the number of images?

    python benchmarks/data_size.py [--sizes 5000,10000,20000,50000] [--rounds 3] [--quick] [--output FOLDER]

BYOL without rotation, small encoder, on class-balanced parts of CIFAR-10 as a folder of JPEGs, in one process on one thread;
epochs of all sizes in turn, up and down. A line is fitted to all epochs by least squares, over the images that an epoch takes
(the rest fills no batch of 256). Writes benchmarks/results/data_size_DATE.md and .csv.
"""

import argparse
import csv
import datetime
import statistics
import tempfile
from pathlib import Path

import numpy as np
from common import RESULTS, cifar10_folder, command, commit, machine, trainer

from rotssl import config as cfg
from rotssl.data import datasets
from rotssl.data.images import choose

BATCH = 256


def main() -> None:
    """Run the epochs, fit the line, write both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="5000,10000,20000,50000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of a tenth of each size, and no files")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    sizes, rounds = [int(size) // (10 if args.quick else 1) for size in args.sizes.split(",")], args.rounds
    rounds = 1 if args.quick else rounds
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        fields = {
            "data.name": "imagefolder",
            "data.root": str(cifar10_folder(Path(scratch))),
            "data.image_size": 32,
            "data.limit": max(sizes),
            "rotation.weight": 0,
            "train.epochs": 1,
            "train.batch_size": BATCH,
            "evaluation.knn_every": 0,
            "evaluation.linear": False,
            "scaling.num_workers": 0,
        }
        train = datasets.load(cfg.build(fields).data, 0.1).train
        for i in range(rounds):
            for size in sizes if i % 2 == 0 else sizes[::-1]:
                part = datasets.Splits(train.take(choose(train.labels, len(train), size)), None, ())
                own = {"data.limit": size, "storage.path": scratch, "tracking.run_name": f"{size}-{i}"}
                run = trainer({**fields, **own}, part)
                run.run()
                point = run.journal.point(1)
                rows.append(
                    (i, size, int(point["cost/samples"]), point["cost/train_seconds"], point["throughput/input_wait"])
                )
                print("round {}, {} images, {} taken: {:.2f} s, {:.2%} waited".format(*rows[-1]), flush=True)
    images, seconds = (np.array([row[k] for row in rows], float) for k in (2, 3))
    slope, start = np.polyfit(images, seconds, 1)
    rest = seconds - (slope * images + start)
    worst = int(abs(rest).argmax())
    r2 = 1 - (rest**2).sum() / ((seconds - seconds.mean()) ** 2).sum()
    lines = [
        f"# Seconds an epoch against the number of images, {datetime.date.today()}",
        "",
        f"Command: `{command()}`, commit {commit()}.",
        f"Machine: {machine()}; one process, one thread.",
        f"BYOL without rotation, small encoder, 32 x 32, batch {BATCH}; {rounds} epochs of each size, interleaved.",
        "",
        "| images | taken an epoch | seconds, median (range) | images/s, median (range) | off the line, median | waited |",
        "|---|---|---|---|---|---|",
    ]
    for size in sizes:
        own = [k for k, row in enumerate(rows) if row[1] == size]
        own_seconds, rates = [float(seconds[k]) for k in own], [float(images[k] / seconds[k]) for k in own]
        off, waited = (
            statistics.median(float(rest[k] / seconds[k]) for k in own),
            statistics.median(rows[k][4] for k in own),
        )
        lines.append(
            f"| {size} | {rows[own[0]][2]} | {statistics.median(own_seconds):.2f} ({min(own_seconds):.2f} to "
            f"{max(own_seconds):.2f}) | {statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f}) "
            f"| {off:+.1%} | {waited:.2%} |"
        )
    lines += [
        "",
        f"Least squares over all {len(rows)} epochs: {start:.2f} s + {1000 * slope:.3f} ms an image, R² = {r2:.4f}; largest "
        f"residual {abs(rest[worst]):.2f} s ({abs(rest[worst]) / seconds[worst]:.1%} of its epoch).",
    ]
    print("\n".join(lines))
    if args.quick:
        return
    args.output.mkdir(parents=True, exist_ok=True)
    target = args.output / f"data_size_{datetime.date.today()}"
    target.with_suffix(".md").write_text("\n".join(lines) + "\n")
    with target.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("round", "images", "taken", "seconds", "input_wait"))
        writer.writerows(rows)


if __name__ == "__main__":
    main()
