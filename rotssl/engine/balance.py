"""How strongly each task pulls at the encoder beside the method, and the weights that follow from it."""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rotssl.base import distributed
from rotssl.models.passes import as_one
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

    Where a task cannot be solved, its gradient is small and points nowhere in particular, and the share would scale it up. So the
    encoder gets the gradient of a task with weight auto times its gate: (accuracy / chance - 1) / 0.2 between 0 and 1, of the
    moving average of its accuracy, which starts at chance. The task's head learns at full strength.

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
        self._found: dict[str, list[Tensor]] = {}  # norms of the step's gradients, by owner
        self._weights: dict[str, float | Tensor] = {}
        self._gates: dict[str, Tensor] = {}
        self._accuracies: dict[str, list[Tensor]] = {}  # of the step's forward passes
        self._paused = False

    def forked(self, owner: str, views: Sequence[Tensor]) -> list[Tensor]:
        """``fork`` of each view."""
        return as_one(functools.partial(self.fork, owner), views)

    def fork(self, owner: str, x: Tensor) -> Tensor:
        """The same tensor, whose gradient from here on belongs to an owner: a task's name, or ``ssl at PLACE``."""
        if not x.requires_grad:
            return x
        out = x.view_as(x)
        out.register_hook(functools.partial(self._note, owner))
        return out

    def _note(self, owner: str, gradient: Tensor) -> Tensor | None:
        if not self._paused:
            wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
            self._found.setdefault(owner, []).append(torch.linalg.vector_norm(gradient, dtype=wide))
        return gradient * self._gates[owner].to(gradient.dtype) if owner in self._gates else None

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within the body, passes are not a step's."""
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
                if not self._paused:
                    self._accuracies.setdefault(name, []).append(accuracy.detach())
                self._gates[name] = ((self.accuracy[i] - chance) / ((WHOLE - 1) * chance)).clamp(0, 1)
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
        found, self._found = self._found, {}
        accuracies, self._accuracies = self._accuracies, {}
        names = [name for name in self.tasks if name in found]
        if not names:
            return {}
        owners = [owner for name in names for owner in (f"ssl at {self.tasks[name].reads}", name)]
        each = [torch.linalg.vector_norm(torch.stack(of)) if of[1:] else of[0] for of in (found[o] for o in owners)]
        pairs: Iterable[Sequence[Tensor] | Tensor] = list(zip(each[::2], each[1::2], strict=True))
        # Where no weight follows from the norms, each worker logs its own share, and the logs of workers are averaged.
        if self.auto:
            seen = [accuracies.get(name, []) for name in names]
            pairs, recent = self._of_all_workers(torch.stack(each).view(-1, 2), seen)
        logs = {}
        for row, (name, pair) in enumerate(zip(names, pairs, strict=True)):
            pull = pair[1] * self._gates[name] if name in self._gates else pair[1]
            logs[f"{name}/grad_share"] = pull / (pull + pair[0])
            if name not in self.auto:
                continue
            i, weight = self.auto.index(name), self._weights[name]
            assert isinstance(weight, Tensor)
            logs[f"{name}/weight"] = weight
            fresh = torch.stack([pair[0], pair[1] / weight]).to(self.norms.dtype)
            usable = ((fresh > 0) & (fresh < math.inf)).all()
            if skipped is not None:
                usable = usable & ~skipped
            self.norms[i] = torch.where(usable, self.norms[i].lerp(fresh, 1 - MEMORY), self.norms[i])
            if name in self._gates:
                logs[f"{name}/gate"] = self._gates[name]
                moved = self.accuracy[i].lerp(recent[row], 1 - RECENT)
                self.accuracy[i] = torch.where(usable, moved, self.accuracy[i])
        return logs

    def _of_all_workers(self, norms: Tensor, accuracies: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
        """The norms of the mean of the workers' losses, and the mean accuracies, whatever the number of workers."""
        means = [torch.stack(seen).mean() if seen else norms.new_zeros(()) for seen in accuracies]
        accuracy, workers = torch.stack(means).to(norms.dtype), distributed.world_size()
        if workers > 1:
            sums = distributed.all_reduce(torch.cat([norms.square().flatten(), accuracy]))
            squares, accuracy = sums.split([norms.numel(), len(means)])
            norms, accuracy = squares.sqrt().view_as(norms) / workers, accuracy / workers
        return norms, accuracy.to(self.accuracy.dtype)

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
