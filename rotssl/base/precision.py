"""Conversion to full precision for results that must not be rounded."""

import torch
from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """The tensor as float32 if it has half precision, else unchanged; losses are never computed in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
