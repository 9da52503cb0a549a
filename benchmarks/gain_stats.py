"""Statistics of gain.py: differences between paired runs, and the time to an accuracy."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rotssl.reports.statistics import paired_difference

RESAMPLES = 10_000
_CHUNK = 500  # resamples at a time


@dataclass(frozen=True)
class Difference:
    """A mean difference with its 95% interval.

    Attributes:
        mean: ours minus theirs.
        low: lower end; None where there is no interval.
        high: upper end.
        p: one-sided, of no gain.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


def t_difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Over paired seeds, with Student's t interval and test; a single pair has neither."""
    each = np.subtract(ours, theirs)
    if len(each) < 2:
        return Difference(float(each.mean()))
    mean, low, high = paired_difference(ours, theirs)
    error = float(stats.sem(each))
    p = float(stats.t.sf(mean / error, len(each) - 1)) if error > 0 else float(mean <= 0)
    return Difference(mean, low, high, p)


def bootstrap(gains: NDArray[Any]) -> Difference:
    """Over seeds and images, each drawn with replacement, with the percentile interval; all seeds have the same images.

    p is the share of the resamples without a gain. The spread of S seeds comes out too small, by sqrt(1 - 1 / S).

    Args:
        gains: (S, N); of a seed and an image the hit of ours minus that of theirs, or its mean over several comparisons, which
            then share seeds and images.
    """
    found = _resampled(gains)
    low, high = np.quantile(found, [0.025, 0.975])
    p = (1 + int((found <= 1e-12).sum())) / (RESAMPLES + 1)
    return Difference(float(gains.mean()), float(low), float(high), p)


def kept(gains: NDArray[Any], of: NDArray[Any]) -> Difference:
    """The share of another gain that a gain has: the ratio of the means; seeds and images are drawn for both together.

    There is no interval where the other gain may be 0, where 2.5% of its resamples are not above it; fewer of them are left out.
    For seeds it is too narrow, as that of ``bootstrap``.

    Args:
        gains: (S, N), as of ``bootstrap``.
        of: the other, of the same seeds and images.

    Returns:
        The ratio; NaN if the other is a loss.
    """
    if of.mean() <= 0:
        return Difference(math.nan)
    ours, theirs = _resampled(gains), _resampled(of)
    ratio = float(gains.mean() / of.mean())
    if np.quantile(theirs, 0.025) <= 1e-12:
        return Difference(ratio)
    low, high = np.quantile(ours[theirs > 1e-12] / theirs[theirs > 1e-12], [0.025, 0.975])
    return Difference(ratio, float(low), float(high))


def _resampled(gains: NDArray[Any]) -> NDArray[np.float64]:
    """Its mean in each resample, (RESAMPLES,)."""
    seeds, images = gains.shape
    counts = _counts(images, 0)
    rows = gains.T.astype(np.float32)
    means = np.concatenate([counts[i : i + _CHUNK].astype(np.float32) @ rows for i in range(0, RESAMPLES, _CHUNK)])
    found: NDArray[np.float64] = (means.astype(np.float64) / images * _counts(seeds, 1)).sum(1) / seeds
    return found


@lru_cache(maxsize=4)
def _counts(size: int, stream: int) -> NDArray[np.uint8]:
    """How often each of ``size`` things is in each resample, (RESAMPLES, size); the same in every call."""
    draw = np.random.default_rng([0, stream])
    found = np.empty((RESAMPLES, size), np.uint8)
    for row in found:
        row[:] = np.bincount(draw.integers(size, size=size), minlength=size)
    return found


def cost_to(
    points: Mapping[int, Mapping[str, float]],
    level: float,
    metric: str = "knn/top1",
    cost: str = "cost/train_seconds",
) -> float | None:
    """Cost until a run reaches an accuracy, on lines between the epochs that were measured; None if it does not.

    A run that has it at its first measurement counts with that epoch's cost.
    """
    before: tuple[float, float] | None = None
    for epoch in sorted(points):
        score, at = points[epoch].get(metric, math.nan), points[epoch].get(cost, math.nan)
        if math.isnan(score):
            continue
        if score >= level:
            if before is None:
                return at
            share = (level - before[0]) / (score - before[0])
            return before[1] + share * (at - before[1])
        before = score, at
    return None


def with_plain_epochs(points: Mapping[int, Mapping[str, float]], ratio: float) -> dict[int, dict[str, float]]:
    """The points of a whole run with ``cost/plain_epochs``, in which steps that are cheaper by FLOPs count less.

    Args:
        points: of each epoch, from 1 on.
        ratio: seconds of a step over plain's, the mean over the run.
    """
    end = max(points)
    total = end * ratio / points[end]["cost/flops"]
    return {epoch: {**point, "cost/plain_epochs": total * point["cost/flops"]} for epoch, point in points.items()}
