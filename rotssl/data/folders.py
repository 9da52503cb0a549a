"""Image folders: the files, labels and classes of each split.

This module does not import torch: the driver checks data before it takes any cluster resource.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rotssl.config.fields import ConfigError
from rotssl.data.images import Labels

VALIDATION = ("val", "validation", "valid")
EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"))


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
                f"data.root: class folder {folder / name} contains no images ({', '.join(sorted(EXTENSIONS))})"
            )
        files += own
        labels += [label] * len(own)
    return Folder(tuple(files), np.array(labels, np.int64))


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def scan(root: str) -> tuple[dict[str, Folder], tuple[str, ...]]:
    """Splits (``train`` and optionally ``validation``) and class names of an image folder.

    The root contains class folders, or train/ with class folders and optionally val/; test/ is ignored. Without class folders
    the images are unlabelled.

    Raises:
        ConfigError: the folder does not exist or has no images, a class folder is empty, or the splits have different classes.
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
                f"data.root: {top} contains both train/ and {sorted(others)[0]}/: are these splits or classes?"
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
            raise ConfigError(f"data.root: {folder} contains no images ({', '.join(sorted(EXTENSIONS))})")
    return splits, classes


def scan_test(root: str, classes: Sequence[str]) -> Folder | None:
    """The labelled split test/ of an image folder, or None.

    Raises:
        ConfigError: its classes differ from those of train.
    """
    folder = Path(root) / "test"
    if not classes or not (Path(root) / "train").is_dir() or not folder.is_dir():
        return None
    odd = sorted(set(_subfolders(folder)) ^ set(classes))
    if odd:
        raise ConfigError(f"data.root: {folder} and train/ differ in their class folders ({odd[0]})")
    return _scan_split(folder, classes)


def scan_tiny_imagenet(root: str) -> tuple[dict[str, Folder], tuple[str, ...]]:
    """Splits and class names (WordNet ids) of Tiny ImageNet as unpacked from its zip; test/ has no labels and is ignored.

    Args:
        root: tiny-imagenet-200/ or its parent folder.

    Raises:
        ConfigError: a part is missing or empty, or train/, wnids.txt, val/images/ and val_annotations.txt are inconsistent.
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
            f"data.root: cannot read {error.filename}: {error.strerror}; expected tiny-imagenet-200/ or its parent "
            "folder, with wnids.txt, train/, val/images/ and val/val_annotations.txt"
        ) from error
    if odd:
        raise ConfigError(f"data.root: {train} and {listed} differ in their classes ({odd[0]})")
    images = {os.path.basename(file): file for file in _images_below(annotated.parent / "images")}
    labels: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        name, wnid = [*line.split("\t"), ""][:2]
        if name not in images:
            raise ConfigError(f"data.root: {annotated}, line {number}: no file {name!r} in val/images/")
        if wnid not in classes:
            raise ConfigError(f"data.root: {annotated}, line {number}: no class {wnid!r} in {listed}")
        labels[name] = classes.index(wnid)
    if not labels or len(labels) < len(images):
        raise ConfigError(f"data.root: {annotated} lists {len(labels)} of the {len(images)} images in val/images/")
    files, known = tuple(images[name] for name in labels), np.array(list(labels.values()), np.int64)
    return {"train": _scan_split(train, classes), "validation": Folder(files, known)}, classes
