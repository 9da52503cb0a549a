"""Random views of a batch of images, in one vectorised pass on the images' device, with separate parameters for each sample.

Operations and parameters have the same meaning as in torchvision (crop and resize without antialiasing; colour operations in a
random order for each sample); the parameters are pure functions of (seed, epoch, position), see rotssl.base.rng.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from rotssl.base import rng
from rotssl.base.rng import Mask, Positions
from rotssl.base.step import StepContext
from rotssl.config.resolved import ResolvedViews
from rotssl.data.crops import Crops, Cut, crop_grid, crop_resize, draw_best, draw_crops, overlap, rows_of
from rotssl.data.draws import Draws, Plan
from rotssl.data.pixels import (
    BLUR,
    GRAYSCALE,
    NOTHING,
    SOLARIZE,
    Steps,
    all_steps,
    apply_masked,
    apply_steps,
    sort_steps,
)
from rotssl.data.saliency import Judge

BLUR_SIGMA = (0.1, 2.0)  # pixels


def masked_view(
    images: Tensor, y: Tensor, x: Tensor, ops: Tensor, factors: Tensor, normal: Tensor, possible: list[tuple[int, ...]]
) -> Tensor:
    """A view of a batch: crop, flip, resize, change colours and normalise, with no shape that depends on draws.

    Args:
        images: uint8 (B, C, H, W).
        y: rows to read, (B, S), from crop_grid().
        x: columns to read, (B, S).
        ops: see apply_masked().
        factors: likewise.
        normal: mean and standard deviation, (2, 1, C, 1, 1).
        possible: see apply_masked().

    Returns:
        (B, 3, S, S).
    """
    size = y.shape[1]
    grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=3)
    pixels = F.grid_sample(images.float() / 255, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return _recolour(pixels, ops, factors, normal, possible)


def masked_cut(images: Tensor, ops: Tensor, factors: Tensor, normal: Tensor, possible: list[tuple[int, ...]]) -> Tensor:
    """As ``masked_view``, of images that are cut already, uint8 (B, C, S, S)."""
    return _recolour(images.float() / 255, ops, factors, normal, possible)


def _recolour(pixels: Tensor, ops: Tensor, factors: Tensor, normal: Tensor, possible: list[tuple[int, ...]]) -> Tensor:
    mean, std = normal
    return apply_masked(pixels, possible, ops, factors).sub(mean).div(std).expand(-1, 3, -1, -1)


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
    return Steps(
        np.where(touched, order, NOTHING).T, factors.T, tuple(np.flatnonzero(np.array(strengths) > 0).tolist())
    )


@dataclass(frozen=True)
class Crop:
    """The parameters of one view: side in pixels, range of the share of the area, probabilities of blur and solarisation."""

    size: int
    scale: tuple[float, float]
    blur: float = 0.0
    solarize: float = 0.0


class Views(NamedTuple):
    """The views of a batch, each (B, 3, S, S) with its own S: global, local, and those requested by tasks, by task.

    ``logs`` has scalars of the draws to log.
    """

    full: list[Tensor]
    local: list[Tensor]
    own: dict[str, list[Tensor]]
    logs: Mapping[str, Tensor] = MappingProxyType({})

    def map(self, change: Callable[[Tensor], Tensor]) -> "Views":
        """Apply a function to every view."""
        own = {name: [change(view) for view in views] for name, views in self.own.items()}
        return self._replace(
            full=[change(view) for view in self.full], local=[change(view) for view in self.local], own=own
        )


class Augment:
    """Makes the views of a batch.

    Args:
        views: the resolved section of the configuration.
        size: side of the global views in pixels; at the start of the run views may be smaller, see ``crop_at``.
        mean: channel means of images in [0, 1], for the normalisation.
        std: channel standard deviations.
        seed: seed of the run.
        own: additional crops requested by tasks, by task.

    Attributes:
        masked: None, or the functions that make a view without shapes that depend on draws, of whole images and of such that
            are cut already: ``masked_view`` and ``masked_cut``, or compiled ones.
    """

    masked: tuple[Callable[..., Tensor], Callable[..., Tensor]] | None = None

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

    def compile(self) -> None:
        """Make views by a compiled function from now on, which is compiled anew for each kind and size of view."""
        # A run has more of them than torch allows by default, after which it would end with an error.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        whole, cut = (torch.compile(f, fullgraph=True, dynamic=False) for f in (masked_view, masked_cut))
        self.masked = whole, cut

    def normalize(self, images: Tensor) -> Tensor:
        """Normalise by the data set's mean and standard deviation: (B, 1 or 3, H, W) in [0, 1] -> (B, 3, H, W)."""
        mean, std = self._normal(images.device)
        return images.sub(mean).div_(std).expand(-1, 3, -1, -1)

    def _normal(self, device: torch.device) -> Tensor:
        """Mean and standard deviation, (2, 1, C, 1, 1)."""
        if device not in self._statistics:
            both = torch.tensor([self.mean, self.std], dtype=torch.float32).view(2, 1, -1, 1, 1)
            self._statistics[device] = both.to(device) if device.type == "cuda" else both
        return self._statistics[device]

    def evaluation(self, images: Tensor) -> Tensor:
        """Resize whole images to the views' side and normalise them: uint8 (B, C, H, W) -> (B, 3, size, size)."""
        x = images.float() / 255
        if x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return self.normalize(x)

    def __call__(self, images: Tensor, ctx: StepContext) -> Views:
        """The views of a batch: functions of the seed, the epoch and the samples' positions, with the step's sides.

        Args:
            images: uint8 (B, C, H, W), on the device of the views; or what ``cuts`` says, cut, (B, sum of 3 S^2).
            ctx: context of the step, with the positions of these B samples, and what the loader drew for them, if it did.
        """
        cut = images.dim() == 2
        draws = next((drawn for drawn in ctx.draws if drawn.are_for(ctx)), None)
        if draws is None:
            draws = self.draw(ctx, images).to(images.device)
        if cut:
            sides = [crop.size for crop, _ in self._named(ctx.progress)]
            parts = images.split([3 * side**2 for side in sides], dim=1)
            each = [p.reshape(-1, s, s, 3).permute(0, 3, 1, 2) for p, s in zip(parts, sides, strict=True)]
        else:
            each = [images if self.masked is not None else images.float() / 255] * len(draws.plans)
        drawn = zip(each, draws.each(), strict=True)
        made = iter([self._view(x, plan, numbers, cut) for x, (plan, numbers) in drawn])
        full, local = ([next(made) for _ in crops] for crops in (self.full, self.local))
        return Views(full, local, {name: [next(made)] for name in self.own}, draws.logs())

    def _view(self, x: Tensor, plan: Plan, numbers: list[Tensor], cut: bool) -> Tensor:
        if self.masked is not None:
            return self.masked[cut](x, *numbers, self._normal(x.device), plan.work)
        *ticks, index, own = numbers
        pixels = x.float() / 255 if cut else crop_resize(x, *ticks)
        return self.normalize(apply_steps(pixels, plan.work, index.long(), own))

    def _named(self, progress: float) -> list[tuple[Crop, tuple[str, int | str]]]:
        """All views with the names of their draws: global, local, then those of tasks."""
        named: list[tuple[Crop, tuple[str, int | str]]] = [(crop, ("view", v)) for v, crop in enumerate(self.full)]
        named += [(crop, ("local", v)) for v, crop in enumerate(self.local)]
        named += [(crop, ("task", name)) for name, crop in self.own.items()]
        return [(self.crop_at(crop, progress), name) for crop, name in named]

    def cuts(self, ctx: StepContext, heights: Positions, widths: Positions) -> list[Cut]:
        """What to cut out of pictures of these sizes, (B,) each, for the views of a batch."""
        found = []
        for crop, name in self._named(ctx.progress):
            own = self.seed, ctx.epoch, *name
            boxes = self._boxes(crop, own, ctx.positions, heights, widths)
            found.append(Cut(boxes, self._flipped(own, ctx.positions), crop.size))
        return found

    def boxes(
        self, ctx: StepContext, heights: int | Positions, widths: int | Positions, judge: Judge | None = None
    ) -> list[Crops]:
        """The crops of the global views of pictures of these sizes; ``judge`` if there are good crops to choose."""
        named = self._named(ctx.progress)[: len(self.full)]
        own = self.seed, ctx.epoch
        return [self._boxes(crop, (*own, *name), ctx.positions, heights, widths, judge) for crop, name in named]

    def _boxes(
        self,
        crop: Crop,
        name: tuple[int | str, ...],
        positions: Positions,
        height: int | Positions,
        width: int | Positions,
        judge: Judge | None = None,
    ) -> Crops:
        """The boxes of a view, (B,); ``name`` is that of its draws: seed, epoch, kind and number."""
        least, share, first = self.views.min_overlap, self.views.good_crops, (*name[:3], 0, "crop")
        drawn = (*name, "crop"), positions, height, width, crop.scale
        if name[2] == "view" and share > 0:
            assert judge is not None  # rules refuse good crops of pictures that are decoded for their crops
            return draw_best(*drawn, judge.asked, judge.bar)
        if name[2] == "view" and name[3] != 0 and least > 0:
            other = draw_crops(rng.key(*first), positions, height, width, self.full[0].scale)
            return draw_best(*drawn, lambda boxes, rows: overlap(boxes, rows_of(other, rows)), least)
        return draw_crops(rng.key(*drawn[0]), *drawn[1:])

    def _flipped(self, name: tuple[int | str, ...], positions: Positions) -> Mask:
        return rng.uniform(rng.key(*name, "flip"), positions, 1)[:, 0] < self.views.flip

    def draw(self, ctx: StepContext, images: Tensor) -> Draws:
        """Draw for the views of a batch, on the host.

        Args:
            ctx: context of the step.
            images: as for the views. Their pixels are read only for ``good_crops`` and ``log_saliency``, on the host.
        """
        views, cut = self.views, images.dim() == 2
        plans, arrays, seen = list[Plan](), list[npt.NDArray[Any]](), list[tuple[float, float]]()
        judge, rows = None, np.arange(len(images))
        if (views.good_crops > 0 or views.log_saliency) and not cut:
            judge = Judge.of(images.cpu().numpy(), ctx, views.good_crops, views.good_mass)
        for crop, name in self._named(ctx.progress):
            own, grid = (self.seed, ctx.epoch, *name), list[npt.NDArray[Any]]()
            if not cut:
                height, width = images.shape[2:]
                boxes = self._boxes(crop, own, ctx.positions, height, width, judge)
                grid += crop_grid(boxes, self._flipped(own, ctx.positions), height, width, crop.size)
                if judge is not None and name[0] == "view":
                    seen.append((judge.mass(boxes, rows).mean(), judge.good(boxes, rows).mean()))
            work, drawn = self._draw(crop, own, ctx.positions, 3 if cut else images.shape[1])
            plans.append(Plan(work, [array.shape for array in (*grid, *drawn)]))
            arrays += [*grid, *drawn]
        names = ("views/mass", "views/good") if seen else ()
        arrays.append(np.mean(seen, 0) if seen else np.empty(0))
        flat = np.concatenate([array.ravel() for array in arrays]).astype(np.float32)
        return Draws(ctx.epoch, ctx.progress, ctx.positions, plans, names, torch.from_numpy(flat))

    def _draw(
        self, crop: Crop, name: tuple[int | str, ...], positions: Positions, channels: int
    ) -> tuple[Any, list[npt.NDArray[Any]]]:
        """The work of a view on pixels, and what apply_steps() or apply_masked() takes."""
        config = self.views

        def stream(purpose: str) -> int:
            return rng.key(*name, purpose)

        def chance(purpose: str, p: float) -> Mask:
            return rng.uniform(stream(purpose), positions, 1)[:, 0] < p

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
                steps.append(Steps(np.where(chance(purpose, p), op, NOTHING)[None], factors, (op,)))
        if self.masked is not None:
            possible, ops, factors = all_steps(steps, coloured=channels == 3)
            return possible, [ops, factors]
        slices, rows, factors = sort_steps(steps, coloured=channels == 3)
        return slices, [rows, factors]
