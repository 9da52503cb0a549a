"""Image folders: which files belong to a split, and their pictures decoded, into memory or whatever takes them.

Nothing here imports torch: the driver checks data before it takes any cluster resource.
"""

import contextlib
import math
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from rotssl.config.fields import ConfigError
from rotssl.data.images import DataError, ImageSet, Labels, Pixels, choose

VALIDATION = ("val", "validation", "valid")
EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"))
NATIVE_LIMIT = 96  # pictures of one size up to this side are stored as they are
MARGIN = 1.15  # larger ones are stored at this multiple of the views' side
PROBED = 64  # files decoded before a run starts
BLOCK_BYTES = 4 << 20  # pixels that a thread decodes before it hands them on

Shape = tuple[int, ...]
Write = Callable[[int, Pixels], None]
Begin = Callable[[Shape], Write]
Result = TypeVar("Result")


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


def scan_test(root: str, classes: Sequence[str]) -> Folder | None:
    """The labelled split test/ of an image folder, if there is one.

    Raises:
        ConfigError: other classes in it than in train.
    """
    folder = Path(root) / "test"
    if not classes or not (Path(root) / "train").is_dir() or not folder.is_dir():
        return None
    odd = sorted(set(_subfolders(folder)) ^ set(classes))
    if odd:
        raise ConfigError(f"data.root: {folder} and train/ differ in their class folders ({odd[0]})")
    return _scan_split(folder, classes)


def scan_tiny_imagenet(root: str) -> tuple[dict[str, Folder], tuple[str, ...]]:
    """Splits and class names (WordNet ids) of Tiny ImageNet as its zip unpacks; test/ has no labels and is left alone.

    Args:
        root: tiny-imagenet-200/ or the folder that holds it.

    Raises:
        ConfigError: a part is missing or empty; train/, wnids.txt, val/images/ and val_annotations.txt contradict each other.
    """
    inside = Path(root) / "tiny-imagenet-200"
    top = inside if inside.is_dir() else Path(root)
    listed, train, annotated = top / "wnids.txt", top / "train", top / "val" / "val_annotations.txt"
    try:
        classes = tuple(sorted(set(listed.read_text(encoding="utf-8", errors="replace").split())))
        odd = sorted(set(classes) ^ set(_subfolders(train)))
        lines = annotated.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ConfigError(
            f"data.root: cannot read {error.filename}: {error.strerror}; expected tiny-imagenet-200/, or the folder that "
            "holds it, with wnids.txt, train/, val/images/ and val/val_annotations.txt"
        ) from error
    if odd:
        raise ConfigError(f"data.root: {train} and {listed} differ in their classes ({odd[0]})")
    images = {os.path.basename(file): file for file in _images_below(annotated.parent / "images")}
    labels: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        name, wnid = [*line.split("\t"), ""][:2]
        if name not in images:
            raise ConfigError(f"data.root: {annotated}, line {number}: no file {name!r} in images/ beside it")
        if wnid not in classes:
            raise ConfigError(f"data.root: {annotated}, line {number}: no class {wnid!r} in {listed}")
        labels[name] = classes.index(wnid)
    if not labels or len(labels) < len(images):
        raise ConfigError(
            f"data.root: {annotated} names {len(labels)} of the {len(images)} images in images/ beside it"
        )
    files, known = tuple(images[name] for name in labels), np.array(list(labels.values()), np.int64)
    return {"train": _scan_split(train, classes), "validation": Folder(files, known)}, classes


def _decode(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):  # PIL would clip 16-bit shades to white
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be decoded as an image ({type(error).__name__})") from error


def probe(splits: dict[str, Folder]) -> tuple[int, int] | None:
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


def stored_shape(count: int, native: tuple[int, int] | None, image_size: int) -> Shape:
    """Shape (N, 3, H, W) that ``decode`` gives to pictures: the native size, or squares with a margin around the views.

    Args:
        count: number of pictures.
        native: height and width as ``probe`` found them.
        image_size: side of the views in pixels.
    """
    side = math.ceil(MARGIN * image_size)
    return (count, 3, *(native or (side, side)))


def decode(files: Sequence[str], native: tuple[int, int] | None, image_size: int, begin: Begin) -> None:
    """Decode pictures in threads, at the native size if every one of them has it, else fitted to the views' side.

    Args:
        files: what to read.
        native: height and width as ``probe`` found them.
        image_size: side of the views in pixels.
        begin: takes the shape (N, 3, H, W) of all pictures, and gives a function that takes blocks of them, from several threads
            in any order: the first one's index, and the pictures. Called again, with another shape, where one picture turns
            out to have another size than the native one.

    Raises:
        DataError: a file that can't be decoded, by name.
    """
    shape = stored_shape(len(files), native, image_size)
    write, each = begin(shape), max(1, BLOCK_BYTES // math.prod(shape[1:]))

    def read(first: int) -> bool:
        block = np.empty((min(each, len(files) - first), *shape[1:]), np.uint8)
        for i in range(len(block)):
            image = _decode(files[first + i])
            if native is None:
                block[i] = _fit(image, shape[-1])
            elif image.size == (native[1], native[0]):
                block[i] = np.asarray(image).transpose(2, 0, 1)
            else:
                return False
        write(first, block)
        return True

    with contextlib.closing(in_threads(read, range(0, len(files), each))) as done:
        equal = all(done)
    if not equal:
        decode(files, None, image_size, begin)


def in_threads(work: Callable[[int], Result], items: Iterable[int]) -> Generator[Result, None, None]:
    """``map`` in as many threads as there are cores; what was not begun when one fails is left undone."""
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:  # PIL decodes without the interpreter's lock
        yield from pool.map(work, items)


def load(parts: Sequence[Folder], native: tuple[int, int] | None, image_size: int) -> list[ImageSet]:
    """The pictures of all parts in memory, in one array.

    Args:
        parts: what to read.
        native: height and width as ``probe`` found them.
        image_size: side of the views in pixels.

    Raises:
        DataError: a file that can't be decoded, by name.
    """
    images = np.empty(0, np.uint8)

    def begin(shape: Shape) -> Write:
        nonlocal images
        images = np.empty(shape, np.uint8)

        def write(first: int, block: Pixels) -> None:
            images[first : first + len(block)] = block

        return write

    decode([file for part in parts for file in part.files], native, image_size, begin)
    return divide(images, parts)


def divide(images: Pixels, parts: Sequence[Folder]) -> list[ImageSet]:
    """One array of pictures, taken apart again, without a copy."""
    ends = np.cumsum([len(part) for part in parts])
    return [ImageSet(images[end - len(part) : end], part.labels) for part, end in zip(parts, ends, strict=True)]
