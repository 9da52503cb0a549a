"""Images as arrays, and which of them to take; what the readers of all data sets share."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rotssl import rng

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

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
