"""What is drawn in a step on its way to the device, without a wait."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rotssl.base import rng

Drawn = npt.NDArray[np.int64] | rng.Floats
_noted: list[Drawn] | None = None
_there: Iterator[Tensor] | None = None


def send(device: torch.device, array: Drawn) -> Tensor:
    """A host array as a tensor on the device, copied asynchronously."""
    if _noted is not None:
        _noted.append(array)
    if _there is not None:
        return next(_there)
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@contextmanager
def noted() -> Iterator[list[Drawn]]:
    """Give the body a list that gets what is sent in it, in order."""
    global _noted
    before, _noted = _noted, []
    try:
        yield _noted
    finally:
        _noted = before


@contextmanager
def sent_before(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Within the body, what is sent is there already: these tensors, in order."""
    global _there
    before, _there = _there, iter(tensors)
    try:
        yield
    finally:
        _there = before
