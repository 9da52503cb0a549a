"""Means over an epoch of the logs of its steps, kept on the device so that the host waits only once."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rotssl.base import distributed
from rotssl.config import ResolvedConfig
from rotssl.engine.runtime import RunFailed


class Averages:
    """Sums of the logs of an epoch's steps.

    Args:
        may_break: whether non-finite values of a metric are left out of its mean, because they come from skipped steps.
    """

    def __init__(self, may_break: Callable[[str], bool]) -> None:
        self.may_break = may_break
        # Grouped by the keys of a step, because not all steps log the same: one operation per step, not per scalar.
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._counts: dict[tuple[str, ...], Tensor | int] = {}

    def add(self, logs: dict[str, Tensor]) -> None:
        """Add the scalars of a step."""
        broken = tuple(key for key in sorted(logs) if self.may_break(key))
        whole = tuple(key for key in sorted(logs) if key not in broken)
        for keys in filter(None, (broken, whole)):
            self._add(keys, torch.stack([logs[key].float() for key in keys]), keys is broken)

    def _add(self, keys: tuple[str, ...], values: Tensor, masked: bool) -> None:
        taken: Tensor | int = 1
        if masked:
            taken = values.isfinite()
            values = values.where(taken, 0.0)
        self._sums[keys] = self._sums[keys] + values if keys in self._sums else values
        self._counts[keys] = self._counts.get(keys, 0) + taken

    def state(self) -> dict[str, Any]:
        """The sums and counts of all workers, for a checkpoint; every worker must call it."""
        rows = [torch.cat([sums, self._count(keys)]) for keys, sums in self._sums.items()]
        return {"keys": [list(keys) for keys in self._sums], "values": distributed.gather(torch.cat(rows)[None]).cpu()}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take over what ``state`` returned; with another number of workers, rank 0 takes all of it."""
        values, rank, workers = state["values"], distributed.rank(), distributed.world_size()
        # A step counts as often as there are workers.
        whole = values.mean(0) * workers if rank == 0 else torch.zeros_like(values[0])
        row = (values[rank] if len(values) == workers else whole).to(device)
        for names in state["keys"]:
            keys, size = tuple(names), len(names)
            self._sums[keys], self._counts[keys], row = row[:size], row[size : 2 * size], row[2 * size :]

    def _count(self, keys: tuple[str, ...]) -> Tensor:
        sums = self._sums[keys]
        return torch.as_tensor(self._counts[keys], device=sums.device).to(sums.dtype).expand_as(sums)

    def means(self) -> dict[str, float]:
        """The mean of each scalar over the steps of all workers that logged it. Waits for the device."""
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for keys, sums in self._sums.items():
            for key, value, count in zip(keys, sums, self._count(keys), strict=True):
                parts.setdefault(key, []).append((value, count))
        whole = [torch.stack([torch.stack(pair) for pair in parts[key]]).sum(0) for key in sorted(parts)]
        found = distributed.mean(torch.stack(whole)).cpu().tolist()
        return {key: value / count for key, (value, count) in zip(sorted(parts), found, strict=True) if count}


def check_finite(
    metrics: Mapping[str, float],
    config: ResolvedConfig,
    epoch: int,
    steps: int,
    backing_off: bool,
    broken: int | None = None,
) -> None:
    """Check the metrics of an epoch.

    Args:
        metrics: of the epoch's training.
        config: of the run.
        epoch: 0-based.
        steps: of an epoch.
        backing_off: whether steps may be skipped because the scale of half precision is still being lowered.
        broken: number of the step at which the run broke down, if that is known.

    Raises:
        RunFailed: one is infinite or NaN, or too many steps were skipped.
    """
    rate, train = f"(optim.lr {config.optim.lr:g})", config.train
    bad = [key for key, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise RunFailed(
            f"{bad[0]} became {metrics[bad[0]]} in epoch {epoch + 1} {rate}"
            + ("; the last checkpoint was kept" if epoch else "")
            + (f"; jobs/replay.py takes step {broken} apart" if broken is not None else "")
        )
    skipped = round(metrics.get("optim/skipped_steps", 0.0) * steps)
    if "loss/total" not in metrics or (skipped == steps and not backing_off):
        raise RunFailed(f"all steps of epoch {epoch + 1} were skipped for non-finite gradients {rate}")
    if train.on_nan == "skip" and train.max_skipped is not None and skipped > train.max_skipped:
        told = f"{skipped} of {steps} steps of epoch {epoch + 1} were skipped for non-finite gradients {rate}"
        raise RunFailed(f"{told}, more than train.max_skipped ({train.max_skipped})")
