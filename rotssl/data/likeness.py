"""Images of two splits that are the same, or look so. This module does not import torch.

An image has a checksum of its pixels and a hash of its looks: of the means of 8 x 9 and of 9 x 8 areas, whether each is brighter
than its neighbour, 128 bits. Compression, size and colour change few of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from rotssl.data.images import Pixels

PAIRS = 10**8  # that are compared at the start of a run; about a second on one core
NEAR = 12  # bits of 128 in which two images that look alike may differ
ALIKE = 0.95  # correlation of their shades

Sums = npt.NDArray[np.uint64]
Index = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


def _areas(size: int, count: int) -> Floats:
    """(count, size): which share of each pixel of a side lies in each of ``count`` equal parts."""
    edges, pixels = np.linspace(0, size, count + 1)[:, None], np.arange(size)
    shares: Floats = np.clip(np.minimum(pixels + 1, edges[1:]) - np.maximum(pixels, edges[:-1]), 0, None).astype(
        np.float32
    )
    return shares


def look(image: Image.Image) -> tuple[int, int]:
    """The hash of an image's looks, as two numbers of 64 bits."""
    shades = image.convert("L")
    across, down = (np.asarray(shades.resize(size, Image.Resampling.BOX), np.int16) for size in ((9, 8), (8, 9)))
    bits = np.concatenate([np.diff(across, axis=1).ravel() > 0, np.diff(down, axis=0).ravel() > 0])
    first, second = np.packbits(bits).view(np.uint64).tolist()
    return first, second


def _middle(images: Pixels) -> Floats:
    """Shades of the square in the middle, in 32 x 32 areas, their mean taken away, (N, 1024)."""
    *_, high, wide = images.shape
    side = min(high, wide)
    top, left, areas = (high - side) // 2, (wide - side) // 2, _areas(side, 32)
    shades = areas @ images[..., top : top + side, left : left + side].mean(1, dtype=np.float32) @ areas.T
    apart: Floats = (shades - shades.mean((1, 2), keepdims=True)).reshape(len(images), -1)
    return apart


def correlation(ours: Pixels, theirs: Pixels) -> Floats:
    """Of the shades of pairs of images, (N, C, H, W) each, in the square in their middle, which all are stored with."""
    a, b = _middle(ours), _middle(theirs)
    lengths = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    found: Floats = (a * b).sum(1) / np.where(lengths > 0, lengths, 1)
    return found


@dataclass(frozen=True)
class Twins:
    """Images of another split that are also in train, as rows (theirs, train's).

    Attributes:
        same: those with identical pixels.
        near: those that look alike, of the ones that were compared.
        compared: how many were compared.
        total: images of the other split.
    """

    same: Index
    near: Index
    compared: int
    total: int

    def warnings(self, name: str) -> list[str]:
        """Lines for a split of this name."""
        lines = []
        if len(self.same):
            lines.append(f"warning: {len(self.same):,} images of {name} are also in train (identical pixels)")
        if len(self.near):
            among = f" of {self.compared:,} compared" if self.compared < self.total else ""
            lines.append(
                f"warning: {len(self.near):,}{among} images of {name} look like one in train"
                " (python -m rotssl.data.look names them)"
            )
        return lines


def twins(train: Sums, others: Sums, pixels: Callable[[Index, Index], tuple[Pixels, Pixels]], pairs: int) -> Twins:
    """Look for images of another split in train.

    Args:
        train: (N, 4) of 64 bits, as in ``decoding.Decoded``: checksums of file and pixels, then the hash.
        others: the same of the other split, (M, 4).
        pixels: called with indices into others and train, of pairs; returns the images of both.
        pairs: how many to compare at most; if there are more, an even choice of the others is compared.
    """
    order = np.argsort(train[:, 1], kind="stable")
    at = np.searchsorted(train[order, 1], others[:, 1])
    known = order[np.minimum(at, len(train) - 1)]
    equal = train[known, 1] == others[:, 1]
    count = min(len(others), max(1, pairs // len(train)))
    chosen = np.linspace(0, len(others) - 1, count).astype(np.int64)
    new = chosen[~equal[chosen]]
    first, second = (np.ascontiguousarray(train[:, column]) for column in (2, 3))
    best = np.empty((len(new), 2), np.int64)
    for row, index in enumerate(new):
        apart = np.bitwise_count(first ^ others[index, 2]) + np.bitwise_count(second ^ others[index, 3])
        nearest = int(apart.argmin())
        best[row] = nearest, apart[nearest]
    within = best[:, 1] <= NEAR
    near = np.stack([new[within], best[within, 0]], axis=1)
    if len(near):
        near = near[correlation(*pixels(near[:, 0], near[:, 1])) >= ALIKE]
    same = np.flatnonzero(equal)
    return Twins(np.stack([same, known[same]], axis=1), near, count, len(others))
