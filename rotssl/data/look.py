"""Look at a folder of images without training: what a run would read, by class and split, and which files are bad.

On the command line:

    python -m rotssl.data.look DIR [--name tiny-imagenet] [--holdout 0.1] [--picture FILE]
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rotssl.config.datasets import DATASETS
from rotssl.config.fields import ConfigError, load_class
from rotssl.data import decoding, likeness
from rotssl.data.folders import Folder, Scan
from rotssl.data.images import DataError, Pixels, Sums, hold_out
from rotssl.data.likeness import Index

SIDE, COLUMNS, ROWS = 64, 12, 6  # of the picture: pixels, classes, images of each
PAIRS = 10**10  # of images that are compared at most; about a minute
FAILED, BAD_CONFIG = 1, 2  # exit codes, as those of the jobs


def _divided(scan: Scan, holdout: float) -> dict[str, Folder]:
    """The splits as a run divides them."""
    train = scan.splits["train"]
    if "validation" in scan.splits or train.labels is None or holdout == 0:
        return scan.splits
    held = hold_out(train.labels, holdout)
    return {"train": train.take(np.setdiff1d(np.arange(len(train)), held)), "validation": train.take(held)}


def _test(name: str, root: str, scan: Scan) -> dict[str, Folder]:
    """The labelled test split, if there is one, which a run does not read."""
    target = DATASETS[name].test_target
    found = load_class(target)(str(Path(root).expanduser()), scan.classes) if target else None
    return {} if found is None else {"test": found}


def _table(parts: dict[str, Folder], classes: Sequence[str]) -> list[str]:
    """A line for each class: its name, and its number of images in each split."""
    width = max(map(len, ("class", *classes)))
    head = " ".join([f"{'class':<{width}}", *(f"{name:>10}" for name in parts)])
    counts = [np.bincount(part.labels, minlength=len(classes)) for part in parts.values() if part.labels is not None]
    rows = zip(classes, *counts, strict=True)
    return [head, *(" ".join([f"{name:<{width}}", *(f"{n:>10,}" for n in each)]) for name, *each in rows)]


def _twins(name: str, train: Folder, other: Folder, ours: Sums, theirs: Sums) -> list[str]:
    """Lines about images of a split of this name that are also in train, or look like one there."""

    def pixels(first: Index, second: Index) -> tuple[Pixels, Pixels]:
        pairs = [other.files[i] for i in first], [train.files[i] for i in second]
        return decoding.squares(pairs[0], SIDE), decoding.squares(pairs[1], SIDE)

    found = likeness.twins(ours, theirs, pixels, PAIRS)
    lines = [f"{other.files[i]} has the pixels of {train.files[j]}" for i, j in found.same]
    lines += [f"{other.files[i]} looks like {train.files[j]}" for i, j in found.near]
    among = f"; {found.compared:,} of {found.total:,} were compared" if found.compared < found.total else ""
    head = f"warning: images of {name} that are also in train, or look like one there: {len(lines):,}{among}"
    return [head, *lines] if lines else []


def _picture(train: Folder, classes: Sequence[str], path: Path) -> None:
    """Save a picture with a column for each of the first classes; files that cannot be read leave it black.

    Raises:
        ConfigError: it cannot be written.
    """
    import torch

    from rotssl.data.views_grid import save_views

    labels = np.zeros(len(train), np.int64) if train.labels is None else train.labels
    columns = {}
    for label, name in enumerate((classes or ("unlabelled",))[:COLUMNS]):
        files = [train.files[i] for i in np.flatnonzero(labels == label)[:ROWS]]
        pixels = np.full((ROWS, 3, SIDE, SIDE), 255, np.uint8)
        block = decoding.squares(files, SIDE)
        pixels[: len(block)] = block
        columns[name] = [torch.from_numpy(pixels) / 255]
    try:
        save_views(columns, (0.0,), (1.0,), path, ROWS)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--picture: cannot write {path}: {error}") from error


def look(argv: Sequence[str]) -> None:
    """Print what a folder holds.

    Raises:
        ConfigError: the folder cannot be used.
        DataError: no file can be read.
    """
    known = [name for name, spec in DATASETS.items() if spec.kind == "folders"]
    parser = argparse.ArgumentParser(prog="python -m rotssl.data.look", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", metavar="DIR", help="the folder, as data.root")
    parser.add_argument("--name", choices=known, default="imagefolder", help="as data.name")
    parser.add_argument("--holdout", type=float, default=0.1, help="as evaluation.holdout")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write a picture of the classes")
    given = parser.parse_args(argv)
    scan: Scan = DATASETS[given.name].load()(str(Path(given.root).expanduser()))
    parts = _divided(scan, given.holdout) | _test(given.name, given.root, scan)

    def forget(first: int, block: Pixels) -> None:
        """The pixels are not kept, so that the folder may be larger than memory."""

    files = [file for part in parts.values() for file in part.files]
    found = decoding.decode(files, None, SIDE, lambda shape: forget, skip=True)
    seen = found.seen
    left = {name: len(part) for name, part in parts.items()}
    where = {file: name for name, part in parts.items() for file in part.files} if seen.bad else {}
    for file, _ in seen.bad:
        left[where[file]] -= 1
    print(seen.line(left, scan.classes, scan.skipped))
    for line in (*scan.warnings, *seen.shade_warnings(), *(f"{file} {cause}" for file, cause in seen.bad)):
        print(line)
    read, ends = decoding.keep(list(parts.values()), found.kept), np.cumsum([0, *left.values()])
    sums = [found.sums[begin:end] for begin, end in itertools.pairwise(ends)]
    for name, part, own in list(zip(parts, read, sums, strict=True))[1:]:
        for line in _twins(name, read[0], part, sums[0], own):
            print(line)
    for line in _table(parts, scan.classes) if scan.classes else ():
        print(line)
    if given.picture:
        _picture(parts["train"], scan.classes, given.picture)
        print(given.picture.absolute())


def main(argv: Sequence[str]) -> int:
    """Carry out the command; returns the exit code."""
    try:
        look(argv)
    except (ConfigError, DataError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_CONFIG if isinstance(error, ConfigError) else FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
