"""Images of two splits that are the same, or look alike. This module does not import torch.

An image has a checksum of its pixels, and a hash of its looks: 128 bits that say which of neighbouring areas is brighter, in
grids of 8 x 9 and 9 x 8. Compression, size and colour change few of them. Each image is compared with the one of train whose
hash is the nearest. Sets of centred objects on an even ground have many look-alikes that are no copies.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from rotssl.data.images import ImageSet, Pixels, Sums

PAIRS = 10**8  # that are compared at the start of a run; below a second on one core
NEAR = 12  # bits of 128 in which two images that look alike may differ
ALIKE = 0.95  # correlation of their shades
EVEN = 1.0  # variance of shades below which an image has no looks
BLOCK = 256  # pairs whose pixels are compared at a time

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
    """Of the shades of pairs of images, (N, C, H, W) each; 0 for even ones. Of the middle square, which is stored in any case."""
    a, b = _middle(ours), _middle(theirs)
    own, other = (a * a).mean(1), (b * b).mean(1)
    found: Floats = (a * b).mean(1) / np.sqrt(np.maximum(own, EVEN) * np.maximum(other, EVEN))
    return np.where((own < EVEN) | (other < EVEN), np.float32(0), found)


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
        lines, among = [], f" of {self.compared:,} compared" if self.compared < self.total else ""
        if len(self.same):
            lines.append(f"warning: images of {name} that are also in train (identical pixels): {len(self.same):,}")
        if len(self.near):
            told = "(python -m rotssl.data.look names them)"
            lines.append(f"warning: images of {name} that look like one in train: {len(self.near):,}{among} {told}")
        return lines


def between(train: ImageSet, other: ImageSet, name: str) -> list[str]:
    """Lines about images of a split of this name that are also in train; none without checksums."""
    if train.sums is None or other.sums is None:
        return []

    def pixels(theirs: Index, ours: Index) -> tuple[Pixels, Pixels]:
        return other.images[theirs], train.images[ours]

    return twins(train.sums, other.sums, pixels, PAIRS).warnings(name)


def twins(train: Sums, others: Sums, pixels: Callable[[Index, Index], tuple[Pixels, Pixels]], pairs: int) -> Twins:
    """Look for images of another split in train.

    Args:
        train: (N, 4), as ``ImageSet.sums``.
        others: the same of the other split, (M, 4).
        pixels: called with indices into others and train, of pairs; returns the images of both.
        pairs: how many to compare at most; if there are more, an even choice of the others is compared.
    """
    if not len(train) or not len(others):
        return Twins(np.empty((0, 2), np.int64), np.empty((0, 2), np.int64), 0, len(others))
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
    blocks = [near[at : at + BLOCK] for at in range(0, len(near), BLOCK)]
    alike = [correlation(*pixels(block[:, 0], block[:, 1])) >= ALIKE for block in blocks]
    near = near[np.concatenate(alike)] if alike else near
    same = np.flatnonzero(equal)
    return Twins(np.stack([same, known[same]], axis=1), near, count, len(others))
