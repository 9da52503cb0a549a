"""Images as arrays, and which of them to take; what the readers of all data sets share."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rotssl.base import rng

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

MEANS_APART = 2.0  # of 255: more than two decoders of JPEG differ by in the mean of a picture
SPLIT_SEED = 0  # of held-out and limited sets: the same for every run, whatever its seed


class DataError(Exception):
    """Data that turned out to be bad in the course of a run; the text names the file. Exit code 1."""


@dataclass(frozen=True)
class ImageSet:
    """Images (N, C, H, W), C being 1 or 3, in memory or mapped from a file; labels (N,), or None where unlabelled."""

    images: Pixels
    labels: Labels | None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: npt.NDArray[np.int64]) -> "ImageSet":
        """The images with these indices."""
        return ImageSet(self.images[index], None if self.labels is None else self.labels[index])


def sketch(images: ImageSet, classes: Sequence[str]) -> dict[str, Any]:
    """What tells a set of images from another, as plain values: it is the same for a folder that was moved."""
    picks = np.linspace(0, len(images) - 1, min(64, len(images))).astype(np.int64)
    return {
        "count": len(images),
        "labels": 0 if images.labels is None else zlib.crc32(images.labels.tobytes()),
        "classes": zlib.crc32("\n".join(classes).encode()),
        "means": images.images[picks].mean(axis=(1, 2, 3)).tolist(),  # of pixels, which decoders round differently
    }


def other_images(ours: dict[str, Any], theirs: dict[str, Any] | None) -> str:
    """How the images of two sketches differ; empty if they are the same, or if there is but one."""
    if theirs is None or ours == theirs:
        return ""
    if ours["count"] != theirs["count"]:
        return f"{ours['count']} of them, not {theirs['count']}"
    if ours["classes"] != theirs["classes"]:
        return "their classes have other names"
    if ours["labels"] != theirs["labels"]:
        return "they have other labels, or another order"
    apart = max(abs(a - b) for a, b in zip(ours["means"], theirs["means"], strict=True))
    return "the pictures are others" if apart > MEANS_APART else ""


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
