"""Images shipped with the package, and synthetic ones. This module does not import torch."""

import hashlib
import io
import json
from importlib import resources

import numpy as np

from rotssl.base import rng
from rotssl.data.images import DataError, ImageSet

FASHION_CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def sample() -> tuple[dict[str, ImageSet], tuple[str, ...]]:
    """The splits and classes of a class-balanced subset of Fashion-MNIST.

    Raises:
        DataError: the file is damaged.
    """
    folder = resources.files("rotssl.data.sample")
    content = (folder / "images.npz").read_bytes()
    if hashlib.sha256(content).hexdigest() != json.loads((folder / "source.json").read_text())["sha256"]:
        raise DataError("rotssl/data/sample/images.npz does not have the checksum in source.json: the file is damaged")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        splits = {
            split: ImageSet(arrays[f"{split}_images"][:, None], arrays[f"{split}_labels"].astype(np.int64))
            for split in ("train", "validation", "test")
        }
    return splits, FASHION_CLASSES


def synthetic(count: int = 1024, side: int = 32, classes: int = 4) -> tuple[dict[str, ImageSet], tuple[str, ...]]:
    """Splits and classes of synthetic images: upright wedges on noise, one colour per class, with an orientation to predict."""
    splits = {}
    y, x = np.mgrid[0:side, 0:side] / (side - 1)
    for split, size in (("train", count), ("validation", count // 4), ("test", count // 4)):
        gen = np.random.default_rng(rng.key("synthetic", split))
        labels = np.arange(size) % classes
        width = 0.15 + 0.1 * labels[:, None, None] + gen.uniform(0, 0.05, (size, 1, 1))
        wedge = np.abs(x - gen.uniform(0.35, 0.65, (size, 1, 1))) < width * y
        colour = np.array([[220, 60, 60], [60, 200, 80], [70, 90, 230], [210, 200, 60]])[labels % 4]
        images = np.where(wedge[:, None], colour[:, :, None, None], 90) + gen.normal(0, 20, (size, 3, side, side))
        splits[split] = ImageSet(images.clip(0, 255).astype(np.uint8), labels.astype(np.int64))
    return splits, tuple(f"wedge {i}" for i in range(classes))
