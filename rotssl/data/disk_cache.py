"""Decoded images in a file on local disk, for data sets that are too large for memory.

They are decoded once per node and mapped read-only by all its processes: pages that were read stay in the page cache, one
copy for all processes, and are evicted when memory is needed. A store consists of NAME.npy, which is renamed to its name once it
is complete, NAME.json, which describes it, and NAME.sums, which has the checksums of its images; NAME is a checksum of the
source files. NAME.ok tells processes that start together that one has verified the pixels. This module does not import torch.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from rotssl.base import memory
from rotssl.data import decoding
from rotssl.data.decoding import Decoded, Shape
from rotssl.data.folders import Folder
from rotssl.data.images import DataError, ImageSet, Pixels, Sums
from rotssl.data.reading import digest
from rotssl.data.seen import Seen

# Share of this machine's memory up to which images stay in memory: half of the share of Ray's object store.
MEMORY_SHARE = 0.15
_ADVICE = "use a folder on a larger disk, or fewer images (data.limit)"
_STATED = 1000  # files per thread task when reading sizes and times
_VERSION = 3  # of what decoding makes of a file; stores of another version are not found
_VERIFIED_S = 600  # how long a verification holds for other processes, if nobody changed the file


def kind(asked: str, size: int) -> str:
    """``memory`` or ``disk``, for the given ``data.store`` and a size of the images in bytes."""
    if asked != "auto":
        return asked
    return "memory" if size <= MEMORY_SHARE * memory.host_memory() else "disk"


def folder(cache: str | None) -> Path:
    """The folder of this machine's stores: ``data.cache``, or ``rotssl`` in the user's cache folder."""
    if cache is None:
        return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "rotssl"
    return Path(os.path.expanduser(cache))


def checksum(parts: Sequence[Folder], native: tuple[int, int] | None, image_size: int) -> str:
    """SHA-256 of everything that determines the pixels: files with their sizes and modification times, and the decoded size."""
    files = [file for part in parts for file in part.files]

    def stated(first: int) -> bytes:
        lines = []
        for file in files[first : first + _STATED]:
            about = os.stat(file)
            lines.append(f"{file}\0{about.st_size}\0{about.st_mtime_ns}\n")
        return "".join(lines).encode("utf-8", "surrogateescape")

    decoded = _VERSION, decoding.stored_shape(len(files), native, image_size), native, image_size
    total = hashlib.sha256(repr(decoded).encode())
    try:
        for block in decoding.in_threads(stated, range(0, len(files), _STATED)):
            total.update(block)
    except OSError as error:
        raise DataError(f"data.root: cannot read {error.filename}: {error.strerror}") from error
    return total.hexdigest()


@dataclass(frozen=True)
class Store:
    """A finished store: its images, mapped read-only, their checksums, and what decoding saw."""

    images: Pixels
    sums: Sums
    seen: Seen


def find(cache: Path, name: str) -> Store | None:
    """A finished store; None if there is none or it is not whole. Its pixels are not read."""
    try:
        about = json.loads((cache / f"{name[:16]}.json").read_text())
        images = np.load(cache / f"{name[:16]}.npy", mmap_mode="r", allow_pickle=False)
        with open(cache / f"{name[:16]}.sums", "rb") as file:
            sums = np.load(file, allow_pickle=False)
        if (about["checksum"], about["shape"]) != (name, list(images.shape)) or images.dtype != np.uint8:
            return None
        if sums.shape != (len(images), 4) or sums.dtype != np.uint64:
            return None
        return Store(images, sums, Seen(**about["seen"]))
    except (OSError, ValueError, EOFError, TypeError, KeyError):
        return None


def _sound(cache: Path, name: str, say: Callable[[str], None]) -> Store | None:
    """A finished store whose pixels have their checksums, which reads all of it unless another process just has."""
    store = find(cache, name)
    if store is None:
        return None
    pixels, stamp = cache / f"{name[:16]}.npy", cache / f"{name[:16]}.ok"
    with suppress(OSError):
        if time.time() - stamp.stat().st_mtime < _VERIFIED_S and stamp.read_text() == str(pixels.stat().st_ctime_ns):
            return store
    each = max(1, decoding.BLOCK_BYTES // math.prod(store.images.shape[1:]))

    def damaged(first: int) -> int:
        block = zip(store.images[first : first + each], store.sums[first : first + each, 1], strict=True)
        return sum(digest(row.data) != known for row, known in block)

    if count := sum(decoding.in_threads(damaged, range(0, len(store.images), each))):
        say(f"{pixels} is damaged: the pixels of {count} images do not have their checksums")
        return None
    with suppress(OSError):  # where nothing can be written, each process verifies for itself
        stamp.write_text(str(pixels.stat().st_ctime_ns))
    return store


def missing(cache: Path, name: str, size: int) -> str:
    """Why a store of a given size in bytes cannot be written, in one line; empty if it can."""
    place = cache
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        return f"data.cache: cannot write to {cache}"
    part = cache / f"{name[:16]}.part"
    # The partial file of a killed process will be overwritten.
    free = shutil.disk_usage(place).free + (part.stat().st_blocks * 512 if part.exists() else 0)
    if free >= size:
        return ""
    return f"data.cache: the decoded images need {size:,} bytes, but {cache} has {free:,} free; {_ADVICE}"


def load(
    parts: Sequence[Folder],
    native: tuple[int, int] | None,
    image_size: int,
    cache: Path,
    say: Callable[[str], None] = lambda line: None,
    skip: bool = False,
) -> tuple[list[ImageSet], Decoded]:
    """The images of all parts, mapped from the store; they are decoded into it first unless another process has done so.

    Args:
        parts: parts to read.
        native: height and width from ``decoding.probe``.
        image_size: side of the views in pixels.
        cache: folder of the stores.
        say: called with a line about anything that takes time.
        skip: whether unreadable files are left out.

    Raises:
        DataError: files can't be read (the message lists them), or the disk is full or can't be written.
    """
    name = checksum(parts, native, image_size)
    store = None
    if find(cache, name) is not None:
        with ExitStack() as stack:
            with suppress(OSError):  # of processes that start together, one verifies
                stack.enter_context(FileLock(cache / f"{name[:16]}.lock"))
            store = _sound(cache, name, say)
    if store is None:
        try:
            with _alone(cache / f"{name[:16]}.part", say) as file:
                store = _sound(cache, name, lambda line: None)  # perhaps made by another process meanwhile
                if store is None:
                    say(f"decoding {sum(map(len, parts))} images into {cache / name[:16]}.npy")
                    _make(parts, native, image_size, name, file, skip)
                    store = find(cache, name)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DataError(f"data.cache: the disk of {cache} is full while decoding images; {_ADVICE}") from error
            raise DataError(f"data.cache: cannot write to {cache}: {error.strerror}") from error
    if store is None:
        raise DataError(f"data.cache: {cache / name[:16]}.npy was changed by another process while it was written")
    found = decoding.recall([file for part in parts for file in part.files], store.seen, store.sums, skip)
    return decoding.divide(store.images, decoding.keep(parts, found.kept), found.sums), found


@contextmanager
def _alone(part: Path, say: Callable[[str], None]) -> Iterator[BinaryIO]:
    """Lock and open the empty file to decode into, overwriting that of a killed process; it is removed at the end."""
    part.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(part.with_suffix(".lock"))
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another process that is decoding into {part}")
        held = lock.acquire()
    with held:
        try:
            with open(part, "w+b", opener=lambda path, flags: os.open(path, flags, 0o666)) as file:
                yield file
        finally:
            part.unlink(missing_ok=True)  # already gone if it was renamed to a store


def _make(
    parts: Sequence[Folder], native: tuple[int, int] | None, image_size: int, name: str, file: BinaryIO, skip: bool
) -> None:
    """Decode into the file, then turn it into a store."""
    part, where, made = Path(file.name), file.fileno(), Shape()
    files = [each for part in parts for each in part.files]

    def begin(shape: Shape) -> decoding.Write:
        nonlocal made
        made, each = shape, math.prod(shape[1:])
        file.seek(0)
        file.truncate()
        if reason := missing(part.parent, name, math.prod(shape)):
            raise DataError(reason)
        _write_header(file, shape)
        start = file.tell()

        def write(first: int, block: Pixels) -> None:
            # Not through a memory map, where a full disk kills the process; here it raises an error.
            rest, offset = block.reshape(-1).data, start + first * each
            while rest:
                count = os.pwrite(where, rest, offset)
                rest, offset = rest[count:], offset + count

        return write

    found = decoding.decode(files, native, image_size, begin, skip)
    if len(found.kept) < len(files):
        made = _close_gaps(file, made, found)
    os.fsync(where)
    about = {"checksum": name, "shape": made, "folder": os.path.commonpath(files), "seen": asdict(found.seen)}
    described = part.with_suffix(".json")
    try:
        with part.with_suffix(".sums").open("wb") as sums:
            np.save(sums, found.sums)
        described.write_text(json.dumps(about) + "\n")
        part.rename(part.with_suffix(".npy"))
    except OSError:
        described.unlink(missing_ok=True)
        part.with_suffix(".sums").unlink(missing_ok=True)
        raise


def _write_header(file: BinaryIO, shape: Shape) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    file.flush()


def _close_gaps(file: BinaryIO, shape: Shape, found: Decoded) -> Shape:
    """Take the gaps that unreadable files left out of the written images; returns the new shape."""
    start = file.tell()  # numpy leaves room in the header for any number of images
    rows = np.memmap(file, np.uint8, "r+", start, shape)
    decoding.close_gaps(rows, found.kept)
    rows.flush()
    shape = len(found.kept), *shape[1:]
    file.seek(0)
    _write_header(file, shape)
    file.truncate(start + math.prod(shape))
    return shape
