"""Schedules as pure functions of progress; progress runs from 0 (first step) to 1 (after the last)."""

import math


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from ``start`` at progress 0 to ``end`` at progress 1."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def learning_rate(peak: float, step: int, total_steps: int, warmup_steps: int, shape: str) -> float:
    """Learning rate of a step: linear warm-up to the peak, then ``cosine`` to 0 or ``constant``.

    Args:
        peak: the highest rate.
        step: 0-based index of the optimizer step.
        total_steps: steps of the whole run.
        warmup_steps: steps of the warm-up; step i of them has peak x (i + 1) / warmup_steps, so that no step is wasted at 0.
        shape: ``cosine`` or ``constant``.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if shape == "constant":
        return peak
    return cosine(peak, 0.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))


def task_weight(weight: float, progress: float, shape: str) -> float:
    """Weight of an auxiliary task: ``constant``, or ``linear`` or ``cosine`` from the given weight to 0."""
    if shape == "constant":
        return weight
    return weight * (1 - progress) if shape == "linear" else cosine(weight, 0.0, progress)
