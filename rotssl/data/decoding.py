"""Decoding of images in threads, into memory or another target. This module does not import torch."""

import contextlib
import math
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from rotssl.base import heartbeat
from rotssl.config.fields import ConfigError
from rotssl.data.folders import Folder
from rotssl.data.images import DataError, ImageSet, Pixels, choose

NATIVE_LIMIT = 96  # images of equal size up to this side are stored unchanged

MARGIN = 1.15  # larger ones are stored at this multiple of the views' side

PROBED = 64  # files decoded before a run starts

BLOCK_BYTES = 4 << 20  # pixels that a thread decodes before it writes them

Shape = tuple[int, ...]

Write = Callable[[int, Pixels], None]

Begin = Callable[[Shape], Write]

Result = TypeVar("Result")


def _decode(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):  # PIL would clip 16-bit shades to white
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be decoded as an image ({type(error).__name__})") from error


def probe(splits: dict[str, Folder]) -> tuple[int, int] | None:
    """Decode up to 64 files of each split, spread over the classes; returns their common (height, width), or None."""
    files = [folder.files[i] for folder in splits.values() for i in choose(folder.labels, len(folder), PROBED)]
    try:
        sizes = {_decode(file).size for file in files}
    except DataError as error:
        raise ConfigError(f"data.root: {error}") from error
    (width, height), *others = sizes
    return None if others or max(width, height) > NATIVE_LIMIT else (height, width)


def _fit(image: Image.Image, side: int) -> Pixels:
    """The image with its short side resized to ``side`` pixels and centre-cropped, (3, side, side)."""
    scale = side / min(image.size)
    resized = image.resize(
        (max(side, round(image.width * scale)), max(side, round(image.height * scale))), Image.Resampling.BILINEAR
    )
    left, top = (resized.width - side) // 2, (resized.height - side) // 2
    return np.asarray(resized.crop((left, top, left + side, top + side))).transpose(2, 0, 1)


def stored_shape(count: int, native: tuple[int, int] | None, image_size: int) -> Shape:
    """Shape (N, 3, H, W) of decoded images: the native size, or squares with a margin around the views.

    Args:
        count: number of images.
        native: height and width from ``probe``.
        image_size: side of the views in pixels.
    """
    side = math.ceil(MARGIN * image_size)
    return (count, 3, *(native or (side, side)))


def decode(files: Sequence[str], native: tuple[int, int] | None, image_size: int, begin: Begin) -> None:
    """Decode images in threads, at the native size if all of them have it, else fitted to the views' side.

    Args:
        files: files to read.
        native: height and width from ``probe``.
        image_size: side of the views in pixels.
        begin: called with the shape (N, 3, H, W) of all images; returns a function that is called from several threads, in any
            order, with the index of the first image of a block and the block. ``begin`` is called again with another shape if an
            image does not have the native size.

    Raises:
        DataError: a file can't be decoded; the message names it.
    """
    shape = stored_shape(len(files), native, image_size)
    write, each = begin(shape), max(1, BLOCK_BYTES // math.prod(shape[1:]))

    def read(first: int) -> bool:
        block = np.empty((min(each, len(files) - first), *shape[1:]), np.uint8)
        for i in range(len(block)):
            image = _decode(files[first + i])
            if native is None:
                block[i] = _fit(image, shape[-1])
            elif image.size == (native[1], native[0]):
                block[i] = np.asarray(image).transpose(2, 0, 1)
            else:
                return False
        write(first, block)
        return True

    with contextlib.closing(in_threads(read, range(0, len(files), each))) as done:
        equal = all(done)
    if not equal:
        decode(files, None, image_size, begin)


def in_threads(work: Callable[[int], Result], items: Iterable[int]) -> Generator[Result, None, None]:
    """``map`` in as many threads as there are cores; after a failure, no further items are started."""
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:  # PIL decodes without the interpreter's lock
        for result in pool.map(work, items):
            heartbeat.beat()
            yield result


def load(parts: Sequence[Folder], native: tuple[int, int] | None, image_size: int) -> list[ImageSet]:
    """The images of all parts in memory, in one array.

    Args:
        parts: parts to read.
        native: height and width from ``probe``.
        image_size: side of the views in pixels.

    Raises:
        DataError: a file can't be decoded; the message names it.
    """
    images = np.empty(0, np.uint8)

    def begin(shape: Shape) -> Write:
        nonlocal images
        images = np.empty(shape, np.uint8)

        def write(first: int, block: Pixels) -> None:
            images[first : first + len(block)] = block

        return write

    decode([file for part in parts for file in part.files], native, image_size, begin)
    return divide(images, parts)


def divide(images: Pixels, parts: Sequence[Folder]) -> list[ImageSet]:
    """The parts of one array of images, without a copy."""
    ends = np.cumsum([len(part) for part in parts])
    return [ImageSet(images[end - len(part) : end], part.labels) for part, end in zip(parts, ends, strict=True)]
