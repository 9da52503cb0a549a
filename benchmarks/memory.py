"""Does a node's memory for images grow with its workers?

    python benchmarks/memory.py [--images 8000] [--workers 1,2,4] [--quick] [--output FOLDER]

Trains on pictures of 96 x 96 that it makes, seen at 32 x 32 by the small encoder, on Ray Train workers of a cluster of its own,
with the images in memory (Ray's object store) and on disk. Every second it reads /proc/PID/smaps of all processes of the cluster,
and takes the reading of the most image memory of each run. The proportional set size counts a page that N processes map 1/N times
in each, so that the sum counts every page once. Writes benchmarks/results/memory_DATE.md.
"""

import argparse
import datetime
import os
import re
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from common import RESULTS, command, commit, machine
from PIL import Image

from rotssl import config as cfg
from rotssl import lifecycle
from rotssl.base import memory
from rotssl.commands import pretrain
from rotssl.runs import journal
from rotssl.runtimes import ray_cluster

SIDE = 96
MB = 1e6


@dataclass
class Reading:
    """Bytes on the node: what maps the images, each page once (``images``) and as often as mapped; and the workers' own."""

    images: int = 0
    mapped: int = 0
    anon: tuple[int, ...] = ()


def make_pictures(folder: Path, count: int) -> None:
    """JPEGs of smooth noise in two classes."""
    for i in range(count):
        at = folder / "ab"[i % 2]
        at.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(noise).resize((SIDE, SIDE)).save(at / f"{i}.jpg")


def read(processes: list[psutil.Process], pattern: str) -> Reading:
    """What the processes hold now of the mappings whose path has the pattern."""
    found, anon = Reading(), []
    for process in processes:
        try:
            # A mapping begins with addresses and ends with its path; then come its sizes.
            text = Path(f"/proc/{process.pid}/smaps").read_text()
            if "RayTrainWorker" in process.name() + " ".join(process.cmdline()):
                anon.append(memory.parts(process.pid)["anon"])
        except (OSError, psutil.Error):
            continue  # it ended meanwhile
        for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.M):
            if re.search(pattern, mapping.partition("\n")[0]):
                sizes = dict(re.findall(r"^(Rss|Pss): +(\d+) kB", mapping, flags=re.M))
                found.images += 1024 * int(sizes["Pss"])
                found.mapped += 1024 * int(sizes["Rss"])
    found.anon = tuple(anon)
    return found


def run(store: str, workers: int, root: Path, work: Path) -> tuple[Reading, float, float]:
    """Train two epochs; the reading with the most image memory, and the logged memory of a worker and wait for input."""
    fields = {
        "data.name": "imagefolder",
        "data.root": str(root),
        "data.image_size": 32,
        "data.store": store,
        "data.cache": str(work / "cache"),
        "rotation.weight": 0,
        "train.epochs": 2,
        "evaluation.linear": False,
        "scaling.num_workers": workers,
        "storage.path": str(work / "results"),
        "tracking.run_name": f"{store}-{workers}",
    }
    config, _ = lifecycle.prepare(cfg.build(fields))
    readings, done = [Reading()], threading.Event()

    def watch() -> None:
        pattern = r"\.npy$" if store == "disk" else "plasma"
        while not done.wait(1):
            readings.append(read([psutil.Process(), *psutil.Process().children(recursive=True)], pattern))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        if pretrain.pretrain(config) != 0:
            raise SystemExit(f"{store}, {workers} workers: the run failed")
    finally:
        done.set()
        watcher.join()
    last = journal.read(config.run_dir)[2]
    best = max((reading for reading in readings if len(reading.anon) == workers), key=lambda reading: reading.images)
    return best, last["memory/host_bytes"], last["throughput/input_wait"]


def main() -> None:
    """Run all cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--quick", action="store_true", help="600 images, 1 and 2 workers, and no files")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.quick:
        args.images, args.workers = 600, "1,2"
    counts = [int(count) for count in args.workers.split(",")]
    size = args.images * 3 * SIDE * SIDE
    lines = [
        f"# Memory of a node for images, {datetime.date.today()}",
        "",
        f"Command: `{command()}`, commit {commit()}.",
        f"Machine: {machine()}; up to {max(counts)} workers on them.",
        f"{args.images} pictures of {SIDE} x {SIDE}, {size / MB:.0f} MB decoded; BYOL without rotation, small encoder at "
        "32 x 32, two epochs; each case run once. In MB of 10^6 bytes.",
        "",
        "| images | workers | image memory of the node | its share of the decoded set | sum of what each process maps of it "
        "| own memory of a worker (range) | memory/host_bytes of rank 0 | waited for input |",
        "|---|---|---|---|---|---|---|---|",
    ]
    os.environ["OMP_NUM_THREADS"] = "1"
    ray = ray_cluster.import_ray()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        make_pictures(work / "pictures", args.images)
        for store in ("memory", "disk"):
            for workers in counts:
                # More workers than cores are a matter of memory here, not of time; a cluster of its own for each case.
                ray.init("local", num_cpus=workers, include_dashboard=False, log_to_driver=False)
                try:
                    found, logged, waited = run(store, workers, work / "pictures", work)
                finally:
                    ray.shutdown()
                own = [anon / MB for anon in found.anon]
                lines.append(
                    f"| {store} | {workers} | {found.images / MB:.0f} | {found.images / size:.2f} | {found.mapped / MB:.0f} "
                    f"| {min(own):.0f} to {max(own):.0f} | {logged / MB:.0f} | {waited:.2%} |"
                )
                print(lines[-1], flush=True)
    lines += [
        "",
        "Image memory on disk is page cache, which the kernel takes back when it needs memory; in memory it is not.",
    ]
    print("\n".join(lines))
    if args.quick:
        return
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"memory_{datetime.date.today()}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
