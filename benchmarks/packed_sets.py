"""Packed sets at the size of ImageNet's pictures: packing, start, memory, and pictures a second against torchvision's loader.

    python benchmarks/packed_sets.py --work FOLDER [--images 200000] [--rounds 5] [--keep] [--quick]

Makes JPEGs of ImageNet's sizes (made_up.py), packs them with jobs/pack.py, and reads them in processes of their own that take
turns (paired.py), all the same pictures in the same number of processes or threads as there are cores. The work folder needs room
for the pictures twice, and is emptied at the end. Needs $ROTSSL_DATA. With the right to empty the page cache (root), packing and
half of the reading begin without it. Writes benchmarks/results/packed_sets_DATE.md.
"""

import argparse
import datetime
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import made_up
from common import RESULTS, command, commit, import_path, machine, shown
from paired import serve, started, take_turns

BATCH, SIDE = 64, 224
READ = 4096  # pictures that are read, over and over
PER_CLASS = 200  # pictures
CORES = os.cpu_count() or 1
ABOUT = {
    "decode": "bare decoding: whole pictures from memory, libjpeg-turbo by torchcodec, a thread for each core",
    "decode-pillow": "the same by Pillow, which ImageFolder takes",
    "decode-crop": "bare decoding by torchcodec, and two crops of each picture by torch, nothing else",
    "crops": "rotssl's loader: two crops of each picture, flipped, on the way to the step",
    "views": "the same with all of SimCLR's augmentation, on the CPU; on a GPU it would do that",
    "torchvision-crops": "ImageFolder and DataLoader: two times RandomResizedCrop and flip of each picture",
    "torchvision-views": "the same with all of SimCLR's augmentation in the workers",
}


MADE = ["jpegs", "few", "set", "fewer"]  # folders in the work folder
FILES = ["crops", "torchvision-crops"]  # those that read without a page cache, too


def empty_page_cache() -> bool:
    """Forget all that was read from disks; False without the right to."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def opened(folder: Path) -> tuple[Any, Any, Any]:
    """The configuration, splits and augmentation of a run from the packed set."""
    from rotssl import config as cfg
    from rotssl.data import datasets
    from rotssl.data.augment import Augment

    config = cfg.build(
        {
            **{"data.name": "packed", "data.root": str(folder), "data.image_size": SIDE, "train.batch_size": BATCH},
            **{"method.name": "simclr", "rotation.weight": 0, "views.blur": 0.5},
        }
    )
    info = datasets.inspect(config.data, 0.1)
    config = cfg.resolve(config, info.image_size, info.train_size)
    mean, std = datasets.normalization("packed")
    return config, datasets.load(config.data, 0.1), Augment(config.views, SIDE, mean, std, 0)


def same_files(jpegs: Path, images: Any) -> list[str]:
    """The source files of packed pictures: their names stand before them in the tar files."""
    found = []
    for row in images.rows:
        header = images.shards.read(int(row["shard"]), int(row["offset"]) - 512, 100)
        found.append(str(jpegs / header.rstrip(b"\0").decode()))
    return found


def contender(name: str, folder: Path) -> tuple[Callable[[int], None], dict[str, Any]]:
    """A reader: a function that takes so many batches."""
    import numpy as np
    import torch

    config, splits, augment = opened(folder / "set")
    index = np.sort(np.random.default_rng(0).choice(len(splits.train), min(READ, len(splits.train)), replace=False))
    images = splits.train.images.subset(index)
    if name.startswith("torchvision"):
        batches = torchvision_batches(same_files(folder / "jpegs", images), name.endswith("views"))
    elif name.startswith("decode"):
        batches = bare(images, name)
    else:
        batches = ours(config, images, augment, name == "views")

    def run(count: int) -> None:
        for batch in islice(batches, count):
            assert len(batch) == BATCH

    return run, {"torch": torch.__version__}


def ours(config: Any, images: Any, augment: Any, views: bool) -> Iterator[Any]:
    """Batches of the loader."""
    import torch

    from rotssl.data.loader import Loader

    loader = Loader(config, images, torch.device("cpu"), augment=augment)
    for epoch in cycle(range(config.train.epochs)):
        for cut, ctx in loader.batches(epoch):
            yield augment(cut, ctx).full[0] if views else cut


def bare(images: Any, name: str) -> Iterator[Any]:
    """Batches of decoded pictures."""
    import io

    import torch
    from PIL import Image
    from torch.nn import functional as F
    from torchcodec.decoders import decode_jpeg

    contents = [images.shards.read(int(r["shard"]), int(r["offset"]), int(r["length"])) for r in images.rows]

    def work(i: int) -> Any:
        if name == "decode-pillow":
            return Image.open(io.BytesIO(contents[i])).convert("RGB")
        whole = decode_jpeg(contents[i])
        if name == "decode-crop":
            # Of the middle area of the scales from 0.08 to 1.
            high, wide = (max(1, int(0.73 * side)) for side in whole.shape[1:])
            for top, left in ((0, 0), (whole.shape[1] - high, whole.shape[2] - wide)):
                part = whole[None, :, top : top + high, left : left + wide]
                F.interpolate(
                    part.contiguous(memory_format=torch.channels_last), (SIDE, SIDE), mode="bilinear", antialias=True
                )
        return whole

    with ThreadPoolExecutor(CORES) as pool:
        for first in cycle(range(0, len(contents) - BATCH + 1, BATCH)):
            yield list(pool.map(work, range(first, first + BATCH)))


class Folder:
    """Files as a data set with two views of each, as ImageFolder with a transformation that makes two."""

    def __init__(self, files: list[str], transform: Callable[[Any], Any]) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        import torch
        from torchvision.datasets.folder import default_loader

        whole = default_loader(self.files[index])
        return torch.stack([self.transform(whole) for _ in range(2)])


def torchvision_batches(files: list[str], views: bool) -> Iterator[Any]:
    """Batches of a DataLoader."""
    import torch
    from torchvision import transforms as T

    crop = [T.RandomResizedCrop(SIDE), T.RandomHorizontalFlip()]
    colours = [
        T.RandomApply([T.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
        T.RandomGrayscale(0.2),
        T.RandomApply([T.GaussianBlur(23)], 0.5),
        T.ToTensor(),
        T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    made = T.Compose([*crop, *(colours if views else [T.PILToTensor()])])
    loader = torch.utils.data.DataLoader(
        Folder(files, made),  # type: ignore[arg-type]
        BATCH,
        shuffle=True,
        num_workers=CORES,
        drop_last=True,
        persistent_workers=True,
    )
    while True:
        yield from loader


def start(folder: Path) -> dict[str, float]:
    """Seconds until the set is open and until the first batch, and MB of memory after fifty batches."""
    import torch

    from rotssl.data.loader import Loader

    began = time.perf_counter()
    config, splits, augment = opened(folder)
    there = time.perf_counter()
    batches = Loader(config, splits.train.images, torch.device("cpu"), augment=augment).batches(0)
    next(batches)
    first = time.perf_counter()
    for _ in islice(batches, 49):
        continue
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"images": len(splits.train), "open": there - began, "first": first - began, "MB": memory}


def started_in(folder: Path) -> dict[str, float]:
    """``start`` in a process of its own."""
    told = [sys.executable, __file__, "--start", "--work", str(folder)]
    done = subprocess.run(
        told, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": import_path()}
    )
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def pack(source: Path, target: Path) -> float:
    """Seconds that jobs/pack.py takes."""
    began = time.perf_counter()
    job = RESULTS.parent.parent / "jobs" / "pack.py"
    subprocess.run([sys.executable, str(job), str(source), str(target)], check=True)
    return time.perf_counter() - began


def report(args: argparse.Namespace, facts: dict[str, Any], samples: dict[bool, dict[str, list[Any]]]) -> list[str]:
    """The page."""
    lines = [
        f"# Packed sets of ImageNet's sizes, {datetime.date.today()}",
        "",
        f"Command: `{command()}`, commit {commit()}.",
        f"Machine: {machine()}.",
        f"{args.images:,} made-up JPEGs in classes of {PER_CLASS}, {facts['bytes'] / 1e9:.1f} GB, "
        f"{facts['bytes'] / args.images / 1e3:.0f} kB each.",
        "",
        f"Packing on {CORES} cores{' from a disk whose page cache was empty' if facts['emptied'] else ''}: "
        f"{facts['pack']:.0f} s, {args.images / facts['pack']:.0f} pictures/s, {facts['bytes'] / facts['pack'] / 1e6:.0f} MB/s.",
        "",
        "Start, each in a new process with torch loaded:",
        "",
        "| pictures | set open, s | first batch, s | memory after 50 batches, MB |",
        "|---|---|---|---|",
        *(f"| {s['images']:,} | {s['open']:.2f} | {s['first']:.2f} | {s['MB']:.0f} |" for s in facts["starts"]),
        "",
        f"Pictures a second, the same {READ:,}, {SIDE} x {SIDE}, batches of {BATCH}; {args.rounds} rounds of {args.batches} "
        "batches in turn, median (range). Ratios are taken within a round.",
        "",
        "| reader | page cache | pictures/s | of bare decoding | of bare decoding with crops | over torchvision's loader |",
        "|---|---|---|---|---|---|",
    ]
    for warm, found in samples.items():
        speed = {name: [args.batches * BATCH / each.seconds for each in own] for name, own in found.items()}
        for name, own in speed.items():
            peer = f"torchvision-{name}"
            ratios = [
                shown([a / b for a, b in zip(own, speed[other], strict=True)])
                if other in speed and other != name
                else ""
                for other in ("decode", "decode-crop", peer)
            ]
            cache = "empty" if not warm else "warm"
            lines.append(f"| {name} | {cache} | {shown(own, '.0f')} | {' | '.join(ratios)} |")
    others = [each.foreign for found in samples.values() for own in found.values() for each in own]
    lines += [
        "",
        f"Other processes used {statistics.median(others):.0%} of the cores (median; at most {max(others):.0%}).",
        "",
    ]
    return [*lines, *(f"- {name}: {text}." for name, text in ABOUT.items())]


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--keep", action="store_true", help="the work folder; what is there is not made again")
    parser.add_argument("--quick", action="store_true", help="2,000 pictures, one round, and no page")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--serve", choices=ABOUT, help=argparse.SUPPRESS)
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        print(json.dumps(start(args.work)))
        return 0
    if args.serve:
        serve(lambda: contender(args.serve, args.work), 4)
        return 0
    if args.quick:
        args.images, args.rounds, args.batches = 2000, 1, 3
    facts = prepare(args)
    samples = {True: read(args, list(ABOUT), True)}
    if facts["emptied"]:
        samples[False] = read(args, FILES, False)
    lines = report(args, facts, samples)
    print("\n".join(lines))
    if not args.keep:
        for name in MADE:
            shutil.rmtree(args.work / name)
        (args.work / "facts.json").unlink()
    if not args.quick:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / f"packed_sets_{datetime.date.today()}.md").write_text("\n".join(lines) + "\n")
    return 0


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Make and pack the pictures, and measure packing and start; with --keep, what an earlier call measured is taken."""
    args.work.mkdir(parents=True, exist_ok=True)
    noted = args.work / "facts.json"
    facts: dict[str, Any] = json.loads(noted.read_text()) if noted.exists() else {}
    for name, images in (("jpegs", args.images), ("few", 2000)):
        if not (args.work / name).exists():
            made_up.make(args.work / name, images, images // PER_CLASS, CORES)
    if facts.get("images", args.images) != args.images:
        raise SystemExit(f"--work: the folder holds {facts['images']} images")
    if "pack" not in facts:
        facts["images"] = args.images
        facts["bytes"] = sum(file.stat().st_size for file in (args.work / "jpegs").rglob("*.jpg"))
        facts["emptied"] = empty_page_cache()
        facts["pack"] = pack(args.work / "jpegs", args.work / "set")
        pack(args.work / "few", args.work / "fewer")
        noted.write_text(json.dumps(facts))
    facts["starts"] = [started_in(args.work / name) for name in ("fewer", "set")]
    return facts


def read(args: argparse.Namespace, names: list[str], warm: bool) -> dict[str, list[Any]]:
    """Samples of the readers."""
    commands = {name: [sys.executable, __file__, "--serve", name, "--work", str(args.work)] for name in names}
    with started(commands, CORES, args.work) as contenders:
        if warm:
            readers = [each for each in contenders if each.name in FILES]
            take_turns(readers, dict.fromkeys(FILES, READ // BATCH), 1)  # until all of it was read
            return take_turns(contenders, dict.fromkeys(commands, args.batches), args.rounds)
        found: dict[str, list[Any]] = {name: [] for name in names}
        for i in range(args.rounds):
            for each in contenders[i % 2 :] + contenders[: i % 2]:
                empty_page_cache()
                found[each.name].append(each.ask(args.batches))
        return found


if __name__ == "__main__":
    sys.exit(main())
