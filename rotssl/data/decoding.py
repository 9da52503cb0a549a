"""Decoding of images in threads, into memory or another target. This module does not import torch."""

import contextlib
import math
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from rotssl.base import heartbeat
from rotssl.config.fields import ConfigError
from rotssl.data.folders import Folder
from rotssl.data.images import DataError, ImageSet, Pixels, Sums, choose
from rotssl.data.reading import Facts, digest, read
from rotssl.data.seen import Seen, listing

NATIVE_LIMIT = 96  # images of equal size up to this side are stored unchanged

MARGIN = 1.15  # larger ones are stored at this multiple of the views' side

PROBED = 64  # files decoded before a run starts

BLOCK_BYTES = 4 << 20  # pixels that a thread decodes before it writes them

Shape = tuple[int, ...]

Write = Callable[[int, Pixels], None]

Begin = Callable[[Shape], Write]

Result = TypeVar("Result")


def probe(splits: dict[str, Folder], skip: bool = False) -> tuple[int, int] | None:
    """Decode up to 64 files of each split, spread over the classes; returns their common (height, width), or None.

    Args:
        splits: files by split.
        skip: whether unreadable files are left out.

    Raises:
        ConfigError: one of them can't be read; then all files were read, and the message lists the bad ones.
    """
    files = [folder.files[i] for folder in splits.values() for i in choose(folder.labels, len(folder), PROBED)]
    sizes = set()
    for file in files:
        try:
            sizes.add(read(file)[0].size)
        except DataError as error:
            if not skip:
                everything = [file for folder in splits.values() for file in folder.files]
                raise ConfigError(f"data.root: {_refusal(_bad_among(everything))}") from error
    if not sizes:
        raise ConfigError(f"data.root: none of {len(files)} files can be read, {files[0]} among them")
    (width, height), *others = sizes
    return None if others or max(width, height) > NATIVE_LIMIT else (height, width)


def _bad_among(files: Sequence[str]) -> list[list[str]]:
    def attempt(index: int) -> list[str] | None:
        try:
            read(files[index])
        except DataError as error:
            return _entry(files[index], error)
        return None

    return [entry for entry in in_threads(attempt, range(len(files))) if entry]


def _entry(file: str, error: DataError) -> list[str]:
    return [file, str(error).removeprefix(f"{file} ")]


def _refusal(bad: Sequence[Sequence[str]]) -> str:
    return f"{listing(bad)}; mend or remove {'it' if len(bad) == 1 else 'them'}, or leave out with data.on_bad skip"


def fit(image: Image.Image, side: int) -> Pixels:
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


@dataclass
class Decoded:
    """What decoding found: what it saw, the files that it could read, and their checksums.

    ``kept`` are indices of files, ``sums`` are those of ``ImageSet``.
    """

    seen: Seen
    kept: npt.NDArray[np.int64]
    sums: Sums


def _read_block(
    files: Sequence[str], shape: Shape, native: tuple[int, int] | None
) -> tuple[Pixels, list[Facts | DataError]] | None:
    """Pixels of some files, and what is known of each; None if one does not have the native size."""
    block, found = np.zeros((len(files), *shape[1:]), np.uint8), list[Facts | DataError]()
    for i, file in enumerate(files):
        try:
            image, facts = read(file)
        except DataError as error:
            found.append(error)
            continue
        if native is None:
            block[i] = fit(image, shape[-1])
        elif image.size == (native[1], native[0]):
            block[i] = np.asarray(image).transpose(2, 0, 1)
        else:
            return None
        found.append(facts)
    return block, found


def decode(
    files: Sequence[str], native: tuple[int, int] | None, image_size: int, begin: Begin, skip: bool = False
) -> Decoded:
    """Decode images in threads, at the native size if all of them have it, else fitted to the views' side.

    Args:
        files: files to read.
        native: height and width from ``probe``.
        image_size: side of the views in pixels.
        begin: called with the shape (N, 3, H, W) of all images; returns a function that is called from several threads, in any
            order, with the index of the first image of a block and the block. ``begin`` is called again with another shape if an
            image does not have the native size. Unreadable files leave a gap of zeros.
        skip: whether unreadable files are left out.

    Raises:
        DataError: files can't be read and are not to be left out, or none can be read; the message lists them.
    """
    shape = stored_shape(len(files), native, image_size)
    write, each = begin(shape), max(1, BLOCK_BYTES // math.prod(shape[1:]))
    seen, kept, sums = Seen(), list[int](), list[tuple[int, ...]]()

    def work(first: int) -> list[tuple[Facts, int, int, int] | DataError] | None:
        if (done := _read_block(files[first : first + each], shape, native)) is None:
            return None
        write(first, done[0])
        return [
            facts if isinstance(facts, DataError) else (facts, digest(row.data), int(row.min()), int(row.max()))
            for row, facts in zip(*done, strict=True)
        ]

    firsts = range(0, len(files), each)
    with contextlib.closing(in_threads(work, firsts)) as blocks:
        for first, block in zip(firsts, blocks, strict=True):
            if block is None:
                break
            for index, entry in enumerate(block, first):
                if isinstance(entry, DataError):
                    seen.bad.append(_entry(files[index], entry))
                    continue
                facts, pixels, low, high = entry
                seen.add(facts, low, high)
                kept.append(index)
                sums.append((facts.content, pixels, *facts.look))
    if len(kept) + len(seen.bad) < len(files):
        return decode(files, None, image_size, begin, skip)
    if seen.bad and (not skip or not kept):
        raise DataError(_refusal(seen.bad))
    return Decoded(seen, np.array(kept, np.int64), np.array(sums, np.uint64))


def squares(files: Sequence[str], side: int) -> Pixels:
    """A few images (N, 3, side, side), fitted and cropped; unreadable ones are black."""
    block = _read_block(files, (len(files), 3, side, side), None)
    assert block is not None  # without a native size all sizes fit
    return block[0]


def recall(files: Sequence[str], seen: Seen, sums: Sums, skip: bool) -> Decoded:
    """What decoding found earlier, for a store.

    Raises:
        DataError: there were unreadable files, which are not to be left out.
    """
    if seen.bad and not skip:
        raise DataError(_refusal(seen.bad))
    bad = {file for file, _ in seen.bad}
    return Decoded(seen, np.array([i for i, file in enumerate(files) if file not in bad], np.int64), sums)


def in_threads(work: Callable[[int], Result], items: Iterable[int]) -> Generator[Result, None, None]:
    """``map`` in as many threads as there are cores; after a failure, no further items are started."""
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:  # PIL decodes without the interpreter's lock
        for result in pool.map(work, items):
            heartbeat.beat()
            yield result


def close_gaps(images: Pixels, kept: npt.NDArray[np.int64]) -> Pixels:
    """Move the images with these indices to the front, in place."""
    for to, index in enumerate(kept):
        if index > to:
            images[to] = images[index]
    return images[: len(kept)]


def load(
    parts: Sequence[Folder], native: tuple[int, int] | None, image_size: int, skip: bool = False
) -> tuple[list[ImageSet], Decoded]:
    """The images of all parts in memory, in one array.

    Args:
        parts: parts to read.
        native: height and width from ``probe``.
        image_size: side of the views in pixels.
        skip: whether unreadable files are left out.

    Raises:
        DataError: as ``decode``.
    """
    images = np.empty(0, np.uint8)

    def begin(shape: Shape) -> Write:
        nonlocal images
        images = np.empty(shape, np.uint8)

        def write(first: int, block: Pixels) -> None:
            images[first : first + len(block)] = block

        return write

    found = decode([file for part in parts for file in part.files], native, image_size, begin, skip)
    return divide(close_gaps(images, found.kept), keep(parts, found.kept), found.sums), found


def keep(parts: Sequence[Folder], kept: npt.NDArray[np.int64]) -> list[Folder]:
    """The parts without the files that were left out; ``kept`` are indices over all parts."""
    ends = np.cumsum([0, *(len(part) for part in parts)])
    edges = np.searchsorted(kept, ends)
    return [
        part if stop - start == len(part) else part.take(kept[start:stop] - end)
        for part, end, start, stop in zip(parts, ends[:-1], edges[:-1], edges[1:], strict=True)
    ]


def divide(images: Pixels, parts: Sequence[Folder], sums: Sums) -> list[ImageSet]:
    """The parts of one array of images with their checksums, without a copy."""
    ends = np.cumsum([len(part) for part in parts])
    places = [(slice(end - len(part), end), part.labels) for part, end in zip(parts, ends, strict=True)]
    return [ImageSet(images[place], labels, sums[place]) for place, labels in places]
