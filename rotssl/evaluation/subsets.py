"""Class-balanced parts of the training images for semi-supervised protocols: functions of labels and a seed alone.

They are drawn by rotssl.base.rng, whose numbers are the same on every machine and with every version of numpy and torch. A part
holds indices of training images, so it shares no image with validation or test. A smaller part is contained in a larger one.
"""

import hashlib

import numpy as np

from rotssl.base import rng
from rotssl.data.images import Labels


def subset(labels: Labels, share: float, seed: int = 0) -> rng.Positions:
    """Sorted indices of a class-balanced part of a set, at least one image of each class.

    As in SimCLR (Chen et al. 2020, arXiv 2002.05709), each class has the same number of images: the share of the
    mean size of the classes. A class that has fewer gives all.

    Args:
        labels: (N,) of all images.
        share: of the images, above 0 and at most 1.
        seed: another one draws another part.
    """
    if share == 1:
        return np.arange(len(labels))
    classes, counts = np.unique(labels, return_counts=True)
    each = max(1, round(share * len(labels) / len(classes)))
    found = [
        np.flatnonzero(labels == label)[rng.permutation(rng.key(seed, "part", int(label)), int(count))[:each]]
        for label, count in zip(classes, counts, strict=True)
    ]
    return np.sort(np.concatenate(found)).astype(np.int64)


def digest(index: rng.Positions, labels: Labels) -> str:
    """Which images a part has, and their labels, as 16 hexadecimal digits of SHA-256."""
    text = "\n".join(f"{i} {label}" for i, label in zip(index.tolist(), labels[index].tolist(), strict=True))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def listing(index: rng.Positions, labels: Labels) -> str:
    """The part as a text file: a line for each image with its index and its label."""
    return "".join(f"{i} {label}\n" for i, label in zip(index.tolist(), labels[index].tolist(), strict=True))


def percent(share: float) -> str:
    """The name of a share in keys and files, for example ``1pct`` or ``0.5pct``."""
    return f"{100 * share:.6g}pct"
