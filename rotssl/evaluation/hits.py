"""Hits: which images a classifier got right, as bools in their order, and the file of a run that keeps them."""

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from rotssl.base.paths import AnyPath, write_whole

FILE = "hits.npz"


def top1(hits: Tensor | None) -> float:
    """Share of (M,) hits, from 0 to 1; nan if there are none."""
    return math.nan if hits is None else int(hits.sum()) / len(hits)


def save(hits: Mapping[str, Tensor], folder: AnyPath) -> None:
    """Write hits, (M,) bool by the name of the classifier, into a run's folder, atomically.

    Raises:
        OSError: the file can't be written, for example because the disk is full.
    """
    arrays: dict[str, Any] = {name: found.cpu().numpy() for name, found in hits.items()}
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_whole(folder / FILE, content.getvalue())
