"""Hits: which images a classifier got right, as bools in their order, and the file of a run that keeps them."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

FILE = "hits.npz"


def top1(hits: Tensor | None) -> float:
    """Share of (M,) hits, from 0 to 1; nan if there are none."""
    return math.nan if hits is None else int(hits.sum()) / len(hits)


def save(hits: Mapping[str, Tensor], folder: Path) -> None:
    """Write hits, (M,) bool by the name of the classifier, into a run's folder, atomically.

    Raises:
        OSError: the file can't be written, for example because the disk is full.
    """
    part = folder / f"{FILE}.part"
    arrays: dict[str, Any] = {name: found.cpu().numpy() for name, found in hits.items()}
    with part.open("wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(part, folder / FILE)
