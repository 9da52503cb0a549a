"""Operations on the pixels of a batch, with a separate order and factor for each sample and the same meaning as in torchvision.

Every operation works in place on x (B, C, H, W), in [0, 1] before and after, with a factor (B, 1, 1, 1) for each sample, and
returns x. torch.where, ==, remainder and writes through an index are avoided: on CPUs each takes 4 to 30 times as long as an
arithmetic operation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rotssl.base.rng import Floats, Positions

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as torchvision's


def luma(x: Tensor) -> Tensor:
    """Brightness of RGB images, (B, 3, H, W) -> (B, 1, H, W); images of one channel are returned as they are."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, dim=1)
    gray: Tensor = (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])
    return gray


def _blend_(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return x.mul_(factor).add_(other * (1 - factor)).clamp_(0, 1)


def brightness_(x: Tensor, factor: Tensor) -> Tensor:
    """Scale towards black."""
    return x.mul_(factor).clamp_(0, 1)


def contrast_(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with each image's mean brightness."""
    return _blend_(x, luma(x.mean((2, 3), keepdim=True)), factor)


def saturation_(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the gray image."""
    return _blend_(x, luma(x), factor)


def hue_(x: Tensor, factor: Tensor) -> Tensor:
    """Turn the hue by ``factor`` of the full circle, in [-0.5, 0.5]; three channels.

    The hue is counted in sixths, from -3 to 3, red being 0, green 2 and blue 4 or -2. Its distance d from red is linear in the
    channels, 1 + (green + blue - red - low) / chroma, and green - blue has its sign. A channel whose own hue is at the distance
    d from the new one is value - chroma clamp(d - 1, 0, 1).
    """
    red, green, blue = x.split(1, dim=1)
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - low
    hue = (green + blue).sub_(red).sub_(low).div_(chroma.clamp_min(torch.finfo(x.dtype).tiny)).add_(1)
    hue.copysign_(green - blue)
    # Reduce shift and channel together to [-3, 3], so that their sum with the hue is in [-6, 6], where d = 3 - ||hue| - 3|.
    shift = 6 * factor - torch.arange(0, 6, 2, device=x.device, dtype=x.dtype).view(1, 3, 1, 1)
    shift -= 6 * (shift / 6).round_()
    fall = (hue + shift).abs_().sub_(3).abs_().clamp_(1, 2)  # 2 - clamp(d - 1, 0, 1)
    return torch.addcmul(value.sub_(chroma, alpha=2), chroma, fall, out=x)


def grayscale_(x: Tensor, factor: Tensor) -> Tensor:
    """The gray image in all channels; no factor."""
    return x.copy_(luma(x).expand_as(x))


def gaussian_blur_(x: Tensor, factor: Tensor) -> Tensor:
    """Gaussian blur by ``factor`` pixels; kernel of a tenth of the side, at least 3, odd."""
    half = max(1, int(0.1 * x.shape[2]) // 2)
    offsets = torch.arange(half + 1, device=x.device, dtype=x.dtype).view(-1, 1, 1, 1, 1)
    weights = torch.exp(-0.5 * (offsets / factor) ** 2)
    weights /= 2 * weights.sum(0) - weights[0]
    # Shifted images added up: a convolution with a kernel for each sample takes 2 to 9 times as long on CPUs.
    for axis, margin in ((2, (0, 0, half, half)), (3, (half, half, 0, 0))):
        size, padded = x.shape[axis], F.pad(x, margin, mode="reflect")
        x.mul_(weights[0])
        for i in range(1, half + 1):
            x.addcmul_(padded.narrow(axis, half - i, size) + padded.narrow(axis, half + i, size), weights[i])
    return x


def solarize_(x: Tensor, factor: Tensor) -> Tensor:
    """Values of at least one half turned into 1 minus them; no factor."""
    return x.sub_((x >= 0.5).to(x.dtype).mul_(2 * x - 1))


OPS = (brightness_, contrast_, saturation_, hue_, grayscale_, gaussian_blur_, solarize_)
BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAYSCALE, BLUR, SOLARIZE, NOTHING = range(8)
COLOURS = SATURATION, HUE, GRAYSCALE  # which do not change gray images


@dataclass(frozen=True)
class Steps:
    """The operations on each sample: indices into OPS, or NOTHING, and factors; each (steps, B).

    ``kinds`` are the operations that may occur.
    """

    ops: Positions
    factors: Floats
    kinds: tuple[int, ...] = tuple(range(NOTHING))


def sort_steps(steps: list[Steps], coloured: bool) -> tuple[list[list[tuple[int, int, int]]], Positions, Floats]:
    """The plan of apply_steps(): before each step the samples are sorted by operation, so that each works on a slice.

    Args:
        steps: one after another.
        coloured: whether the images have colour; saturation, hue and grayscale do not change gray ones.

    Returns:
        For each step its slices (operation, begin, end); the rows to take before each step, and after the last one to restore
        the given order, (steps + 1, B); the factors in the order of the rows, (steps, B).
    """
    ops, factors = np.concatenate([part.ops for part in steps]), np.concatenate([part.factors for part in steps])
    if not coloured:
        ops[np.isin(ops, COLOURS)] = NOTHING
    busy = (ops != NOTHING).any(1)
    ops, factors = ops[busy], factors[busy]
    order = np.argsort(ops, axis=1, kind="stable")
    as_given = np.arange(ops.shape[1])[None]
    places = np.concatenate([as_given, np.argsort(order, axis=1)])  # of each sample, at first and after each step
    rows = np.take_along_axis(places, np.concatenate([order, as_given]), 1)
    slices = []
    for row in ops:
        ends = np.cumsum(np.bincount(row, minlength=NOTHING)).tolist()
        slices.append([(op, a, b) for op, a, b in zip(range(NOTHING), [0, *ends], ends, strict=False) if b > a])
    return slices, rows, np.take_along_axis(factors, order, 1)


def all_steps(steps: list[Steps], coloured: bool) -> tuple[list[tuple[int, ...]], Positions, Floats]:
    """The plan of apply_masked(): what it takes, but for the images.

    Args:
        steps: one after another.
        coloured: as for sort_steps().
    """
    left_out = () if coloured else COLOURS
    parts = [(part, tuple(op for op in part.kinds if op not in left_out)) for part in steps]
    parts = [(part, kinds) for part, kinds in parts if kinds]
    possible = [kinds for part, kinds in parts for _ in part.ops]
    none = steps[0].ops[:0]
    ops, factors = (
        np.concatenate([none, *(p.ops for p, _ in parts)]),
        np.concatenate([none, *(p.factors for p, _ in parts)]),
    )
    return possible, ops, factors


def apply_steps(x: Tensor, slices: list[list[tuple[int, int, int]]], rows: Tensor, factors: Tensor) -> Tensor:
    """Carry out the plan of sort_steps(); x (B, C, H, W) in [0, 1] is overwritten."""
    spare = torch.empty_like(x)  # two swapped buffers: memory that is new to the process costs more than the arithmetic
    for work, own, row in zip([*slices, []], [*factors, factors[:0]], rows, strict=True):
        torch.index_select(x, 0, row, out=spare)
        x, spare = spare, x
        for op, begin, end in work:
            OPS[op](x[begin:end], own[begin:end].view(-1, 1, 1, 1))
    return x


def apply_masked(x: Tensor, possible: Sequence[Sequence[int]], ops: Tensor, factors: Tensor) -> Tensor:
    """Carry out steps in given order without a shape that depends on draws, as torch.compile and CUDA graphs want it.

    Each operation that may occur in a step is computed for all samples, and taken where it was drawn: fused into a few kernels,
    more arithmetic costs less than more launches.

    Args:
        x: (B, C, H, W) in [0, 1].
        possible: the operations that may occur in each step.
        ops: those that were drawn, (steps, B).
        factors: (steps, B).
    """
    for kinds, drawn, own in zip(possible, ops, factors, strict=True):
        done = x
        for op in kinds:
            done = torch.where((drawn == op).view(-1, 1, 1, 1), OPS[op](x.clone(), own.view(-1, 1, 1, 1)), done)
        x = done
    return x
