"""Random boxes of images, and their pixels: crop, flip and resize in one sampling step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rotssl.base import rng
from rotssl.base.rng import Floats, Mask, Positions

RATIO = (3 / 4, 4 / 3)  # range of a crop's width / height


@dataclass(frozen=True)
class Crops:
    """Boxes in pixels of the stored images, each (B,) int64."""

    top: Positions
    left: Positions
    height: Positions
    width: Positions


class Cut(NamedTuple):
    """A view to cut out of pictures: boxes of the upright pictures, which ones are flipped, and the side of the result."""

    boxes: Crops
    flipped: Mask
    size: int


def draw_crops(
    stream: int, positions: Positions, height: int | Positions, width: int | Positions, scale: tuple[float, float]
) -> Crops:
    """Boxes of random area and aspect ratio: the first of ten tries that fits, else the largest central one.

    Args:
        stream: key of the draws.
        positions: positions of the samples, (B,).
        height: height of the images in pixels; of all, or of each, (B,).
        width: width of the images in pixels, likewise.
        scale: smallest and largest share of the area.
    """
    tries = 10
    draws = rng.uniform(stream, positions, 4 * tries).reshape(len(positions), 4, tries)
    high, wide = (np.broadcast_to(side, len(positions)).astype(np.int64) for side in (height, width))
    area = (high * wide)[:, None] * (scale[0] + (scale[1] - scale[0]) * draws[:, 0])
    ratio = np.exp(math.log(RATIO[0]) + math.log(RATIO[1] / RATIO[0]) * draws[:, 1])
    w, h = np.rint(np.sqrt(area * ratio)).astype(np.int64), np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= wide[:, None]) & (h > 0) & (h <= high[:, None])
    first = np.argmax(fits, axis=1)
    rows = np.arange(len(positions))
    found = fits[rows, first]
    # torchvision's fallback: the whole image, cut to the nearest allowed aspect ratio.
    whole = wide / high
    central_w = np.where(whole > RATIO[1], np.minimum(wide, np.rint(high * RATIO[1])), wide).astype(np.int64)
    central_h = np.where(whole < RATIO[0], np.minimum(high, np.rint(wide / RATIO[0])), high).astype(np.int64)
    w, h = np.where(found, w[rows, first], central_w), np.where(found, h[rows, first], central_h)
    top = np.where(found, np.floor(draws[rows, 2, first] * (high - h + 1)), (high - h) // 2).astype(np.int64)
    left = np.where(found, np.floor(draws[rows, 3, first] * (wide - w + 1)), (wide - w) // 2).astype(np.int64)
    return Crops(top, left, h, w)


REDRAWS = 20  # tries after the first one


def overlap(a: Crops, b: Crops) -> Floats:
    """Intersection over union of pairs of boxes of the same images, 0 to 1, (B,)."""

    def shared(start: str, length: str) -> Positions:
        ends = [getattr(box, start) + getattr(box, length) for box in (a, b)]
        common: Positions = np.minimum(*ends) - np.maximum(getattr(a, start), getattr(b, start))
        return np.maximum(0, common)

    both = shared("top", "height") * shared("left", "width")
    share: Floats = both / (a.height * a.width + b.height * b.width - both)
    return share


def draw_best(
    name: tuple[int | str, ...],
    positions: Positions,
    height: int | Positions,
    width: int | Positions,
    scale: tuple[float, float],
    score: Callable[[Crops, Positions], Floats],
    least: float,
) -> Crops:
    """Boxes as of ``draw_crops`` that are good enough: the first of 21 draws that is, else the one with the highest score.

    Each draw has a stream of its own, so that a box is a function of the names and the position alone. The first is that without
    a bound, so that what is good anyway stays as it is.

    Args:
        name: of the draws.
        positions: positions of the samples, (B,).
        height: height of the images in pixels; of all, or of each, (B,).
        width: width of the images in pixels, likewise.
        scale: smallest and largest share of the area.
        score: of R boxes, given with the rows of their samples among the B, (R,).
        least: smallest score that is good enough.
    """
    best = draw_crops(rng.key(*name), positions, height, width, scale)
    most = score(best, np.arange(len(positions)))
    for again in range(1, REDRAWS + 1):
        rows = np.flatnonzero(most < least)
        if not len(rows):
            break
        high, wide = (side if isinstance(side, int) else side[rows] for side in (height, width))
        tried = draw_crops(rng.key(*name, "again", again), positions[rows], high, wide, scale)
        found = score(tried, rows)
        better = found > most[rows]
        chosen = rows[better]
        most[chosen] = found[better]
        for side in ("top", "left", "height", "width"):
            getattr(best, side)[chosen] = getattr(tried, side)[better]
    return best


def rows_of(boxes: Crops, rows: Positions) -> Crops:
    """The boxes of some samples."""
    return Crops(boxes.top[rows], boxes.left[rows], boxes.height[rows], boxes.width[rows])


def crop_grid(crops: Crops, flipped: Mask, height: int, width: int, size: int) -> tuple[Floats, Floats]:
    """The rows and columns that crop_resize() reads, each (B, size), in grid_sample's units; none is outside the crop."""
    centres = (np.arange(size) + 0.5)[None] / size

    def axis(start: Positions, length: Positions, total: int, ticks: Floats) -> Floats:
        start, length = start[:, None], length[:, None]
        pixel: Floats = np.clip(start + ticks * length - 0.5, start, start + length - 1)
        return (2 * pixel + 1) / total - 1

    y = axis(crops.top, crops.height, height, centres)
    return y, axis(crops.left, crops.width, width, np.where(flipped[:, None], centres[:, ::-1], centres))


def crop_resize(images: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Crop, flip and resize bilinearly in one sampling step.

    Args:
        images: (B, C, H, W), float32.
        y: rows to read, (B, S), from crop_grid().
        x: columns to read, (B, S).

    Returns:
        (B, C, S, S).
    """
    size = y.shape[1]
    # Pairs of (x, y), written as complex numbers: twice as fast as stack().
    grid = torch.view_as_real(torch.complex(x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)))
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
