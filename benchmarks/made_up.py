"""Makes a set of JPEGs of ImageNet's sizes, for benchmarks/packed_sets.py; also a program of its own.

    python benchmarks/made_up.py FOLDER [--images 200000] [--classes 1000]

Each picture is a part of one of CIFAR-10's ($ROTSSL_DATA), enlarged, with noise, as FOLDER/train/CLASS/NUMBER.jpg. Sides, shapes
and bytes a picture follow what is known of ImageNet's training set: a long side of 500 for most, 4:3 and 3:2, seven tenths of
them lying; few small and few very large ones; about 100 kB on average. Contents are a function of the number alone.
"""

import argparse
import io
import multiprocessing
import os
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

# Long side, in pixels, and the share of pictures that have one up to it, from the one before.
LONG = [(80, 0.0), (300, 0.06), (490, 0.16), (500, 0.78), (640, 0.94), (1600, 0.996), (4000, 1.0)]
SHAPES, SHARES = [4 / 3, 3 / 2, 1.0, 16 / 9], [0.55, 0.3, 0.1, 0.05]
LYING = 0.7
SIDE = 1024  # of the enlarged pictures and of the fields of noise, of which each picture takes a part
STRENGTHS = (9, 12, 15, 18, 21, 24, 27)  # standard deviations of the noise, in 1 / 255
FIRST = 64  # pictures of CIFAR-10


def sources(count: int = FIRST) -> list[Image.Image]:
    """The first pictures of CIFAR-10, enlarged."""
    archive = Path(os.environ.get("ROTSSL_DATA", "")) / "cifar10-jpeg.tar.gz"
    if not archive.is_file():
        raise SystemExit("ROTSSL_DATA: expected a folder with cifar10-jpeg.tar.gz")

    def each() -> Iterator[Image.Image]:
        with tarfile.open(archive, "r|gz") as files:
            for member in files:
                if member.isfile() and (file := files.extractfile(member)):
                    small = Image.open(io.BytesIO(file.read())).convert("RGB")
                    yield small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)

    return list(islice(each(), count))


def fields() -> list[Image.Image]:
    """Grey noise of each strength, around 128."""
    normal = np.random.default_rng(0).normal(0, 1, (SIDE, SIDE))
    grey = [np.clip(128 + strength * normal, 0, 255).astype(np.uint8) for strength in STRENGTHS]
    return [Image.fromarray(field).convert("RGB") for field in grey]


def size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height of a picture."""
    sides, shares = zip(*LONG, strict=True)
    long = np.interp(rng.random(), shares, sides)
    short = long / SHAPES[int(np.searchsorted(np.cumsum(SHARES), rng.random() * sum(SHARES)))]
    both = max(8, round(long)), max(8, round(short))
    return both if rng.random() < LYING else both[::-1]


def picture(number: int, known: list[Image.Image], noise: list[Image.Image]) -> bytes:
    """A picture's file."""
    rng = np.random.default_rng(number)
    width, height = size(rng)
    scale = max(1, max(width, height) / SIDE)
    wide, high = min(SIDE, round(width / scale)), min(SIDE, round(height / scale))

    def cut(whole: Image.Image) -> Image.Image:
        left, top = (int(rng.integers(0, SIDE - side + 1)) for side in (wide, high))
        found = whole.crop((left, top, left + wide, top + high))
        return found if scale == 1 else found.resize((width, height))

    made = io.BytesIO()
    pixels = ImageChops.add(cut(known[number % len(known)]), cut(noise[rng.integers(len(noise))]), offset=-128)
    pixels.save(made, "JPEG", quality=int(rng.integers(80, 97)))
    return made.getvalue()


def part(folder: Path, numbers: range, classes: int) -> int:
    """Write some of the pictures; returns their bytes."""
    known, noise, total = sources(), fields(), 0
    for number in numbers:
        content = picture(number, known, noise)
        (folder / "train" / f"{number % classes:04}" / f"{number:07}.jpg").write_bytes(content)
        total += len(content)
    return total


def make(folder: Path, images: int, classes: int, jobs: int) -> int:
    """Write all pictures, in so many processes; returns their bytes."""
    for label in range(classes):
        (folder / "train" / f"{label:04}").mkdir(parents=True, exist_ok=True)
    # Spawned: a forked process would inherit threads' locks.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return sum(pool.map(part, [folder] * jobs, [range(i, images, jobs) for i in range(jobs)], [classes] * jobs))


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--classes", type=int, default=1000)
    args = parser.parse_args()
    total = make(args.folder, args.images, args.classes, os.cpu_count() or 1)
    print(f"{args.images:,} pictures, {total / 1e9:.1f} GB, {total / args.images / 1e3:.0f} kB each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
