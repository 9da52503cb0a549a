"""Random views of a batch of images, in one vectorised pass on the images' device, with separate parameters for each sample.

Operations and parameters have the same meaning as in torchvision (crop and resize without antialiasing; colour operations in a
random order for each sample); the parameters are pure functions of (seed, epoch, position), see rotssl.base.rng.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from rotssl.base import rng
from rotssl.base.rng import Floats, Positions
from rotssl.base.step import StepContext
from rotssl.config.resolved import ResolvedViews
from rotssl.data.pixels import BLUR, GRAYSCALE, NOTHING, SOLARIZE, Steps, apply_steps, sort_steps

Mask = npt.NDArray[np.bool_]

RATIO = (3 / 4, 4 / 3)  # range of a crop's width / height
BLUR_SIGMA = (0.1, 2.0)  # pixels


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
        height: height of the images in pixels.
        width: width of the images in pixels.
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


def draw_jitter(stream: int, positions: Positions, strengths: tuple[float, ...], p: float) -> Steps:
    """Brightness, contrast, saturation and hue by random factors, in an order drawn for each sample.

    Args:
        stream: key of the draws.
        positions: (B,).
        strengths: factor ranges 1 +- s for brightness, contrast and saturation; +- s for hue.
        p: probability that a sample is changed at all.
    """
    draws = rng.uniform(stream, positions, 9)
    order = np.argsort(draws[:, 1:5], axis=1)
    low = np.array([max(0.0, 1 - s) for s in strengths[:3]] + [-strengths[3]])
    high = np.array([1 + s for s in strengths[:3]] + [strengths[3]])
    factors = np.take_along_axis(low + (high - low) * draws[:, 5:], order, 1)
    touched = (draws[:, :1] < p) & (np.array(strengths) > 0)[order]
    return Steps(np.where(touched, order, NOTHING).T, factors.T)


@dataclass(frozen=True)
class Crop:
    """The parameters of one view: side in pixels, range of the share of the area, probabilities of blur and solarisation."""

    size: int
    scale: tuple[float, float]
    blur: float = 0.0
    solarize: float = 0.0


class Views(NamedTuple):
    """The views of a batch, each (B, 3, S, S) with its own S: global, local, and those requested by tasks, by task."""

    full: list[Tensor]
    local: list[Tensor]
    own: dict[str, list[Tensor]]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Views":
        """Apply a function to every view."""
        own = {name: [change(view) for view in views] for name, views in self.own.items()}
        return Views([change(view) for view in self.full], [change(view) for view in self.local], own)


class Plan(NamedTuple):
    """How to make one view: the slices of sort_steps(), and the shapes of its numbers."""

    slices: list[list[tuple[int, int, int]]]
    shapes: list[tuple[int, ...]]


@dataclass(frozen=True)
class Draws:
    """What was drawn for the views of a batch; a function of the seed, the epoch, the progress and the samples' positions.

    Attributes:
        epoch: 0-based.
        progress: of the run, on which the views' sides depend.
        positions: of the samples, (B,).
        plans: of each view: global, local, then those of tasks.
        numbers: of all of them, float32 in one tensor, so that they go to the device in one copy.
    """

    epoch: int
    progress: float
    positions: Positions
    plans: list[Plan]
    numbers: Tensor

    def are_for(self, ctx: StepContext) -> bool:
        """Whether they are those of a step."""
        same = (self.epoch, self.progress) == (ctx.epoch, ctx.progress)
        return same and np.array_equal(self.positions, ctx.positions)

    def to(self, device: torch.device) -> "Draws":
        """The same with the numbers on the device, copied without waiting."""
        if device.type != "cuda":
            return self
        return replace(self, numbers=self.numbers.pin_memory().to(device, non_blocking=True))

    def each(self) -> Iterator[tuple[Plan, list[Tensor]]]:
        """Each view's plan and numbers."""
        sizes = [math.prod(shape) for plan in self.plans for shape in plan.shapes]
        parts = iter(self.numbers.split(sizes))
        for plan in self.plans:
            yield plan, [next(parts).view(shape) for shape in plan.shapes]


class Augment:
    """Makes the views of a batch.

    Args:
        views: the resolved section of the configuration.
        size: side of the global views in pixels; at the start of the run views may be smaller, see ``crop_at``.
        mean: channel means of images in [0, 1], for the normalisation.
        std: channel standard deviations.
        seed: seed of the run.
        own: additional crops requested by tasks, by task.
    """

    def __init__(
        self,
        views: ResolvedViews,
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
            self.local = [Crop(views.local_size, views.local_scale, views.local_blur)] * views.local_count
        self.own = dict(own or {})
        self._statistics: dict[torch.device, Tensor] = {}

    def crop_at(self, crop: Crop, progress: float) -> Crop:
        """The crop with the side that it has at a progress of the run."""
        side = self.views.side_at(progress, crop.size, self.size)
        return crop if side == crop.size else replace(crop, size=side)

    def normalize(self, images: Tensor) -> Tensor:
        """Normalise by the data set's mean and standard deviation: (B, 1 or 3, H, W) in [0, 1] -> (B, 3, H, W)."""
        if images.device not in self._statistics:
            both = torch.tensor([self.mean, self.std], dtype=torch.float32).view(2, 1, -1, 1, 1)
            self._statistics[images.device] = both.to(images.device) if images.is_cuda else both
        mean, std = self._statistics[images.device]
        return images.sub(mean).div_(std).expand(-1, 3, -1, -1)

    def evaluation(self, images: Tensor) -> Tensor:
        """Resize whole images to the views' side and normalise them: uint8 (B, C, H, W) -> (B, 3, size, size)."""
        x = images.float() / 255
        if x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return self.normalize(x)

    def __call__(self, images: Tensor, ctx: StepContext) -> Views:
        """The views of a batch: functions of the seed, the epoch and the samples' positions, with the step's sides.

        Args:
            images: uint8 (B, C, H, W), on the device of the views.
            ctx: context of the step, with the positions of these B samples, and what the loader drew for them, if it did.
        """
        draws = next((drawn for drawn in ctx.draws if drawn.are_for(ctx)), None)
        if draws is None:
            draws = self.draw(ctx, images.shape[1:]).to(images.device)
        x = images.float() / 255
        made = iter([self._view(x, plan, numbers) for plan, numbers in draws.each()])
        full, local = ([next(made) for _ in crops] for crops in (self.full, self.local))
        return Views(full, local, {name: [next(made)] for name in self.own})

    def _view(self, x: Tensor, plan: Plan, numbers: list[Tensor]) -> Tensor:
        ticks_y, ticks_x, index, own = numbers
        return self.normalize(apply_steps(crop_resize(x, ticks_y, ticks_x), plan.slices, index.long(), own))

    def draw(self, ctx: StepContext, shape: Sequence[int]) -> Draws:
        """Draw for the views of a batch, on the host.

        Args:
            ctx: context of the step.
            shape: of the stored images, (C, H, W).
        """
        named: list[tuple[Crop, tuple[str, int | str]]] = [(crop, ("view", v)) for v, crop in enumerate(self.full)]
        named += [(crop, ("local", v)) for v, crop in enumerate(self.local)]
        named += [(crop, ("task", name)) for name, crop in self.own.items()]
        plans, arrays = list[Plan](), list[npt.NDArray[Any]]()
        for crop, name in named:
            crop = self.crop_at(crop, ctx.progress)
            slices, drawn = self._draw(crop, (self.seed, ctx.epoch, *name), ctx.positions, shape)
            plans.append(Plan(slices, [array.shape for array in drawn]))
            arrays += drawn
        flat = np.concatenate([array.ravel() for array in arrays]).astype(np.float32)
        return Draws(ctx.epoch, ctx.progress, ctx.positions, plans, torch.from_numpy(flat))

    def _draw(
        self, crop: Crop, name: tuple[int | str, ...], positions: Positions, shape: Sequence[int]
    ) -> tuple[list[list[tuple[int, int, int]]], list[npt.NDArray[Any]]]:
        """The slices of a view's steps, and its numbers: rows and columns to read, then rows and factors of the steps."""
        config, (channels, height, width) = self.views, shape

        def stream(purpose: str) -> int:
            return rng.key(*name, purpose)

        def chance(purpose: str, p: float) -> Mask:
            return rng.uniform(stream(purpose), positions, 1)[:, 0] < p

        boxes = draw_crops(stream("crop"), positions, height, width, crop.scale)
        y_x = crop_grid(boxes, chance("flip", config.flip), height, width, crop.size)
        steps = [draw_jitter(stream("jitter"), positions, config.jitter, config.jitter_p)]
        for op, purpose, p in (
            (GRAYSCALE, "grayscale", config.grayscale),
            (BLUR, "blur", crop.blur),
            (SOLARIZE, "solarize", crop.solarize),
        ):
            if p > 0:
                factors = np.ones((1, len(positions)))
                if op == BLUR:
                    low, high = BLUR_SIGMA
                    factors = low + (high - low) * rng.uniform(stream("sigma"), positions, 1).T
                steps.append(Steps(np.where(chance(purpose, p), op, NOTHING)[None], factors))
        slices, rows, factors = sort_steps(steps, coloured=channels == 3)
        return slices, [*y_x, rows, factors]
