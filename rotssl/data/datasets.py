"""Data sets: name -> uint8 images, in memory or mapped from disk, split into train, validation and test.

Nothing here imports torch (torchvision's readers are imported where they are called), so that the driver can check data before
it takes any cluster resource.
"""

import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TypeVar

import numpy as np

from rotssl.base import rng
from rotssl.config.fields import ConfigError
from rotssl.config.resolved import ResolvedData
from rotssl.config.sections import DataConfig
from rotssl.data import decoding, disk_cache, folders
from rotssl.data.folders import Folder
from rotssl.data.images import DataError, ImageSet, choose

# Channel means and standard deviations in [0, 1]; ImageNet's where a set is not named.
NORMALIZATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "fashion-mnist-sample": ((0.286,), (0.353,)),
    "fashion-mnist": ((0.286,), (0.353,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Splits:
    """What a run reads: train, and validation where there are labels.

    ``test`` is read by evaluation jobs alone, but for a run that holds nothing out: then it stands in for validation.
    """

    train: ImageSet
    validation: ImageSet | None
    classes: tuple[str, ...]
    test: ImageSet | None = None


@dataclass(frozen=True)
class DataInfo:
    """What is known before anything is loaded; ``shape`` (N, C, H, W) is that of all images that a run reads."""

    train_size: int
    image_size: int
    labelled: bool
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of the decoded images."""
        return math.prod(self.shape)


def normalization(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel means and standard deviations of a data set's images in [0, 1]."""
    return NORMALIZATION.get(name, IMAGENET)


Part = TypeVar("Part", Folder, ImageSet)
Native = tuple[int, int] | None  # height and width of the pictures, where they have one size
FOLDERS: dict[str, Callable[[str], tuple[dict[str, Folder], tuple[str, ...]]]] = {
    "imagefolder": folders.scan,
    "tiny-imagenet": folders.scan_tiny_imagenet,
}


def _sample() -> tuple[dict[str, ImageSet], tuple[str, ...]]:
    folder = resources.files("rotssl.data.sample")
    content = (folder / "images.npz").read_bytes()
    if hashlib.sha256(content).hexdigest() != json.loads((folder / "source.json").read_text())["sha256"]:
        raise DataError("rotssl/data/sample/images.npz does not have the checksum in source.json: the file is damaged")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        splits = {
            split: ImageSet(arrays[f"{split}_images"][:, None], arrays[f"{split}_labels"].astype(np.int64))
            for split in ("train", "validation", "test")
        }
    return splits, FASHION_CLASSES


FASHION_CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def _torchvision(config: DataConfig, split: str = "train") -> tuple[dict[str, ImageSet], tuple[str, ...]]:
    from torchvision import datasets as tv

    cls = {"fashion-mnist": tv.FashionMNIST, "cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}[config.name]
    try:
        source = cls(os.path.expanduser(str(config.root)), train=split == "train", download=config.download)
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(f"{config.name} in {config.root} cannot be read: {str(error).splitlines()[0]}") from error
    data, labels = np.asarray(source.data), np.asarray(source.targets, np.int64)
    images = np.ascontiguousarray(data.transpose(0, 3, 1, 2)) if data.ndim == 4 else data[:, None]
    return {split: ImageSet(images, labels)}, tuple(source.classes)


def _synthetic(count: int = 1024, side: int = 32, classes: int = 4) -> tuple[dict[str, ImageSet], tuple[str, ...]]:
    """Upright wedges of one colour a class on noise: quick to make, and with an orientation to predict."""
    splits = {}
    y, x = np.mgrid[0:side, 0:side] / (side - 1)
    for split, size in (("train", count), ("validation", count // 4), ("test", count // 4)):
        gen = np.random.default_rng(rng.key("synthetic", split))
        labels = np.arange(size) % classes
        width = 0.15 + 0.1 * labels[:, None, None] + gen.uniform(0, 0.05, (size, 1, 1))
        wedge = np.abs(x - gen.uniform(0.35, 0.65, (size, 1, 1))) < width * y
        colour = np.array([[220, 60, 60], [60, 200, 80], [70, 90, 230], [210, 200, 60]])[labels % 4]
        images = np.where(wedge[:, None], colour[:, :, None, None], 90) + gen.normal(0, 20, (size, 3, side, side))
        splits[split] = ImageSet(images.clip(0, 255).astype(np.uint8), labels.astype(np.int64))
    return splits, tuple(f"wedge {i}" for i in range(classes))


# Folder, files of train and of test, number of training images, side.
_TORCHVISION_FILES = {
    "fashion-mnist": (
        "FashionMNIST/raw",
        [f"train-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")],
        [f"t10k-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")],
        60000,
        28,
    ),
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"], 50000, 32),
    "cifar100": ("cifar-100-python", ["train"], ["test"], 50000, 32),
}
TORCHVISION_TEST = 10_000  # images, in each of them


def inspect(config: DataConfig, holdout: float) -> DataInfo:
    """Check that a data set is there and readable, without loading it.

    Args:
        config: the data section.
        holdout: share of train that becomes validation where the set has none; 0: test takes its place.

    Raises:
        ConfigError: missing or empty folders, one of the 64 probed files can't be decoded, neither validation nor test with a
            holdout of 0.
    """
    if config.name in FOLDERS:
        splits, classes = FOLDERS[config.name](os.path.expanduser(str(config.root)))
        native = decoding.probe(splits)
        size, held = len(splits["train"].files), 0
        if "validation" not in splits and classes and holdout == 0:
            held = len(_test_files(config, "evaluation.holdout: got 0, expected more, as"))
        elif "validation" not in splits and classes:
            held = round(size * holdout)
            if held < 1:
                raise ConfigError(f"evaluation.holdout: got {holdout}, which is no image of {size}")
            size -= held
        side = min(native) if native else 224
        labelled = bool(classes)
        validation = len(splits.get("validation", ())) or held
        views = side if config.image_size == "auto" else config.image_size
        stored = decoding.stored_shape(0, native, views)[1:]
    elif config.name in _TORCHVISION_FILES:
        folder, needed, tested, total, side = _TORCHVISION_FILES[config.name]
        needed = needed if holdout > 0 else [*needed, *tested]
        path = Path(os.path.expanduser(config.root or "")) / folder
        missing = [name for name in needed if not (path / name).is_file()]
        if missing and not config.download:
            raise ConfigError(
                f"data.root: no {missing[0]} in {path}; point it to {config.name}, or let --data.download true fetch it"
            )
        validation, labelled = round(total * holdout), True
        size, stored = total - validation, (1 if side == 28 else 3, side, side)
        validation = validation or TORCHVISION_TEST
    else:
        sample, labelled = config.name == "fashion-mnist-sample", True
        size, validation, side = (5000, 1000, 28) if sample else (1024, 256, 32)
        stored = (1 if sample else 3, side, side)
    if size < 1:
        raise ConfigError(f"evaluation.holdout: got {holdout}, which leaves no image to train on")
    size = min(size, config.limit or size)
    return DataInfo(size, side, labelled, (size + validation, *stored))


def describe_storage(config: ResolvedData, holdout: float, info: DataInfo, here: bool) -> str:
    """Where the decoded images of a run will be, and how many bytes they are, in a line to print.

    Args:
        config: the data section, with ``image_size`` and ``store`` resolved.
        holdout: as for ``load``.
        info: of ``inspect``.
        here: whether this machine is the one that will train.

    Raises:
        ConfigError: they are to be decoded here, to a disk that has no room for them.
    """
    count, *shape = info.shape
    line = f"images: {count} of {' x '.join(map(str, shape))}, {info.bytes:,} bytes"
    if config.store != "disk":
        return f"{line}, in memory, one copy a node"
    cache = disk_cache.folder(config.cache)
    line += f", on disk in {cache} of each node"
    parts, native, classes = _files(config, holdout)
    files = [parts, [_test_files(config)]] if _reads_test(parts, classes, holdout) else [parts]
    names = [disk_cache.checksum(file, native, config.image_size) for file in files]
    if all(disk_cache.find(cache, name) is not None for name in names):
        return f"{line}; here they are already"
    reason = disk_cache.missing(cache, names[0], info.bytes)
    if reason and here:
        raise ConfigError(reason)
    return f"{line}; here they are not yet" + (f" ({reason})" if reason else "")


def load(config: ResolvedData, holdout: float, say: Callable[[str], None] = lambda line: None) -> Splits:
    """Read a data set into memory, or map it from disk.

    Args:
        config: the data section, with ``image_size`` resolved.
        holdout: share of train that becomes validation where the set has none (class-balanced, fixed seed); 0: test is read in
            its place.
        say: takes a line when there is something to wait for.

    Raises:
        DataError: a file that can't be decoded, by name; a disk without room for the images.
    """
    if config.name in FOLDERS:
        parts, native, classes = _files(config, holdout)
        sets = _read(config, parts, native, say)
        test = _read(config, [_test_files(config)], native, say)[0] if _reads_test(parts, classes, holdout) else None
        return Splits(sets[0], sets[1] if len(sets) > 1 else None, classes, test)
    if config.name in _TORCHVISION_FILES:
        splits, classes = _torchvision(config)
        splits |= _torchvision(config, "test")[0] if holdout == 0 else {}
    else:
        splits, classes = _sample() if config.name == "fashion-mnist-sample" else _synthetic()
    train, validation = _divide(splits["train"], splits.get("validation"), config.limit, holdout)
    return Splits(train, validation, classes, splits["test"] if validation is None else None)


def where(config: DataConfig, size: int) -> str:
    """``memory`` or ``disk``: where images of so many bytes are kept. Only files in folders are decoded to disk."""
    return disk_cache.kind(config.store, size) if config.name in FOLDERS else "memory"


def _files(config: ResolvedData, holdout: float) -> tuple[list[Folder], Native, tuple[str, ...]]:
    """Of a set that is files in folders: train and perhaps validation, the common size of the pictures, the classes."""
    found, classes = FOLDERS[config.name](os.path.expanduser(str(config.root)))
    train, validation = _divide(found["train"], found.get("validation"), config.limit, holdout)
    return [part for part in (train, validation) if part is not None], decoding.probe(found), classes


def _read(
    config: ResolvedData, parts: Sequence[Folder], native: Native, say: Callable[[str], None] = lambda line: None
) -> list[ImageSet]:
    size = math.prod(decoding.stored_shape(sum(map(len, parts)), native, config.image_size))
    if where(config, size) == "memory":
        return decoding.load(parts, native, config.image_size)
    return disk_cache.load(parts, native, config.image_size, disk_cache.folder(config.cache), say)


def load_test(config: ResolvedData) -> ImageSet:
    """Read the labelled test split, which no run does, as ``load`` reads the others.

    Args:
        config: the data section, with ``image_size`` resolved.

    Raises:
        ConfigError: there is none.
        DataError: a file that can't be read, by name.
    """
    if config.name in FOLDERS:
        folder = _test_files(config)
        return _read(config, [folder], decoding.probe(FOLDERS[config.name](os.path.expanduser(str(config.root)))[0]))[0]
    if config.name in _TORCHVISION_FILES:
        return _torchvision(config, "test")[0]["test"]
    return (_sample() if config.name == "fashion-mnist-sample" else _synthetic())[0]["test"]


def _test_files(config: DataConfig, why: str = "data.name:") -> Folder:
    """The labelled test split of a set that is files in folders.

    Raises:
        ConfigError: there is none.
    """
    root = os.path.expanduser(str(config.root))
    found = folders.scan_test(root, folders.scan(root)[1]) if config.name == "imagefolder" else None
    if found is None:
        raise ConfigError(f"{why} {config.name} in {config.root} has no labelled test split")
    return found


def _reads_test(parts: Sequence[Folder], classes: Sequence[str], holdout: float) -> bool:
    """Whether a run reads test: where it has labels, no validation, and holds nothing out."""
    return holdout == 0 and len(parts) == 1 and bool(classes)


def _divide(train: Part, validation: Part | None, limit: int | None, holdout: float) -> tuple[Part, Part | None]:
    """Hold validation out of train where there is none, then limit train."""
    size = len(train)
    everything = np.arange(size)
    if validation is None and train.labels is not None and holdout > 0:
        held = choose(train.labels, size, round(size * holdout))
        validation, train = train.take(held), train.take(np.setdiff1d(everything, held))
        size -= len(held)
    if limit is not None and limit < size:
        train = train.take(choose(train.labels, size, limit))
    return train, validation if train.labels is not None else None
