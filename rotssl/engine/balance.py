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
RECENT = 0.98  # of those of accuracies
WHOLE = 1.2  # times chance: from this accuracy on, a task has its whole share


class Balance(nn.Module):
    """The gradients of the method and of each task where the task's head branches off, and the weights of tasks with weight auto.

    The share of a task is |g_task| / (|g_task| + |g_ssl|), of the gradients of its weighted loss and of the method's with respect
    to the tensor that its head reads, over the batch of all workers. Hooks take the norms during the step's only backward pass,
    so they cost nothing. With weight auto the next step's weight is S / (1 - S) x the moving average of |g_ssl| over that of the
    unweighted |g_task|, as in the balancer of EnCodec (Defossez et al. 2022, arXiv 2210.13438, section 3.4), but only the task is
    scaled. At the first step both norms count as equal.

    Where a task cannot be solved, its gradient is small and without direction, and the share would scale it up. So the encoder
    gets the gradient of a task with weight auto times its gate, (accuracy / chance - 1) / 0.2 between 0 and 1, of the moving
    average of its accuracy, which starts at chance. The task's head learns at full strength.

    Args:
        tasks: the tasks by name.
    """

    norms: Tensor  # of the tasks with weight auto: moving averages of |g_ssl| and |g_task|, (T, 2)
    accuracy: Tensor  # of the same tasks, of their accuracy, (T,)

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        self.tasks = dict(tasks)
        self.auto = [name for name, task in tasks.items() if task.config.weight == "auto"]
        self.register_buffer("norms", torch.zeros(len(self.auto), 2), persistent=False)
        self.register_buffer("accuracy", torch.tensor([tasks[name].chance for name in self.auto]), persistent=False)
        self._squares: dict[str, Tensor] = {}
        self._weights: dict[str, float | Tensor] = {}
        self._gates: dict[str, Tensor] = {}
        self._accuracies: dict[str, list[Tensor]] = {}  # of the step's forward passes
        self._paused = False

    def fork(self, owner: str, x: Tensor) -> Tensor:
        """The same tensor, whose gradient from here on belongs to an owner: a task's name, or ``ssl at PLACE``."""
        if not x.requires_grad:
            return x
        out = x.view_as(x)
        out.register_hook(functools.partial(self._note, owner))
        return out

    def _note(self, owner: str, gradient: Tensor) -> Tensor | None:
        if not self._paused:
            square = full_precision(gradient).square().sum()
            self._squares[owner] = self._squares[owner] + square if owner in self._squares else square
        return gradient * self._gates[owner].to(gradient.dtype) if owner in self._gates else None

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within the body, backward passes are not a step's."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def weight(self, name: str, progress: float, accuracy: Tensor | None = None) -> float | Tensor:
        """Weight of a task's loss at a progress of the run from 0 to 1; notes its accuracy in a forward pass of the step."""
        weight: float | Tensor = self.tasks[name].weight(progress)
        if name in self.auto:
            i = self.auto.index(name)
            ssl, task = self.norms[i].unbind()
            ratio = torch.where(task > 0, ssl / task, 1.0)
            weight = ratio * (weight / (1 - weight))
            chance = self.tasks[name].chance
            if accuracy is not None and chance > 0:
                self._accuracies.setdefault(name, []).append(accuracy.detach())
                self._gates[name] = ((self.accuracy[i] / chance - 1) / (WHOLE - 1)).clamp(0, 1)
        self._weights[name] = weight
        return weight

    @torch.no_grad()
    def update(self, skipped: Tensor | None = None) -> dict[str, Tensor]:
        """Take the norms of the step's backward pass into the averages; call once per step.

        Args:
            skipped: whether the step was skipped, a bool on the device; the averages then stay as they are.

        Returns:
            ``TASK/grad_share`` of each task that took part, and ``TASK/weight`` and ``TASK/gate`` of those with weight auto.
        """
        squares, self._squares = self._squares, {}
        accuracies, self._accuracies = self._accuracies, {}
        names = [name for name in self.tasks if name in squares]
        if not names:
            return {}
        seen = torch.stack([self._seen(name, squares, accuracies) for name in names])
        # Where no weight follows from the norms, each worker logs its own, and the logs of workers are averaged.
        seen = distributed.all_reduce(seen) if self.auto else seen
        # Norms are those of the mean of the workers' losses, whatever their number.
        norms, means = seen[:, :2].sqrt() / distributed.world_size(), seen[:, 2] / distributed.world_size()
        logs = {}
        for name, pair, accuracy in zip(names, norms, means, strict=True):
            pull = pair[1] * self._gates[name] if name in self._gates else pair[1]
            logs[f"{name}/grad_share"] = pull / (pull + pair[0])
            if name not in self.auto:
                continue
            i, weight = self.auto.index(name), self._weights[name]
            assert isinstance(weight, Tensor)
            logs[f"{name}/weight"] = weight
            fresh = torch.stack([pair[0], pair[1] / weight]).to(self.norms.dtype)
            usable = torch.isfinite(fresh).all() & (fresh > 0).all()
            if skipped is not None:
                usable = usable & ~skipped
            self.norms[i] = torch.where(usable, self.norms[i].lerp(fresh, 1 - MEMORY), self.norms[i])
            if name in self._gates:
                logs[f"{name}/gate"] = self._gates[name]
                recent = self.accuracy[i].lerp(accuracy.to(self.accuracy.dtype), 1 - RECENT)
                self.accuracy[i] = torch.where(usable, recent, self.accuracy[i])
        return logs

    def _seen(self, name: str, squares: Mapping[str, Tensor], accuracies: Mapping[str, list[Tensor]]) -> Tensor:
        """|g_ssl|^2, |g_task|^2 and the task's accuracy in a step of this worker."""
        own = squares[name]
        accuracy = torch.stack(accuracies[name]).mean() if name in accuracies else torch.zeros_like(own)
        return torch.stack([squares[f"ssl at {self.tasks[name].reads}"], own, accuracy.to(own.dtype)])

    def state(self) -> dict[str, Any]:
        """The averages, by task: |g_ssl|, |g_task| and the accuracy, (3,)."""
        rows = torch.cat([self.norms, self.accuracy[:, None]], dim=1)
        return {name: row.clone() for name, row in zip(self.auto, rows, strict=True)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state`` returned; tasks that it does not know start anew."""
        for i, name in enumerate(self.auto):
            if name in state:
                row = state[name]
                self.norms[i] = row[:2]
                self.accuracy[i] = row[2] if len(row) > 2 else 1.0  # of a version without gates: the whole share
