"""The guard: tasks that cannot help are switched off early in the run."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rotssl.base import distributed
from rotssl.base.step import StepContext
from rotssl.tasks.base import Task

Z = 3.29  # normal quantile of a two-sided interval of 99.9%
LEFT = 1.04  # times chance: an accuracy that is not shown to be higher has not left chance
SOLVED = 0.995


def wilson(rate: float, count: int) -> tuple[float, float]:
    """Wilson's 99.9% interval of a share of ``count`` trials (Wilson 1927)."""
    spread = Z * math.sqrt(rate * (1 - rate) / count + Z**2 / (4 * count**2))
    centre = rate + Z**2 / (2 * count)
    scale = 1 + Z**2 / count
    return (centre - spread) / scale, (centre + spread) / scale


class Guard:
    """Judges each task once, by its accuracy over the last half of the first steps after the warm-up.

    A task whose accuracy is not shown to exceed chance teaches the encoder nothing: the images have no orientation, for example.
    One that is solved by then does not need the content of the images: frames or watermarks give the answer away. Both only cost
    the method. The verdict depends on the step and on the accuracy over all workers, so workers agree, and a resumed run repeats
    it.

    Args:
        tasks: the tasks by name; those with no chance level are not judged.
        at: number of steps after which they are judged; 0: never.
        window: number of steps before that whose accuracy counts.

    Attributes:
        off: why each task that was switched off was, by name; always the same object.
    """

    def __init__(self, tasks: Mapping[str, Task], at: int, window: int) -> None:
        self.tasks = {name: task for name, task in tasks.items() if task.chance > 0} if at else {}
        self.at, self.window = at, window
        self.off: dict[str, str] = {}
        self._sums: dict[str, Tensor] = {}
        self._images: dict[str, int] = {}

    def see(self, ctx: StepContext, logs: Mapping[str, Tensor]) -> list[str]:
        """Count a step's accuracy; returns why tasks are switched off from the next step on. Waits for the device once a run."""
        step = ctx.step + 1
        if not self.at - self.window < step <= self.at:
            return []
        for name, task in self.tasks.items():
            accuracy = logs.get(f"{name}/accuracy")
            if accuracy is None:
                continue
            # Views of an image are not independent: each image counts once.
            images = round(task.config.share_at(ctx.progress) * ctx.batch_size)
            part = accuracy.detach().double() * images
            self._sums[name] = self._sums[name] + part if name in self._sums else part
            self._images[name] = self._images.get(name, 0) + images
        if step < self.at:
            return []
        return [self.off[name] for name in self.tasks if self._images.get(name) and self._fails(name)]

    def _fails(self, name: str) -> bool:
        count, chance = self._images[name], self.tasks[name].chance
        rate = min(1.0, max(0.0, float(distributed.mean(self._sums[name])) / count))
        low, high = wilson(rate, count)
        if LEFT * chance < low <= SOLVED:
            return False
        why = "solved from the start" if low > SOLVED else f"chance is {chance:.1%}"
        self.off[name] = (
            f"{name} switched off after step {self.at}: accuracy {rate:.1%} ({low:.1%} to {high:.1%}), {why}"
        )
        return True

    def state(self) -> dict[str, Any]:
        """What the next step needs."""
        return {"off": dict(self.off), "sums": dict(self._sums), "images": dict(self._images)}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore what ``state`` returned; a run that began without a guard is not judged before it has counted a window."""
        self.off.update(state.get("off", {}))
        self._sums = {name: value.to(device) for name, value in state.get("sums", {}).items()}
        self._images = dict(state.get("images", {}))
