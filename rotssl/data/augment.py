"""Random views of a batch of images, in one vectorised pass on the images' device, with parameters of its own for each sample.

Operations and parameters mean what torchvision's mean (crop and resize without antialiasing; colour operations in a random order
for each sample); the parameters are pure functions of (seed, epoch, position), see rotssl.rng.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from rotssl import rng
from rotssl.rng import Floats, Positions
from rotssl.sections import ViewsConfig

Mask = npt.NDArray[np.bool_]

RATIO = (3 / 4, 4 / 3)  # of a crop's width to its height
BLUR_SIGMA = (0.1, 2.0)  # pixels
LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as torchvision's


@dataclass(frozen=True)
class Crops:
    """Boxes in pixels of the stored images, each (B,) int64."""

    top: Positions
    left: Positions
    height: Positions
    width: Positions


def draw_crops(stream: int, positions: Positions, height: int, width: int, scale: tuple[float, float]) -> Crops:
    """Boxes of random area and aspect ratio: the first of ten tries that fits, else the largest central one.

    Args:
        stream: key of the draws.
        positions: positions of the samples, (B,).
        height: of the images, in pixels.
        width: of the images, in pixels.
        scale: smallest and largest share of the area.
    """
    tries = 10
    draws = rng.uniform(stream, positions, 4 * tries).reshape(len(positions), 4, tries)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[:, 0])
    ratio = np.exp(math.log(RATIO[0]) + math.log(RATIO[1] / RATIO[0]) * draws[:, 1])
    w, h = np.rint(np.sqrt(area * ratio)).astype(np.int64), np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = np.argmax(fits, axis=1)
    rows = np.arange(len(positions))
    found = fits[rows, first]
    # torchvision's fallback: the whole image, cut to the nearest allowed aspect ratio.
    whole = width / height
    central_w = min(width, round(height * RATIO[1])) if whole > RATIO[1] else width
    central_h = min(height, round(width / RATIO[0])) if whole < RATIO[0] else height
    w, h = np.where(found, w[rows, first], central_w), np.where(found, h[rows, first], central_h)
    top = np.where(found, np.floor(draws[rows, 2, first] * (height - h + 1)), (height - h) // 2).astype(np.int64)
    left = np.where(found, np.floor(draws[rows, 3, first] * (width - w + 1)), (width - w) // 2).astype(np.int64)
    return Crops(top, left, h, w)


def _to(device: torch.device, values: Floats | Positions) -> Tensor:
    kind = torch.long if values.dtype.kind in "iu" else torch.float32
    return torch.as_tensor(values).to(device=device, dtype=kind, non_blocking=True)


def crop_resize(images: Tensor, crops: Crops, flipped: Mask, size: int) -> Tensor:
    """Crop, flip and resize bilinearly in one sampling step; no pixel outside of the crop is read.

    Args:
        images: (B, C, H, W), floating point.
        crops: the boxes.
        flipped: (B,) whether to mirror left and right.
        size: side of the result in pixels.

    Returns:
        (B, C, size, size).
    """
    height, width = images.shape[2:]
    centres = (np.arange(size) + 0.5)[None] / size

    def axis(start: Positions, length: Positions, total: int, ticks: Floats) -> Tensor:
        start, length = start[:, None], length[:, None]
        pixel = np.clip(start + ticks * length - 0.5, start, start + length - 1)
        return _to(images.device, (2 * pixel + 1) / total - 1)

    y = axis(crops.top, crops.height, height, centres)
    x = axis(crops.left, crops.width, width, np.where(flipped[:, None], centres[:, ::-1], centres))
    grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=3)
    return F.grid_sample(images, grid.to(images.dtype), mode="bilinear", padding_mode="border", align_corners=False)


def luma(x: Tensor) -> Tensor:
    """Brightness of RGB images, (B, 3, H, W) -> (B, 1, H, W); images of one channel are returned as they are."""
    return x if x.shape[1] == 1 else (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other.expand_as(x), x, factor).clamp_(0, 1)


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Scale towards black; x (B, C, H, W) in [0, 1], factor (B, 1, 1, 1)."""
    return (x * factor).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with each image's mean brightness; shapes as in brightness()."""
    return _blend(x, luma(x).mean((1, 2, 3), keepdim=True), factor)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the gray image; shapes as in brightness()."""
    return _blend(x, luma(x), factor)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by ``shift`` of the full circle, (B, 1, 1, 1) in [-0.5, 0.5]; x (B, 3, H, W) in [0, 1]."""
    red, green, blue = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    safe = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    sixth = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    sixth = sixth + shift.squeeze(1) * 6
    # Each channel is value - chroma x a trapezoid of the hue, moved by 5, 3 and 1 sixths for red, green and blue.
    k = torch.remainder(sixth[:, None] + x.new_tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1), 6)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with a sigma (B,) in pixels for each sample; kernel of a tenth of the side, at least 3, odd."""
    batch, channels, height, width = x.shape
    half = max(1, int(0.1 * height) // 2)
    offsets = torch.arange(-half, half + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets[None] / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    groups = batch * channels
    flat = F.pad(x.reshape(1, groups, height, width), (half, half, half, half), mode="reflect")
    flat = F.conv2d(flat, kernel.view(groups, 1, 1, -1), groups=groups)
    return F.conv2d(flat, kernel.view(groups, 1, -1, 1), groups=groups).view_as(x)


COLOUR_OPS = (brightness, contrast, saturation, hue)


def colour_jitter(x: Tensor, stream: int, positions: Positions, strengths: tuple[float, ...], p: float) -> Tensor:
    """Brightness, contrast, saturation and hue by random factors, in an order drawn for each sample.

    Args:
        x: (B, 1 or 3, H, W) in [0, 1]; gray images are left alone by saturation and hue, which cannot change them.
        stream: key of the draws.
        positions: (B,).
        strengths: factor ranges 1 +- s for brightness, contrast and saturation; +- s for hue.
        p: probability that a sample is touched at all.
    """
    draws = rng.uniform(stream, positions, 9)
    order = np.argsort(draws[:, 1:5], axis=1)
    touched = draws[:, 0] < p
    ops = [op for op in range(4) if strengths[op] > 0 and (op < 2 or x.shape[1] == 3)]
    low = np.array([max(0.0, 1 - s) for s in strengths[:3]] + [-strengths[3]])
    high = np.array([1 + s for s in strengths[:3]] + [strengths[3]])
    factors = low + (high - low) * draws[:, 5:]
    x = x.clone()
    for place in range(4):
        for op in ops:
            chosen = np.flatnonzero(touched & (order[:, place] == op))
            if len(chosen):
                index = _to(x.device, chosen)
                x[index] = COLOUR_OPS[op](x[index], _to(x.device, factors[chosen, op]).view(-1, 1, 1, 1))
    return x


@dataclass(frozen=True)
class Crop:
    """What one view differs in from others: side in pixels, share of the area, probabilities of blur and solarisation."""

    size: int
    scale: tuple[float, float]
    blur: float = 0.0
    solarize: float = 0.0


class Views(NamedTuple):
    """The views of a batch, each (B, 3, S, S) with its own S: global, local, and those that tasks asked for, by task."""

    full: list[Tensor]
    local: list[Tensor]
    own: dict[str, list[Tensor]]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Views":
        """Every view changed alike."""
        own = {name: [change(view) for view in views] for name, views in self.own.items()}
        return Views([change(view) for view in self.full], [change(view) for view in self.local], own)


class Augment:
    """Makes the views of a batch.

    Args:
        views: the section of the configuration, resolved.
        size: side of the global views in pixels.
        mean: channel means for the normalisation, of images in [0, 1].
        std: channel standard deviations.
        seed: of the run.
        own: crops that tasks want for themselves, by task.
    """

    def __init__(
        self,
        views: ViewsConfig,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int,
        own: Mapping[str, Crop] | None = None,
    ) -> None:
        self.views, self.size, self.seed = views, size, seed
        self.mean, self.std = mean, std
        self.full = [
            Crop(size, views.global_scale, views.blur[v % len(views.blur)], views.solarize[v % len(views.solarize)])
            for v in range(views.global_count)
        ]
        self.local: list[Crop] = []
        if views.local_count:
            assert views.local_size != "auto"
            self.local = [Crop(views.local_size, views.local_scale, views.local_blur)] * views.local_count
        self.own = dict(own or {})

    def normalize(self, images: Tensor) -> Tensor:
        """(B, 1 or 3, H, W) in [0, 1] -> (B, 3, H, W) with the data set's mean and deviation taken out."""
        mean, std = images.new_tensor(self.mean).view(1, -1, 1, 1), images.new_tensor(self.std).view(1, -1, 1, 1)
        return ((images - mean) / std).expand(-1, 3, -1, -1)

    def evaluation(self, images: Tensor) -> Tensor:
        """The whole image, resized to the views' side if it has another: uint8 (B, C, H, W) -> (B, 3, size, size)."""
        x = images.float() / 255
        if x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return self.normalize(x)

    def __call__(self, images: Tensor, epoch: int, positions: Positions) -> Views:
        """The views of a batch.

        Args:
            images: uint8 (B, C, H, W), on the device where the views are wanted.
            epoch: 0-based.
            positions: place of each sample in the epoch's global order, (B,).
        """
        x = images.float() / 255

        def make(crop: Crop, *name: int | str) -> Tensor:
            return self._view(x, crop, (self.seed, epoch, *name), positions)

        return Views(
            [make(crop, "view", v) for v, crop in enumerate(self.full)],
            [make(crop, "local", v) for v, crop in enumerate(self.local)],
            {name: [make(crop, "task", name)] for name, crop in self.own.items()},
        )

    def _view(self, x: Tensor, crop: Crop, name: tuple[int | str, ...], positions: Positions) -> Tensor:
        config, device = self.views, x.device

        def stream(purpose: str) -> int:
            return rng.key(*name, purpose)

        def chance(purpose: str, p: float) -> Mask:
            return rng.uniform(stream(purpose), positions, 1)[:, 0] < p

        boxes = draw_crops(stream("crop"), positions, x.shape[2], x.shape[3], crop.scale)
        x = crop_resize(x, boxes, chance("flip", config.flip), crop.size)
        if config.jitter_p > 0:
            x = colour_jitter(x, stream("jitter"), positions, config.jitter, config.jitter_p)
        if config.grayscale > 0 and x.shape[1] == 3:
            gray = _to(device, chance("grayscale", config.grayscale).astype(np.float64)).view(-1, 1, 1, 1)
            x = torch.lerp(x, luma(x).expand_as(x), gray)
        chosen = np.flatnonzero(chance("blur", crop.blur))
        if len(chosen):
            low, high = BLUR_SIGMA
            sigma = low + (high - low) * rng.uniform(stream("sigma"), positions[chosen], 1)[:, 0]
            index = _to(device, chosen)
            x[index] = gaussian_blur(x[index], _to(device, sigma))
        if crop.solarize > 0:
            turned = _to(device, chance("solarize", crop.solarize).astype(np.float64)).view(-1, 1, 1, 1)
            x = torch.where((x >= 0.5) & (turned > 0), 1 - x, x)
        return self.normalize(x)
