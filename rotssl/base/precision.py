"""Half precision where it is asked for, and full precision for results that must not be rounded."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # fp32 has none


def autocast(device: torch.device, kind: torch.dtype | None) -> AbstractContextManager[object]:
    """Within the body, networks compute in this kind of half precision, as autocast chooses; None: in full precision."""
    return nullcontext() if kind is None else torch.autocast(device.type, kind)


def full_precision(x: Tensor) -> Tensor:
    """The tensor as float32 if it has half precision, else unchanged; losses are never computed in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def exact(x: Tensor) -> AbstractContextManager[object]:
    """Within the body, no autocast on the device of a tensor; without a device (meta) there is none to switch off."""
    return torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within the body, a GPU does not round float32 to TF32, as it does by default in convolutions; CPUs never do.

    For what is said to be fp32. TF32 keeps 10 of 23 bits of a product's factors.
    """
    backends: tuple[Any, ...] = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [each.allow_tf32 for each in backends]
    try:
        for each in backends:
            each.allow_tf32 = False
        yield
    finally:
        for each, was in zip(backends, before, strict=True):
            each.allow_tf32 = was
