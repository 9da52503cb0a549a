"""Half precision where it is asked for, and full precision for results that must not be rounded."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # fp32 has none


def autocast(device: torch.device, kind: torch.dtype | None) -> AbstractContextManager[object]:
    """Within the body, networks compute in this kind of half precision, as autocast chooses; None: in full precision."""
    return nullcontext() if kind is None else torch.autocast(device.type, kind)


def full_precision(x: Tensor) -> Tensor:
    """The tensor as float32 if it has half precision, else unchanged; losses are never computed in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
