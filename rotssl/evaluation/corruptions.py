"""Changed test images: turned by an angle, or with the corruptions of Hendrycks and Dietterich 2019 (arXiv 1903.12261).

The strengths are those of the authors' scripts for CIFAR-10-C, and for ImageNet-C on images with a side above 64 pixels. Left
out are those that need further libraries or pictures: glass and motion blur, snow, frost, fog, spatter, elastic.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from rotssl.base import rng
from rotssl.data.images import Pixels

SMALL = 64  # largest side in pixels of images that have the strengths of CIFAR-10-C

Strength = float | tuple[float, float] | Sequence[float]
Change = Callable[[Tensor, Strength, np.random.Generator], Tensor]


def _like(x: Tensor, values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).view_as(x)


def gaussian_noise(x: Tensor, c: float, gen: np.random.Generator) -> Tensor:
    """Normal noise of deviation c on every value."""
    return x + _like(x, gen.normal(0, c, x.shape))


def shot_noise(x: Tensor, c: float, gen: np.random.Generator) -> Tensor:
    """Poisson noise: counts of mean c x value, divided by c."""
    return _like(x, gen.poisson(x.numpy() * c) / c)


def impulse_noise(x: Tensor, c: float, gen: np.random.Generator) -> Tensor:
    """A share c of the values is black or white, half of them each."""
    draw = _like(x, gen.random(x.shape))
    return torch.where(draw < c / 2, 0.0, torch.where(draw < c, 1.0, x))


def speckle_noise(x: Tensor, c: float, gen: np.random.Generator) -> Tensor:
    """Normal noise of deviation c x value."""
    return x + x * _like(x, gen.normal(0, c, x.shape))


def gaussian_blur(x: Tensor, c: float, gen: np.random.Generator) -> Tensor:
    """Gaussian blur of c pixels, cut off at 4 c; borders are repeated."""
    half = int(4 * c + 0.5)
    line = torch.exp(-0.5 * (torch.arange(-half, half + 1, dtype=torch.float32) / c) ** 2)
    line = (line / line.sum()).view(1, 1, -1, 1)
    flat = x.flatten(0, 1)[:, None]
    for kernel, margin in ((line, (0, 0, half, half)), (line.mT, (half, half, 0, 0))):
        flat = F.conv2d(F.pad(flat, margin, mode="replicate"), kernel)
    return flat.view_as(x)


def disk(radius: float, alias: float) -> Tensor:
    """The kernel of a lens out of focus: a disk of a radius in pixels, its edge softened by a Gaussian of ``alias`` pixels."""
    reach, half = (8, 1) if radius <= 8 else (int(radius), 2)
    line = torch.arange(-reach, reach + 1, dtype=torch.float32)
    round_ = ((line[:, None] ** 2 + line**2) <= radius**2).float()
    soft = torch.exp(-0.5 * (torch.arange(-half, half + 1, dtype=torch.float32) / alias) ** 2)
    soft = soft / soft.sum()
    whole = F.pad(round_[None, None] / round_.sum(), [half] * 4, mode="reflect")
    kernel = F.conv2d(whole, torch.outer(soft, soft)[None, None])[0, 0]
    kept = int((kernel.sum(0) > 1e-6).nonzero().min())  # the same on all sides
    return kernel[kept : len(kernel) - kept, kept : len(kernel) - kept]


def defocus_blur(x: Tensor, c: tuple[float, float], gen: np.random.Generator) -> Tensor:
    """Blur by a disk of radius c[0] with an edge of c[1] pixels; borders are mirrored."""
    kernel = disk(*c)
    half = len(kernel) // 2
    flat = F.pad(x.flatten(0, 1)[:, None], [half] * 4, mode="reflect")
    return F.conv2d(flat, kernel[None, None]).view_as(x)


def zoom_blur(x: Tensor, c: Sequence[float], gen: np.random.Generator) -> Tensor:
    """The mean of the image and of itself enlarged by the factors c."""
    total = x.clone()
    for factor in c:
        sides = [math.ceil(side / factor) for side in x.shape[2:]]
        top, left = ((side - cut) // 2 for side, cut in zip(x.shape[2:], sides, strict=True))
        part = x[:, :, top : top + sides[0], left : left + sides[1]]
        # A factor may enlarge to a pixel less than the whole side, by rounding.
        large = [max(round(cut * factor), side) for side, cut in zip(x.shape[2:], sides, strict=True)]
        part = F.interpolate(part, large, mode="bilinear", align_corners=True)
        top, left = ((big - side) // 2 for big, side in zip(large, x.shape[2:], strict=True))
        total += part[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    return total / (len(c) + 1)


def brightness(x: Tensor, c: float, gen: np.random.Generator) -> Tensor:
    """The value of HSV raised by c; hue and saturation stay."""
    value = x.amax(1, keepdim=True)
    raised = (value + c).clamp(max=1)
    return torch.where(value > 0, x * (raised / value.clamp_min(1e-12)), raised)


def contrast(x: Tensor, c: float, gen: np.random.Generator) -> Tensor:
    """The distance from each channel's mean, times c."""
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * c + mean


def _each(x: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """The images changed by Pillow, one after the other."""
    made = []
    for pixels in (x * 255).round().byte().numpy():
        image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
        found = np.asarray(change(image))
        made.append(found[None] if found.ndim == 2 else found.transpose(2, 0, 1))
    return torch.from_numpy(np.stack(made)).float() / 255


def pixelate(x: Tensor, c: float, gen: np.random.Generator) -> Tensor:
    """Reduced to a share c of the side and enlarged again, by boxes."""
    height, width = x.shape[2:]
    small = int(width * c), int(height * c)
    return _each(
        x, lambda image: image.resize(small, Image.Resampling.BOX).resize((width, height), Image.Resampling.BOX)
    )


def jpeg(x: Tensor, c: float, gen: np.random.Generator) -> Tensor:
    """Compressed by JPEG with quality c."""

    def compressed(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(c))
        return Image.open(file)

    return _each(x, compressed)


def _zooms(ends: Sequence[float], steps: Sequence[float]) -> tuple[Strength, ...]:
    return tuple(tuple(np.arange(1, end, step).tolist()) for end, step in zip(ends, steps, strict=True))


@dataclass(frozen=True)
class Corruption:
    """A corruption, and its strengths at the severities 1 to 5 for images up to 64 pixels and for larger ones."""

    change: Callable[..., Tensor]
    small: tuple[Strength, ...]
    large: tuple[Strength, ...]


CORRUPTIONS: Mapping[str, Corruption] = {
    "gaussian_noise": Corruption(gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": Corruption(shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": Corruption(impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "speckle_noise": Corruption(speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2), (0.15, 0.2, 0.35, 0.45, 0.6)),
    "gaussian_blur": Corruption(gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1), (1, 2, 3, 4, 6)),
    "defocus_blur": Corruption(
        defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "zoom_blur": Corruption(
        zoom_blur,
        _zooms((1.06, 1.11, 1.16, 1.21, 1.26), [0.01] * 5),
        _zooms((1.11, 1.16, 1.21, 1.26, 1.31), (0.01, 0.01, 0.02, 0.02, 0.03)),
    ),
    "brightness": Corruption(brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": Corruption(contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "pixelate": Corruption(pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg": Corruption(jpeg, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}


def corrupted(images: Pixels, name: str, severity: int, seed: int = 0, first: int = 0) -> Pixels:
    """A block of images with a corruption.

    Args:
        images: uint8 (B, C, H, W).
        name: of CORRUPTIONS.
        severity: 1 to 5.
        seed: of the noise, which is numpy's.
        first: position of the block in its set, which gives each block its own noise.

    Returns:
        uint8 (B, C, H, W); values are cut off, as in the authors' scripts.
    """
    kind = CORRUPTIONS[name]
    strength = (kind.small if max(images.shape[2:]) <= SMALL else kind.large)[severity - 1]
    gen = np.random.Generator(np.random.Philox(rng.key(seed, name, severity, first)))
    changed = kind.change(torch.from_numpy(images).float() / 255, strength, gen)
    found: Pixels = (changed.clamp(0, 1) * 255 + 1e-4).byte().numpy()  # 1e-4: whole numbers stay what they are
    return found


def turned(images: Pixels, degrees: float) -> Pixels:
    """Images turned counterclockwise: by multiples of 90 degrees exactly, else bilinearly; what is outside is mirrored.

    Args:
        images: uint8 (B, C, H, W).
        degrees: the angle.

    Returns:
        uint8 (B, C, H, W); H and W change places if the angle is 90 or 270.
    """
    if degrees % 90 == 0:
        return np.ascontiguousarray(np.rot90(images, int(degrees // 90), axes=(2, 3)))
    x, angle = torch.from_numpy(images).float(), math.radians(degrees)
    ratio = images.shape[3] / images.shape[2]
    # In units of half the height, so that pixels stay square.
    cos, sin = math.cos(angle), math.sin(angle)
    theta = torch.tensor([[cos, -sin / ratio, 0.0], [sin * ratio, cos, 0.0]])
    grid = F.affine_grid(theta.expand(len(x), -1, -1), list(x.shape), align_corners=False)
    found = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    made: Pixels = found.round().clamp(0, 255).byte().numpy()
    return made
