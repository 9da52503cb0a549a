"""Data sets: name -> uint8 images, in memory or mapped from disk, split into train, validation and test.

This module does not import torch (torchvision's readers are imported when called), so that the driver can check data before it
takes any cluster resource.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from rotssl.base.address import without_login
from rotssl.config.datasets import DATASETS
from rotssl.config.fields import ConfigError, load_class
from rotssl.config.resolved import ResolvedData
from rotssl.config.sections import DataConfig
from rotssl.data import decoding, disk_cache, likeness, packed_sets
from rotssl.data.folders import Folder, Scan
from rotssl.data.images import DataError, ImageSet, choose, hold_out
from rotssl.data.record import Record
from rotssl.data.seen import Seen, listing

PACK_BYTES = 4 << 30  # of decoded images of mixed sizes, from which on a run says that they can be packed instead


@dataclass(frozen=True)
class Splits:
    """The splits that a run reads: train, and validation if there are labels.

    ``test`` replaces validation for a run that holds nothing out; otherwise only evaluation jobs read it. ``lines`` say what the
    data are, and what is odd about them. ``record`` is what a resumed run compares, for images in files.
    """

    train: ImageSet
    validation: ImageSet | None
    classes: tuple[str, ...]
    test: ImageSet | None = None
    lines: tuple[str, ...] = ()
    record: Record | None = None


@dataclass(frozen=True)
class DataInfo:
    """Facts about a data set that are known before loading.

    ``shape`` (N, C, H, W) covers all images that a run reads; ``warnings`` are lines about folders that may not be meant so.
    """

    train_size: int
    image_size: int
    labelled: bool
    shape: tuple[int, ...]
    warnings: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Size of the decoded images."""
        return math.prod(self.shape)


def normalization(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel means and standard deviations of a data set's images in [0, 1]."""
    spec = DATASETS[name]
    return spec.mean, spec.std


Part = TypeVar("Part", Folder, ImageSet)
Native = tuple[int, int] | None  # height and width of the images, if all have the same size


def _scan(config: DataConfig) -> Scan:
    """The files by split and the classes of a data set in folders."""
    scan: Callable[[str], Scan] = DATASETS[config.name].load()
    return scan(os.path.expanduser(str(config.root)))


def _torchvision(config: DataConfig, split: str = "train") -> tuple[dict[str, ImageSet], tuple[str, ...]]:
    try:
        source = DATASETS[config.name].load()(
            os.path.expanduser(str(config.root)), train=split == "train", download=config.download
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(f"{config.name} in {config.root} cannot be read: {str(error).splitlines()[0]}") from error
    data, labels = np.asarray(source.data), np.asarray(source.targets, np.int64)
    images = np.ascontiguousarray(data.transpose(0, 3, 1, 2)) if data.ndim == 4 else data[:, None]
    return {split: ImageSet(images, labels)}, tuple(source.classes)


def inspect(config: DataConfig, holdout: float) -> DataInfo:
    """Check that a data set exists and is readable, without loading it.

    Args:
        config: the data section.
        holdout: share of train held out if the data set has no validation split; 0: use test instead.

    Raises:
        ConfigError: a folder is missing or empty, one of the 64 probed files can't be decoded, or holdout is 0 and there is
            neither a validation nor a test split.
    """
    spec = DATASETS[config.name]
    if spec.kind == "folders":
        return _inspect_folders(config, holdout)
    if spec.kind == "packed":
        return _inspect_packed(config, holdout)
    assert spec.side is not None
    needed = [*spec.files, *(spec.test_files if holdout == 0 else ())]
    path = Path(os.path.expanduser(config.root or "")) / spec.folder
    missing = [name for name in needed if not (path / name).is_file()]
    if missing and not config.download:
        raise ConfigError(
            f"data.root: no {missing[0]} in {path}; set it to the folder of {config.name}, or download with --data.download true"
        )
    size, validation, test = spec.sizes
    if not validation:
        validation = round(size * holdout)
        size -= validation
    return _info(config, holdout, size, validation or test, (spec.channels, spec.side, spec.side), labelled=True)


def _inspect_folders(config: DataConfig, holdout: float) -> DataInfo:
    scan = _scan(config)
    splits, classes = scan.splits, scan.classes
    native = decoding.probe(splits, config.on_bad == "skip")
    size, held = len(splits["train"].files), len(splits.get("validation", ()))
    if "validation" not in splits and classes and holdout == 0:
        held = len(test_files(config, "evaluation.holdout: got 0, expected more, as"))
    elif "validation" not in splits and classes:
        labels = splits["train"].labels
        held = 0 if labels is None else len(hold_out(labels, holdout))
        if held < 1:
            raise ConfigError(f"evaluation.holdout: got {holdout}, which holds out no image of {size}")
        size -= held
    side = min(native) if native else 224
    views = side if config.image_size == "auto" else config.image_size
    stored = decoding.stored_shape(0, native, views)[1:]
    info = _info(config, holdout, size, held, stored, bool(classes), side)
    return replace(info, warnings=scan.warnings)


def _inspect_packed(config: DataConfig, holdout: float) -> DataInfo:
    train, others, labelled, size = packed_sets.counts(config, holdout)
    side = min(size) if size else 224
    views = side if config.image_size == "auto" else config.image_size
    return DataInfo(train, side, labelled, (train + others, 3, *(size or (views, views))))


def _info(
    config: DataConfig,
    holdout: float,
    size: int,
    others: int,
    stored: Sequence[int],
    labelled: bool,
    side: int | None = None,
) -> DataInfo:
    if size < 1:
        raise ConfigError(f"evaluation.holdout: got {holdout}, which leaves no training images")
    size = min(size, config.limit or size)
    return DataInfo(size, side or stored[-1], labelled, (size + others, *stored))


def describe_storage(config: ResolvedData, holdout: float, info: DataInfo, here: bool) -> str:
    """A line to print about where the decoded images of a run will be stored, and their size in bytes.

    Args:
        config: the data section, with ``image_size`` and ``store`` resolved.
        holdout: as for ``load``.
        info: from ``inspect``.
        here: whether this machine will train.

    Raises:
        ConfigError: they will be decoded here, but the disk has no room for them.
    """
    count, *shape = info.shape
    if DATASETS[config.name].kind == "packed" and config.store == "disk":
        return f"images: {count}, packed in {without_login(str(config.root))}, decoded for each step"
    line = f"images: {count} of {' x '.join(map(str, shape))}, {info.bytes:,} bytes"
    if config.store != "disk":
        return f"{line}, in memory, one copy per node"
    cache = disk_cache.folder(config.cache)
    line += f", on disk in {cache} of each node"
    parts, native, classes = _files(config, holdout)
    files = [parts, [test_files(config)]] if _reads_test(parts, classes, holdout) else [parts]
    names = [disk_cache.checksum(file, native, config.image_size) for file in files]
    if all(disk_cache.find(cache, name) is not None for name in names):
        return f"{line}; already decoded here"
    reason = disk_cache.missing(cache, names[0], info.bytes)
    if reason and here:
        raise ConfigError(reason)
    return f"{line}; not yet decoded here" + (f" ({reason})" if reason else "")


def load(config: ResolvedData, holdout: float, say: Callable[[str], None] = lambda line: None) -> Splits:
    """Read a data set into memory, or map it from disk.

    Args:
        config: the data section, with ``image_size`` resolved.
        holdout: share of each class of train held out (fixed seed) if the data set has no validation split; 0: read test
            instead.
        say: called with a line about anything that takes time.

    Raises:
        DataError: a file can't be decoded (the message names it), or the disk has no room for the images.
    """
    spec = DATASETS[config.name]
    if spec.kind == "folders":
        return _load_folders(config, holdout, say)
    if spec.kind == "packed":
        found, manifest, record = packed_sets.load(config, holdout, say)
        counts = {name: len(part) for name, part in found.items()}
        line = Seen().line(counts, manifest.classes, {})
        return Splits(
            found["train"],
            found.get("validation"),
            manifest.classes,
            found.get("test"),
            (f"{line}, packed, identity {manifest.identity[:12]}", *manifest.notes),
            record,
        )
    if spec.kind == "torchvision":
        splits, classes = _torchvision(config)
        splits |= _torchvision(config, "test")[0] if holdout == 0 else {}
    else:
        splits, classes = spec.load()()
    train, validation = _divide(splits["train"], splits.get("validation"), config.limit, holdout)
    test = splits["test"] if validation is None else None
    side = train.images.shape[:1:-1]
    line = Seen(side, side).line(_counts(train, validation, test), classes, {})
    return Splits(train, validation, classes, test, (line,))


def _counts(train: ImageSet, validation: ImageSet | None, test: ImageSet | None) -> dict[str, int]:
    parts = {"train": train, "validation": validation, "test": test}
    return {name: len(part) for name, part in parts.items() if part is not None}


def _load_folders(config: ResolvedData, holdout: float, say: Callable[[str], None]) -> Splits:
    scan = _scan(config)
    parts, native, classes = _files(config, holdout, scan)
    sets, found = _read(config, parts, native, say)
    if not len(sets[0]):
        raise DataError(f"no image of train can be read: {listing(found.seen.bad)}")
    tested, more = None, None
    if _reads_test(parts, classes, holdout):
        (tested,), more = _read(config, [test_files(config)], native, say)
    validation = sets[1] if len(sets) > 1 else None
    line = found.seen.line(_counts(sets[0], validation, tested), classes, scan.skipped)
    lines = [line, *found.seen.warnings(), *(more.seen.warnings() if more else [])]
    held = None if "validation" in scan.splits or validation is None else validation.labels
    if held is not None and (absent := sorted(set(range(len(classes))) - set(held.tolist()))):
        few = f"{len(absent)} of {len(classes)} classes ({classes[absent[0]]})"
        lines.append(f"warning: nothing is held out of {few}, which have too few images for evaluation.holdout")
    for name, other in (("validation", validation), ("test", tested)):
        lines += [] if other is None else likeness.between(sets[0], other, name)
    if native is None and math.prod(sets[0].images.shape) >= PACK_BYTES:
        lines.append(
            "these images are stored decoded, and views are cut from their middle; jobs/pack.py keeps the files instead"
        )
    files = [file for part in decoding.keep(parts, found.kept) for file in part.files]
    return Splits(
        sets[0], validation, classes, tested, tuple(lines), Record.of(files, scan.top, classes, found.sums[:, 0])
    )


def where(config: DataConfig, size: int) -> str:
    """``memory`` or ``disk``: where images of a given size in bytes are stored.

    Only data sets in folders go to disk, and packed ones of large images stay on theirs.
    """
    if DATASETS[config.name].kind == "packed":
        return "memory" if packed_sets.native(packed_sets.opened(config)[1]) else "disk"
    return disk_cache.kind(config.store, size) if DATASETS[config.name].kind == "folders" else "memory"


def _files(
    config: ResolvedData, holdout: float, scan: Scan | None = None
) -> tuple[list[Folder], Native, tuple[str, ...]]:
    """Train and possibly validation of a data set in folders, the common size of the images, and the classes."""
    scan = scan or _scan(config)
    train, validation = _divide(scan.splits["train"], scan.splits.get("validation"), config.limit, holdout)
    native = decoding.probe(scan.splits, config.on_bad == "skip")
    return [part for part in (train, validation) if part is not None], native, scan.classes


def _read(
    config: ResolvedData, parts: Sequence[Folder], native: Native, say: Callable[[str], None] = lambda line: None
) -> tuple[list[ImageSet], decoding.Decoded]:
    skip = config.on_bad == "skip"
    size = math.prod(decoding.stored_shape(sum(map(len, parts)), native, config.image_size))
    if where(config, size) == "memory":
        return decoding.load(parts, native, config.image_size, skip)
    return disk_cache.load(parts, native, config.image_size, disk_cache.folder(config.cache), say, skip)


def load_test(config: ResolvedData) -> ImageSet:
    """Read the labelled test split as ``load`` reads the others.

    Args:
        config: the data section, with ``image_size`` resolved.

    Raises:
        ConfigError: there is no labelled test split.
        DataError: a file can't be read; the message names it.
    """
    spec = DATASETS[config.name]
    if spec.kind == "folders":
        native = decoding.probe(_scan(config).splits, config.on_bad == "skip")
        return _read(config, [test_files(config)], native)[0][0]
    if spec.kind == "packed":
        return packed_sets.load_test(config)
    test: ImageSet = (_torchvision(config, "test") if spec.kind == "torchvision" else spec.load()())[0]["test"]
    return test


def test_files(config: DataConfig, why: str = "data.name:") -> Folder:
    """The labelled test split of a data set in folders.

    Raises:
        ConfigError: there is none.
    """
    spec, found = DATASETS[config.name], None
    if spec.test_target:
        scan_test: Callable[[str, Sequence[str]], Folder | None] = load_class(spec.test_target)
        found = scan_test(os.path.expanduser(str(config.root)), _scan(config).classes)
    if found is None:
        raise ConfigError(f"{why} {config.name} in {config.root} has no labelled test split")
    return found


def _reads_test(parts: Sequence[Folder], classes: Sequence[str], holdout: float) -> bool:
    """Whether a run reads test: it has labels, no validation split, and holds nothing out."""
    return holdout == 0 and len(parts) == 1 and bool(classes)


def _divide(train: Part, validation: Part | None, limit: int | None, holdout: float) -> tuple[Part, Part | None]:
    """Hold validation out of train if there is none, then limit train."""
    size = len(train)
    everything = np.arange(size)
    if validation is None and train.labels is not None and holdout > 0:
        held = hold_out(train.labels, holdout)
        validation, train = train.take(held), train.take(np.setdiff1d(everything, held))
        size -= len(held)
    if limit is not None and limit < size:
        train = train.take(choose(train.labels, size, limit))
    return train, validation if train.labels is not None else None
