"""Schedules as pure functions of progress; progress runs from 0 (first step) to 1 (after the last)."""

import math


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from ``start`` at progress 0 to ``end`` at progress 1."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def learning_rate(
    peak: float, step: int, total_steps: int, warmup_steps: int, shape: str, start: float = 0.0, final: float = 0.0
) -> float:
    """Learning rate of a step: linear warm-up to the peak, then ``cosine`` to the final rate or ``constant``.

    Args:
        peak: the highest rate.
        step: 0-based index of the optimizer step.
        total_steps: number of steps of the run.
        warmup_steps: number of warm-up steps; step i is (i + 1) / warmup_steps of the way, so that no step has rate 0.
        shape: ``cosine`` or ``constant``.
        start: rate at the start of the warm-up.
        final: rate at the end of the cosine, just after the last step.
    """
    if step < warmup_steps:
        return start + (peak - start) * (step + 1) / warmup_steps
    if shape == "constant":
        return peak
    return cosine(peak, final, (step - warmup_steps) / max(1, total_steps - warmup_steps))


def task_weight(weight: float, progress: float, shape: str) -> float:
    """Weight of an auxiliary task: ``constant``, or falling to 0 along a ``linear`` or ``cosine`` schedule."""
    if shape == "constant":
        return weight
    return weight * (1 - progress) if shape == "linear" else cosine(weight, 0.0, progress)
