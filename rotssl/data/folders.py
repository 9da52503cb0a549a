"""Image folders: the files, labels and classes of each split.

This module does not import torch: the driver checks data before it takes any cluster resource.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rotssl.config.fields import ConfigError
from rotssl.data.images import Labels

EXTENSIONS = frozenset((".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"))
JUNK = "__MACOSX"  # macOS's own files in a zip; like hidden ones, not images

# What the folders of splits are called, in any case.
SPLITS = {"train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation"}
SPLITS |= {"test": "test", "testing": "test"}


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


class Scan(NamedTuple):
    """What a folder contains: files by split, classes, the folder of the splits, and what is worth saying.

    ``skipped`` counts files that were left out, by suffix or reason.
    """

    splits: dict[str, Folder]
    classes: tuple[str, ...]
    top: str
    skipped: Counter[str]
    warnings: tuple[str, ...] = ()


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    """What is in a folder, sorted by name.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise ConfigError(f"data.root: cannot read {folder}: {error.strerror}") from error


def _images_in(entries: Sequence[os.DirEntry[str]], skipped: Counter[str]) -> list[str]:
    """The image files among entries; counts the other files."""
    found = []
    for entry in entries:
        suffix = Path(entry.name).suffix.lower()
        if entry.is_dir() or (entry.name.startswith(".") and suffix not in EXTENSIONS):
            continue
        if entry.name.startswith("."):
            skipped["hidden"] += 1
        elif suffix not in EXTENSIONS:
            skipped[suffix or "no suffix"] += 1
        elif entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):
            found.append(entry.path)  # a link to nowhere is kept, and refused where it is read: it stands for an image
        else:
            skipped["not a file"] += 1  # opening a pipe would hang
    return found


def _images_below(folder: Path | str, skipped: Counter[str], seen: set[str] | None = None) -> list[str]:
    seen = set() if seen is None else seen
    if (real := os.path.realpath(folder)) in seen:  # a link back up
        return []
    seen.add(real)
    entries = _entries(folder)
    found = _images_in(entries, skipped)
    for entry in entries:
        if entry.is_dir() and not _is_junk(entry.name):
            found += _images_below(entry.path, skipped, seen)
    return found


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name == JUNK


def _scan_split(folder: Path, classes: Sequence[str], skipped: Counter[str], whole: bool = True) -> Folder:
    """The images of a split; ``whole``: whether it must have images of every class."""
    if not classes:
        return Folder(tuple(_images_below(folder, skipped)), None)
    if beside := len(_images_in(_entries(folder), skipped)):
        skipped["beside the class folders"] += beside
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        own = _images_below(folder / name, skipped) if whole or (folder / name).is_dir() else []
        if not own and whole:
            raise ConfigError(f"data.root: class folder {folder / name} contains {_NO_IMAGES}")
        files += own
        labels += [label] * len(own)
    return Folder(tuple(files), np.array(labels, np.int64))


_NO_IMAGES = f"no images ({', '.join(sorted(EXTENSIONS))})"


def _subfolders(folder: Path) -> list[str]:
    return [entry.name for entry in _entries(folder) if entry.is_dir() and not _is_junk(entry.name)]


def _are_splits(names: Sequence[str]) -> bool:
    """Whether these folders are splits, with train among them."""
    words = [SPLITS.get(name.casefold()) for name in names]
    return None not in words and "train" in words


def _split_folders(top: Path, names: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    """The folder of each split, or the top as train if its subfolders are classes or there are none; and warnings.

    Raises:
        ConfigError: the folders may be splits as well as classes, train is missing, or a split is there twice.
    """
    words = [name for name in names if name.casefold() in SPLITS]
    others = sorted(set(names) - set(words))
    train = next((name for name in words if name.casefold() == "train"), None)
    if train and others:
        raise ConfigError(f"data.root: {top} contains both {train}/ and {others[0]}/: are these splits or classes?")
    if not words or others:
        return {"train": top}, [f"{top}: {name}/ is taken for a class, since there is no train/" for name in words]
    if not _are_splits(names):
        found = " and ".join(f"{name}/" for name in words)
        raise ConfigError(f"data.root: {top} contains {found}, but no train/; rename the folder of the training images")
    where: dict[str, Path] = {}
    for name in words:
        word = SPLITS[name.casefold()]
        if word in where:
            raise ConfigError(f"data.root: {top} contains both {where[word].name}/ and {name}/; only one can be {word}")
        where[word] = top / name
    return where, []


def _check_nesting(folder: Path, classes: Sequence[str]) -> list[str]:
    """Warnings about class folders that contain other classes.

    Raises:
        ConfigError: a class folder contains the splits.
    """
    lines, known = [], set(classes)
    for name in classes:
        inner = _subfolders(folder / name)
        if _are_splits(inner):
            shown = " and ".join(f"{word}/" for word in inner)
            raise ConfigError(
                f"data.root: {folder / name} contains {shown}, which are splits of the images, not images of a class; "
                f"set data.root to {folder / name}"
            )
        lines += [
            f"{folder / name} contains {odd}/, the name of another class; its images count as {name}"
            for odd in sorted((set(inner) & known) - {name})
        ]
    return lines


def _only_one(folder: Path, name: str) -> str:
    inner = _subfolders(folder / name)
    hint = f"; if {inner[0]}/ and the like are classes, set data.root to {folder / name}" if inner else ""
    return f"{folder} has only one class folder, {name}/: taken as unlabelled, without kNN{hint}"


def _scan_labelled(folder: Path, train: Path, classes: Sequence[str], skipped: Counter[str]) -> Folder:
    """A split that is measured; it may lack classes.

    Raises:
        ConfigError: it has no class folders, or classes that train lacks, or no images.
    """
    own = _subfolders(folder)
    if not own and (flat := len(_images_in(_entries(folder), Counter()))):
        raise ConfigError(
            f"data.root: {folder} has {flat} images but no class folders (as ImageNet's validation images come); sort them "
            f"into the class folders of {train}, or move {folder.name}/ away"
        )
    if odd := sorted(set(own) - set(classes)):
        raise ConfigError(f"data.root: {folder} and {train} differ in their class folders ({odd[0]})")
    found = _scan_split(folder, classes, skipped, whole=False)
    if not found.files:
        raise ConfigError(f"data.root: {folder} contains {_NO_IMAGES}")
    return found


def scan(root: str) -> Scan:
    """Splits (``train`` and optionally ``validation``) and class names of an image folder.

    The root contains class folders, or train/ with class folders and optionally val/; test/ is ignored. Without class folders,
    or with only one, the images are unlabelled.

    Raises:
        ConfigError: the folder does not exist or has no images, a class folder of train is empty, validation has classes that
            train lacks, or folders are nested in another way.
    """
    top, skipped = Path(root), Counter[str]()
    where, lines = _split_folders(top, _subfolders(top))
    train = where["train"]
    found = _subfolders(train)
    lines += _check_nesting(train, found)
    if len(found) == 1:
        lines.append(_only_one(train, found[0]))
    classes = tuple(found) if len(found) > 1 else ()
    splits = {"train": _scan_split(train, classes, skipped)}
    if not splits["train"].files:
        raise ConfigError(f"data.root: {train / found[0] if len(found) == 1 else train} contains {_NO_IMAGES}")
    if "validation" in where and classes:
        folder = where["validation"]
        validation = splits["validation"] = _scan_labelled(folder, train, classes, skipped)
        present = set() if validation.labels is None else set(validation.labels.tolist())
        absent = [name for label, name in enumerate(classes) if label not in present]
        lines += _check_nesting(folder, [name for name in classes if name not in absent])
        lines += [f"{folder} has no images of {len(absent)} of {len(classes)} classes ({absent[0]})"] if absent else []
    elif "validation" in where:
        lines.append(f"{where['validation']} is not used, because the training images are unlabelled")
    return Scan(splits, classes, str(top), skipped, tuple(f"data.root: {line}" for line in lines))


def scan_test(root: str, classes: Sequence[str]) -> Folder | None:
    """The labelled split test/ of an image folder, or None.

    Raises:
        ConfigError: it has classes that train lacks, no class folders or no images.
    """
    top = Path(root)
    where, _ = _split_folders(top, _subfolders(top))
    if not classes or "test" not in where:
        return None
    return _scan_labelled(where["test"], where["train"], classes, Counter())


def scan_tiny_imagenet(root: str) -> Scan:
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
        odd = sorted(
            set(classes) ^ {entry.name for entry in train.iterdir() if entry.is_dir() and not _is_junk(entry.name)}
        )
        lines = annotated.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ConfigError(
            f"data.root: cannot read {error.filename}: {error.strerror}; expected tiny-imagenet-200/ or its parent "
            "folder, with wnids.txt, train/, val/images/ and val/val_annotations.txt"
        ) from error
    if odd:
        raise ConfigError(f"data.root: {train} and {listed} differ in their classes ({odd[0]})")
    skipped = Counter[str]()
    place = annotated.parent / "images"
    images = {os.path.basename(file): file for file in (_images_below(place, skipped) if place.is_dir() else ())}
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
    splits = {"train": _scan_split(train, classes, skipped), "validation": Folder(files, known)}
    return Scan(splits, classes, str(top), skipped)
