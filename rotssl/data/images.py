"""Images as arrays and the choice of subsets; shared by the readers of all data sets."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from rotssl.base import rng

if TYPE_CHECKING:  # it imports torch
    from rotssl.data.crops import Cut

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Sums = npt.NDArray[np.uint64]

MEANS_APART = 2.0  # of 255: larger than the difference of an image's mean between two JPEG decoders
SPLIT_SEED = 0  # of held-out and limited sets: the same for all runs, regardless of their seed


class DataError(Exception):
    """Bad data found during a run; the text names the file. Exit code 1."""


class Lazy(Protocol):
    """Images as an array (N, C, S, S) of uint8 whose rows are made when they are taken.

    A row is the evaluation's picture; views are cut from the file's whole picture.
    """

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, S, S)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice | npt.NDArray[np.int64]) -> Pixels: ...

    @property
    def checksums(self) -> npt.NDArray[np.uint64]:
        """Of the files, (N,): ``reading.digest`` of each."""

    def subset(self, index: npt.NDArray[np.int64]) -> "Lazy":
        """The images with these indices."""

    def sizes(self, index: rng.Positions) -> tuple[rng.Positions, rng.Positions]:
        """Heights and widths of the files' pictures, (B,) each."""

    def cuts(self, index: rng.Positions, views: "Sequence[Cut]") -> Pixels:
        """Views of a batch, (B, sum of 3 S^2 over the views)."""

    def begin(self) -> None:
        """Called before images are taken."""

    def end(self) -> None:
        """Called when nobody takes the images any more."""


@dataclass(frozen=True)
class ImageSet:
    """Images (N, C, H, W) with C = 1 or 3, in memory, mapped from a file or lazy; labels (N,), or None if unlabelled.

    ``sums`` (N, 4) of 64 bits, of images in files: checksums of the file and of the stored pixels, and the two numbers of their
    looks (``likeness.look``).
    """

    images: Pixels | Lazy
    labels: Labels | None
    sums: Sums | None = None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: npt.NDArray[np.int64]) -> "ImageSet":
        """The images with these indices."""
        labels = None if self.labels is None else self.labels[index]
        images = self.images[index] if isinstance(self.images, np.ndarray) else self.images.subset(index)
        return ImageSet(images, labels, None if self.sums is None else self.sums[index])


def shades(pixels: Pixels) -> Pixels:
    """Images in shades of grey, ITU-R 601-2 as Pillow computes them: (..., 3, H, W) -> (..., 1, H, W)."""
    red, green, blue = (pixels[..., [i], :, :].astype(np.uint32) for i in range(3))
    found: Pixels = ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)
    return found


def in_shades(images: ImageSet) -> ImageSet:
    """A set in shades of grey; itself if it is.

    Raises:
        ValueError: its images are decoded when they are taken.
    """
    if images.images.shape[1] == 1:
        return images
    if not isinstance(images.images, np.ndarray):
        raise ValueError("its images are in colour, and too large to be kept decoded")
    made = np.empty((len(images), 1, *images.images.shape[2:]), np.uint8)
    for first in range(0, len(images), 4096):
        made[first : first + 4096] = shades(images.images[first : first + 4096])
    return replace(images, images=made)


def sketch(images: ImageSet, classes: Sequence[str]) -> dict[str, Any]:
    """A fingerprint of a set of images as plain values; it does not change if the folder is moved."""
    picks = np.linspace(0, len(images) - 1, min(64, len(images))).astype(np.int64)
    stored = images.images if isinstance(images.images, np.ndarray) else None  # lazy ones are compared by their record
    return {
        "count": len(images),
        "labels": 0 if images.labels is None else zlib.crc32(images.labels.tobytes()),
        "classes": zlib.crc32("\n".join(classes).encode()),
        "means": []
        if stored is None
        else stored[picks].mean(axis=(1, 2, 3)).tolist(),  # means, because decoders round pixels differently
    }


def other_images(ours: dict[str, Any], theirs: dict[str, Any] | None) -> str:
    """How the images of two sketches differ; empty if they are equal or there is only one."""
    if theirs is None or ours == theirs:
        return ""
    if ours["count"] != theirs["count"]:
        return f"{ours['count']} images now, {theirs['count']} then"
    if ours["classes"] != theirs["classes"]:
        return "the class names differ"
    if ours["labels"] != theirs["labels"]:
        return "the labels or their order differ"
    apart = max((abs(a - b) for a, b in zip(ours["means"], theirs["means"], strict=True)), default=0.0)
    return "the pixels differ" if apart > MEANS_APART else ""


def _by_rank(labels: Labels, size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """A random order with a fixed seed, and the rank of each image within its class in that order."""
    order = rng.permutation(rng.key(SPLIT_SEED, "subset"), size)
    ranks, seen = np.empty(size, np.int64), {label: 0 for label in np.unique(labels)}
    for index in order:
        ranks[index] = seen[labels[index]]
        seen[labels[index]] += 1
    return order, ranks


def choose(labels: Labels | None, size: int, count: int) -> npt.NDArray[np.int64]:
    """Sorted indices of a class-balanced subset with a fixed seed; purely random without labels.

    All classes get equal numbers if they are large enough; what a small class lacks is taken from the others.
    """
    if labels is None:
        return np.sort(rng.permutation(rng.key(SPLIT_SEED, "subset"), size)[:count])
    order, ranks = _by_rank(labels, size)
    # Taking the lowest ranks first fills classes evenly.
    return np.sort(order[np.argsort(ranks[order], kind="stable")][:count])


def hold_out(labels: Labels, share: float) -> npt.NDArray[np.int64]:
    """Sorted indices of a stratified subset with a fixed seed: about the same share of each class, never all of it.

    The seats go to the classes by Sainte-Lague's method. Classes of equal size get what ``choose`` gives them.
    """
    size = len(labels)
    order, ranks = _by_rank(labels, size)
    sizes = np.bincount(labels)[labels]
    order = order[np.argsort(((ranks + 0.5) / sizes)[order], kind="stable")]
    spare = order[(ranks < sizes - 1)[order]]  # all but one of each class
    return np.sort(spare[: round(size * share)])
