"""Means over an epoch of what its steps log, kept on the device, so that the host waits for it once."""

from collections.abc import Callable

import torch
from torch import Tensor

from rotssl.base import distributed


class Averages:
    """Sums of the logs of an epoch's steps.

    Args:
        may_break: whether values of this name that are not finite don't count, as they come from steps that were left out.
    """

    def __init__(self, may_break: Callable[[str], bool]) -> None:
        self.may_break = may_break
        # By the keys of a step, as a few are not logged by each: one operation for all of them, not one for each.
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._counts: dict[tuple[str, ...], Tensor | int] = {}

    def add(self, logs: dict[str, Tensor]) -> None:
        """Take the scalars of a step."""
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

    def means(self) -> dict[str, float]:
        """The mean of each over the steps of all workers that have it; what no step has is not in it. Waits for the device."""
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for keys, sums in self._sums.items():
            counts = torch.as_tensor(self._counts[keys], device=sums.device).to(sums.dtype).expand_as(sums)
            for key, value, count in zip(keys, sums, counts, strict=True):
                parts.setdefault(key, []).append((value, count))
        whole = [torch.stack([torch.stack(pair) for pair in parts[key]]).sum(0) for key in sorted(parts)]
        found = distributed.mean(torch.stack(whole)).cpu().tolist()
        return {key: value / count for key, (value, count) in zip(sorted(parts), found, strict=True) if count}
