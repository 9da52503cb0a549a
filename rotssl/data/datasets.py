"""Data sets: name -> uint8 images in memory, split into train, validation and test.

Nothing here imports torch (torchvision's readers are imported where they are called), so that the driver can check data before
it takes any cluster resource.
"""

import hashlib
import io
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from rotssl import rng
from rotssl.config import DataConfig
from rotssl.fields import ConfigError

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

VALIDATION = ("val", "validation", "valid")
EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"))
NATIVE_LIMIT = 96  # pictures of one size up to this side are stored as they are
MARGIN = 1.15  # larger ones are stored at this multiple of the views' side
PROBED = 64  # files decoded before a run starts
SPLIT_SEED = 0  # of held-out and limited sets: the same for every run, whatever its seed

# Channel means and standard deviations in [0, 1]; ImageNet's where a set is not named.
NORMALIZATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "fashion-mnist-sample": ((0.286,), (0.353,)),
    "fashion-mnist": ((0.286,), (0.353,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class DataError(Exception):
    """Data that turned out to be bad in the course of a run; the text names the file. Exit code 1."""


@dataclass(frozen=True)
class ImageSet:
    """Images (N, C, H, W), C being 1 or 3, and labels (N,), or None where unlabelled."""

    images: Pixels
    labels: Labels | None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: npt.NDArray[np.int64]) -> "ImageSet":
        """The images with these indices."""
        return ImageSet(self.images[index], None if self.labels is None else self.labels[index])


@dataclass(frozen=True)
class Splits:
    """What a run reads: train, and validation where there are labels. Test is read by evaluation jobs alone."""

    train: ImageSet
    validation: ImageSet | None
    classes: tuple[str, ...]


@dataclass(frozen=True)
class DataInfo:
    """What is known before anything is loaded."""

    train_size: int
    image_size: int
    labelled: bool


def normalization(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel means and standard deviations of a data set's images in [0, 1]."""
    return NORMALIZATION.get(name, IMAGENET)


def choose(labels: Labels | None, size: int, count: int) -> npt.NDArray[np.int64]:
    """Sorted indices of a class-balanced subset with a fixed seed; plain random where there are no labels.

    Classes get equal numbers as far as they have them; what a small class lacks goes to the others.
    """
    order = rng.permutation(rng.key(SPLIT_SEED, "subset"), size)
    if labels is not None:
        # Rank of each sample within its class, in random order: taking the lowest ranks first fills classes evenly.
        ranks, seen = np.empty(size, np.int64), {label: 0 for label in np.unique(labels)}
        for index in order:
            ranks[index] = seen[labels[index]]
            seen[labels[index]] += 1
        order = order[np.argsort(ranks[order], kind="stable")]
    return np.sort(order[:count])


Part = TypeVar("Part", "Folder", ImageSet)


# --- folders ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """Files and labels of one split of an image folder."""

    files: tuple[str, ...]
    labels: Labels | None

    def __len__(self) -> int:
        return len(self.files)

    def take(self, index: npt.NDArray[np.int64]) -> "Folder":
        """The files with these indices."""
        return Folder(tuple(self.files[i] for i in index), None if self.labels is None else self.labels[index])


def _images_below(folder: Path) -> list[str]:
    found, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        found += [os.path.join(parent, name) for name in sorted(names) if Path(name).suffix.lower() in EXTENSIONS]
    return found


def _scan_split(folder: Path, classes: Sequence[str]) -> Folder:
    if not classes:
        return Folder(tuple(_images_below(folder)), None)
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        own = _images_below(folder / name)
        if not own:
            raise ConfigError(
                f"data.root: class folder {folder / name} holds no images ({', '.join(sorted(EXTENSIONS))})"
            )
        files += own
        labels += [label] * len(own)
    return Folder(tuple(files), np.array(labels, np.int64))


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def scan(root: str) -> tuple[dict[str, Folder], tuple[str, ...]]:
    """Splits (``train``, perhaps ``validation``) and class names of an image folder.

    Below the root: class folders, or train/ that holds them, perhaps with val/ beside it; test/ is left alone. Without class
    folders it is unlabelled.

    Raises:
        ConfigError: no such folder, no images, an empty class folder, other classes in another split than in train.
    """
    top = Path(root)
    try:
        names = _subfolders(top)
    except OSError as error:
        raise ConfigError(f"data.root: cannot read {root}: {error.strerror}") from error
    where = {"train": top}
    if "train" in names:
        others = set(names) - {"train", "test", *VALIDATION}
        if others:
            raise ConfigError(
                f"data.root: {top} holds train/ beside {sorted(others)[0]}/: are these splits or classes?"
            )
        where = {"train": top / "train"}
        where |= {"validation": top / name for name in VALIDATION if name in names}  # noqa: B035
    classes = tuple(_subfolders(where["train"]))
    splits = {}
    for split, folder in where.items():
        own = tuple(_subfolders(folder))
        if own != classes:
            odd = sorted(set(own) ^ set(classes))[0]
            raise ConfigError(f"data.root: {folder} and {where['train']} differ in their class folders ({odd})")
        splits[split] = _scan_split(folder, classes)
        if not splits[split].files:
            raise ConfigError(f"data.root: {folder} holds no images ({', '.join(sorted(EXTENSIONS))})")
    return splits, classes


def _decode(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):  # PIL would clip 16-bit shades to white
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be decoded as an image ({type(error).__name__})") from error


def _probe(splits: dict[str, Folder]) -> tuple[int, int] | None:
    """Decode up to 64 files of each split, spread over the classes; their common size (height, width), None where they differ."""
    files = [folder.files[i] for folder in splits.values() for i in choose(folder.labels, len(folder), PROBED)]
    try:
        sizes = {_decode(file).size for file in files}
    except DataError as error:
        raise ConfigError(f"data.root: {error}") from error
    (width, height), *others = sizes
    return None if others or max(width, height) > NATIVE_LIMIT else (height, width)


def _fit(image: Image.Image, side: int) -> Pixels:
    """Short side to ``side`` pixels, centre-cropped, (3, side, side)."""
    scale = side / min(image.size)
    resized = image.resize(
        (max(side, round(image.width * scale)), max(side, round(image.height * scale))), Image.Resampling.BILINEAR
    )
    left, top = (resized.width - side) // 2, (resized.height - side) // 2
    return np.asarray(resized.crop((left, top, left + side, top + side))).transpose(2, 0, 1)


def _load_folder(folder: Folder, native: tuple[int, int] | None, image_size: int) -> ImageSet | None:
    """The pictures, at the native size or fitted to the views'; None where one has another size than the native one."""
    side = math.ceil(MARGIN * image_size)
    height, width = native or (side, side)
    images = np.empty((len(folder.files), 3, height, width), np.uint8)

    def load(i: int) -> bool:
        image = _decode(folder.files[i])
        if native is None:
            images[i] = _fit(image, side)
        elif image.size == (width, height):
            images[i] = np.asarray(image).transpose(2, 0, 1)
        else:
            return False
        return True

    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:  # PIL decodes without the interpreter's lock
        equal = all(pool.map(load, range(len(folder.files)), chunksize=64))
    return ImageSet(images, folder.labels) if equal else None


# --- the sets --------------------------------------------------------------------------------------------------------------


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


def _torchvision(config: DataConfig) -> tuple[dict[str, ImageSet], tuple[str, ...]]:
    from torchvision import datasets as tv

    cls = {"fashion-mnist": tv.FashionMNIST, "cifar10": tv.CIFAR10}[config.name]
    try:
        source = cls(os.path.expanduser(str(config.root)), train=True, download=config.download)
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(f"{config.name} in {config.root} cannot be read: {str(error).splitlines()[0]}") from error
    data, labels = np.asarray(source.data), np.asarray(source.targets, np.int64)
    images = np.ascontiguousarray(data.transpose(0, 3, 1, 2)) if data.ndim == 4 else data[:, None]
    return {"train": ImageSet(images, labels)}, tuple(source.classes)


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


_TORCHVISION_FILES = {
    "fashion-mnist": (
        "FashionMNIST/raw",
        [f"train-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")],
        60000,
        28,
    ),
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], 50000, 32),
}


def inspect(config: DataConfig, holdout: float) -> DataInfo:
    """Check that a data set is there and readable, without loading it.

    Args:
        config: the data section.
        holdout: share of train that becomes validation where the set has none.

    Raises:
        ConfigError: missing or empty folders, one of the 64 probed files can't be decoded.
    """
    if config.name == "imagefolder":
        assert config.root is not None
        splits, classes = scan(os.path.expanduser(config.root))
        native = _probe(splits)
        size = len(splits["train"].files)
        if "validation" not in splits and classes:
            held = round(size * holdout)
            if held < 1:
                raise ConfigError(f"evaluation.holdout: got {holdout}, which is no image of {size}")
            size -= held
        side = min(native) if native else 224
        labelled = bool(classes)
    elif config.name in _TORCHVISION_FILES:
        folder, needed, total, side = _TORCHVISION_FILES[config.name]
        path = Path(os.path.expanduser(config.root or "")) / folder
        missing = [name for name in needed if not (path / name).is_file()]
        if missing and not config.download:
            raise ConfigError(
                f"data.root: no {missing[0]} in {path}; point it to {config.name}, or let --data.download true fetch it"
            )
        size, labelled = total - round(total * holdout), True
    else:
        size, side, labelled = (5000, 28, True) if config.name == "fashion-mnist-sample" else (1024, 32, True)
    if size < 1:
        raise ConfigError(f"evaluation.holdout: got {holdout}, which leaves no image to train on")
    return DataInfo(min(size, config.limit or size), side, labelled)


def load(config: DataConfig, holdout: float) -> Splits:
    """Read a data set into memory.

    Args:
        config: the data section, with ``image_size`` resolved.
        holdout: share of train that becomes validation where the set has none (class-balanced, fixed seed).

    Raises:
        DataError: a file that can't be decoded, by name.
    """
    if config.name == "imagefolder":
        assert config.root is not None and config.image_size != "auto"
        folders, classes = scan(config.root)
        native = _probe(folders)
        train, validation = _divide(folders["train"], folders.get("validation"), config.limit, holdout)
        parts = [part for part in (train, validation) if part is not None]
        sets = [_load_folder(part, native, config.image_size) for part in parts]
        if any(part is None for part in sets):  # all parts alike: native only if every picture has that size
            sets = [_load_folder(part, None, config.image_size) for part in parts]
        assert sets[0] is not None
        return Splits(sets[0], sets[1] if len(sets) > 1 else None, classes)
    if config.name in _TORCHVISION_FILES:
        splits, classes = _torchvision(config)
    else:
        splits, classes = _sample() if config.name == "fashion-mnist-sample" else _synthetic()
    return Splits(*_divide(splits["train"], splits.get("validation"), config.limit, holdout), classes)


def _divide(train: Part, validation: Part | None, limit: int | None, holdout: float) -> tuple[Part, Part | None]:
    """Hold validation out of train where there is none, then limit train."""
    size = len(train)
    everything = np.arange(size)
    if validation is None and train.labels is not None:
        held = choose(train.labels, size, round(size * holdout))
        validation, train = train.take(held), train.take(np.setdiff1d(everything, held))
        size -= len(held)
    if limit is not None and limit < size:
        train = train.take(choose(train.labels, size, limit))
    return train, validation if train.labels is not None else None
