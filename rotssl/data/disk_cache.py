"""Decoded pictures in a file on local disk, for sets that are too large for memory.

They are decoded once a node and mapped read-only by every process of it: what is read stays in the kernel's page cache, one copy
for all of them, which the kernel takes back when it needs memory. A store is NAME.npy, which comes to its name last and whole,
and NAME.json, which says what is in it; NAME is a checksum of the files that were read. Nothing here imports torch.
"""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from rotssl.base import memory
from rotssl.data import decoding
from rotssl.data.decoding import Shape
from rotssl.data.folders import Folder
from rotssl.data.images import DataError, ImageSet, Pixels

# Of this machine's memory, what images may take before they go to disk: half of what Ray gives to its object store.
MEMORY_SHARE = 0.15
_ADVICE = "name a folder on a larger disk, or take fewer images (data.limit)"
_STATED = 1000  # files whose sizes and times a thread asks for at a time


def kind(asked: str, size: int) -> str:
    """``memory`` or ``disk``, for ``data.store`` as it was given and images of so many bytes."""
    if asked != "auto":
        return asked
    return "memory" if size <= MEMORY_SHARE * memory.host_memory() else "disk"


def folder(cache: str | None) -> Path:
    """Where the stores of this machine are: ``data.cache``, or below the user's cache folder."""
    if cache is None:
        return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "rotssl"
    return Path(os.path.expanduser(cache))


def checksum(parts: Sequence[Folder], native: tuple[int, int] | None, image_size: int) -> str:
    """SHA-256 of what decides the pixels: the files with their sizes and times of change, and the size to decode to."""
    files = [file for part in parts for file in part.files]

    def stated(first: int) -> bytes:
        lines = []
        for file in files[first : first + _STATED]:
            about = os.stat(file)
            lines.append(f"{file}\0{about.st_size}\0{about.st_mtime_ns}\n")
        return "".join(lines).encode("utf-8", "surrogateescape")

    digest = hashlib.sha256(repr((decoding.stored_shape(len(files), native, image_size), native, image_size)).encode())
    try:
        for block in decoding.in_threads(stated, range(0, len(files), _STATED)):
            digest.update(block)
    except OSError as error:
        raise DataError(f"data.root: cannot read {error.filename}: {error.strerror}") from error
    return digest.hexdigest()


def find(cache: Path, name: str) -> Pixels | None:
    """The pictures of a finished store, mapped read-only; None where there is none, or it was damaged."""
    try:
        about = json.loads((cache / f"{name[:16]}.json").read_text())
        images = np.load(cache / f"{name[:16]}.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    whole = isinstance(about, dict) and (about.get("checksum"), about.get("shape")) == (name, list(images.shape))
    return images if whole and images.dtype == np.uint8 else None


def missing(cache: Path, name: str, size: int) -> str:
    """What keeps a store of so many bytes from being written, in a line; empty if nothing does."""
    place = cache
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        return f"data.cache: cannot write to {cache}"
    part = cache / f"{name[:16]}.part"
    # What a killed process left is written over.
    free = shutil.disk_usage(place).free + (part.stat().st_blocks * 512 if part.exists() else 0)
    if free >= size:
        return ""
    return f"data.cache: the decoded images take {size:,} bytes, {cache} has {free:,} free; {_ADVICE}"


def load(
    parts: Sequence[Folder],
    native: tuple[int, int] | None,
    image_size: int,
    cache: Path,
    say: Callable[[str], None] = lambda line: None,
) -> list[ImageSet]:
    """The pictures of all parts, mapped from the store; decoded into it first if no other process of this node has done so.

    Args:
        parts: what to read.
        native: height and width as ``decoding.probe`` found them.
        image_size: side of the views in pixels.
        cache: folder of the stores.
        say: takes a line when there is something to wait for.

    Raises:
        DataError: a file that can't be decoded, by name; the disk is full or can't be written.
    """
    name = checksum(parts, native, image_size)
    images = find(cache, name)
    if images is None:
        try:
            with _alone(cache / f"{name[:16]}.part", say) as file:
                images = find(cache, name)  # made by the one that was waited for
                if images is None:
                    say(f"decoding {sum(map(len, parts))} images into {cache / name[:16]}.npy")
                    _make(parts, native, image_size, name, file)
                    images = find(cache, name)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DataError(
                    f"data.cache: the disk of {cache} became full while images were decoded; {_ADVICE}"
                ) from error
            raise DataError(f"data.cache: cannot write to {cache}: {error.strerror}") from error
    if images is None:
        raise DataError(f"data.cache: {cache / name[:16]}.npy was changed while it was written")
    return decoding.divide(images, parts)


@contextmanager
def _alone(part: Path, say: Callable[[str], None]) -> Iterator[BinaryIO]:
    """The file to decode into, empty, for this process alone; what a killed process left is overwritten. Removed at the end."""
    part.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(part.with_suffix(".lock"), mode=0o666)  # users may share a cache
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another process that decodes into {part}")
        held = lock.acquire()
    with held:
        try:
            with open(part, "w+b", opener=lambda path, flags: os.open(path, flags, 0o666)) as file:
                yield file
        finally:
            part.unlink(missing_ok=True)  # there no more where it became a store


def _make(parts: Sequence[Folder], native: tuple[int, int] | None, image_size: int, name: str, file: BinaryIO) -> None:
    """Decode into the file, and then make a store of it."""
    part, where, made = Path(file.name), file.fileno(), Shape()
    files = [each for part in parts for each in part.files]

    def begin(shape: Shape) -> decoding.Write:
        nonlocal made
        made, each = shape, math.prod(shape[1:])
        file.seek(0)
        file.truncate()
        if reason := missing(part.parent, name, math.prod(shape)):
            raise DataError(reason)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        start = file.tell()

        def write(first: int, block: Pixels) -> None:
            # Not through a map: there a full disk kills the process, here it is an error.
            rest, offset = block.reshape(-1).data, start + first * each
            while rest:
                count = os.pwrite(where, rest, offset)
                rest, offset = rest[count:], offset + count

        return write

    decoding.decode(files, native, image_size, begin)
    os.fsync(where)
    about = {"checksum": name, "shape": made, "folder": os.path.commonpath(files)}
    described = part.with_suffix(".json")
    try:
        described.write_text(json.dumps(about) + "\n")
        part.rename(part.with_suffix(".npy"))
    except OSError:
        described.unlink(missing_ok=True)
        raise
