"""Precision of what must not be rounded."""

import torch
from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """Half-precision tensors as float32, others as they are: losses are never taken in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
