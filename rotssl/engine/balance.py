"""How strongly each task pulls at the encoder beside the method, and the weights that follow from it."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rotssl.base import distributed
from rotssl.base.precision import full_precision
from rotssl.tasks.base import Task

MEMORY = 0.99  # of the moving averages of gradient norms, per step


class Balance(nn.Module):
    """The gradients of the method and of each task where the task's head branches off, and the weights of tasks with weight auto.

    The share of a task is |g_task| / (|g_task| + |g_ssl|), of the gradients of its weighted loss and of the method's with respect
    to the tensor that its head reads, over the batch of all workers. Hooks take the norms during the step's only backward pass,
    so they cost nothing. With weight auto the next step's weight is S / (1 - S) x the moving average of |g_ssl| over that of the
    unweighted |g_task|, as in the balancer of EnCodec (Defossez et al. 2022, arXiv 2210.13438, section 3.4), but only the task is
    scaled. At the first step both norms count as equal.

    Args:
        tasks: the tasks by name.
    """

    norms: Tensor  # of the tasks with weight auto: moving averages of |g_ssl| and |g_task|, (T, 2)

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        self.tasks = dict(tasks)
        self.auto = [name for name, task in tasks.items() if task.config.weight == "auto"]
        self.register_buffer("norms", torch.zeros(len(self.auto), 2), persistent=False)
        self._squares: dict[str, Tensor] = {}
        self._weights: dict[str, float | Tensor] = {}
        self._paused = False

    def fork(self, owner: str, x: Tensor) -> Tensor:
        """The same tensor, whose gradient from here on belongs to an owner: a task's name, or ``ssl at PLACE``."""
        if not x.requires_grad:
            return x
        out = x.view_as(x)
        out.register_hook(functools.partial(self._note, owner))
        return out

    def _note(self, owner: str, gradient: Tensor) -> None:
        if not self._paused:
            square = full_precision(gradient).square().sum()
            self._squares[owner] = self._squares[owner] + square if owner in self._squares else square

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within the body, backward passes are not a step's."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def weight(self, name: str, progress: float) -> float | Tensor:
        """Weight of a task's loss at a progress of the run from 0 to 1."""
        weight: float | Tensor = self.tasks[name].weight(progress)
        if name in self.auto:
            ssl, task = self.norms[self.auto.index(name)].unbind()
            ratio = torch.where(task > 0, ssl / task, 1.0)
            weight = ratio * (weight / (1 - weight))
        self._weights[name] = weight
        return weight

    @torch.no_grad()
    def update(self, skipped: Tensor | None = None) -> dict[str, Tensor]:
        """Take the norms of the step's backward pass into the averages; call once per step.

        Args:
            skipped: whether the step was skipped, a bool on the device; the averages then stay as they are.

        Returns:
            ``TASK/grad_share`` of each task that took part, and ``TASK/weight`` of those with weight auto.
        """
        squares, self._squares = self._squares, {}
        names = [name for name in self.tasks if name in squares]
        if not names:
            return {}
        pairs = [torch.stack([squares[f"ssl at {self.tasks[name].reads}"], squares[name]]) for name in names]
        # Where no weight follows from the norms, each worker logs its own, and the logs of workers are averaged.
        norms = (distributed.all_reduce(torch.stack(pairs)) if self.auto else torch.stack(pairs)).sqrt()
        norms /= distributed.world_size()  # of the mean of the workers' losses, whatever their number
        logs = {}
        for name, pair in zip(names, norms, strict=True):
            logs[f"{name}/grad_share"] = pair[1] / pair.sum()
            if name not in self.auto:
                continue
            weight = self._weights[name]
            assert isinstance(weight, Tensor)
            logs[f"{name}/weight"] = weight
            average = self.norms[self.auto.index(name)]
            fresh = torch.stack([pair[0], pair[1] / weight]).to(average.dtype)
            usable = torch.isfinite(fresh).all() & (fresh > 0).all()
            if skipped is not None:
                usable = usable & ~skipped
            average.copy_(torch.where(usable, average.lerp(fresh, 1 - MEMORY), average))
        return logs

    def state(self) -> dict[str, Any]:
        """The averages, by task."""
        return {name: row.clone() for name, row in zip(self.auto, self.norms, strict=True)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state`` returned; tasks that it does not know start anew."""
        for name, row in zip(self.auto, self.norms, strict=True):
            if name in state:
                row.copy_(state[name])
