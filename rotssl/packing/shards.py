"""One shard: its images are read, checked and written into a tar file, and a record says that it is complete.

A shard's content depends on its task alone, so a shard that is written again, after a kill or by another process, is the same to
the byte.
"""

import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from PIL import Image

from rotssl.base.place import Folder, Place, place
from rotssl.data.folders import EXTENSIONS
from rotssl.data.images import DataError
from rotssl.data.packed import ROW, Rows, Shard, index_bytes
from rotssl.data.reading import check, decode, digest
from rotssl.packing.sources import Item, checked

SUFFIXES = {"JPEG": "jpg", "MPO": "jpg"}  # of formats whose names are no suffixes; phones write the second one
RECORDS = "parts"  # folder of the records, until the set is complete


@dataclass(frozen=True)
class Options:
    """How images are packed.

    Attributes:
        resize: length of the short side, in pixels, that larger images are reduced to; None: files are kept as they are.
        quality: of JPEG, for images that were reduced.
    """

    resize: int | None = None
    quality: int = 95


@dataclass(frozen=True)
class Task:
    """A shard to make: its name without a suffix, and its images in their order."""

    name: str
    items: Sequence[Item]


@dataclass(frozen=True)
class Record:
    """A complete shard: the shard, what was left out with the causes, and counts over its images."""

    shard: Shard
    left_out: list[tuple[str, str]]
    counts: dict[str, int]


def known(to: Place, name: str) -> Record | None:
    """The record of a shard; None if it is not complete."""
    if to.size(f"{RECORDS}/{name}.json") is None:
        return None
    found = json.loads(to.read(f"{RECORDS}/{name}.json"))
    record = Record(Shard(**found["shard"]), [(n, why) for n, why in found["left_out"]], found["counts"])
    return record if to.size(record.shard.file) == record.shard.bytes else None


def rows(to: Place, name: str) -> Rows:
    """The index rows of a complete shard."""
    return np.load(io.BytesIO(to.read(f"{RECORDS}/{name}.npy")), allow_pickle=False)  # type: ignore[no-any-return]


def make(task: Task, options: Options, address: str) -> Record:
    """Make a shard at an address, unless it is complete.

    Raises:
        OSError: it cannot be written.
    """
    to = place(address)
    done = known(to, task.name)
    if done is not None:
        return done
    near = None
    if isinstance(to, Folder):
        # There a part gets its name by renaming, and is removed with the records if it is left.
        near = to.path / RECORDS
        near.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(".part", f"{task.name}-", near)
    try:
        with os.fdopen(handle, "wb") as file:
            found, left_out, counts = _fill(task, options, file)
            size = file.tell()
        with open(part, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        os.chmod(part, 0o644)
        record = Record(Shard(f"{task.name}.tar", len(found), size, sha256), left_out, dict(counts))
        to.take(record.shard.file, Path(part))
    finally:
        Path(part).unlink(missing_ok=True)
    to.write(f"{RECORDS}/{task.name}.npy", index_bytes(found))
    # Last, when all else is there.
    to.write(f"{RECORDS}/{task.name}.json", json.dumps(asdict(record), sort_keys=True).encode())
    return record


def _fill(task: Task, options: Options, file: BinaryIO) -> tuple[Rows, list[tuple[str, str]], Counter[str]]:
    """Write the images; returns their rows, what was left out, and counts."""
    found, left_out, counts = [], list[tuple[str, str]](), Counter[str]()
    for item in task.items:
        try:
            name, content, row = _prepare(item, options, counts)
        except DataError as error:
            left_out.append((item.name, str(error).removeprefix(f"{item.name} ")))
            continue
        offset = _add(file, name, content)
        if item.label >= 0:
            _add(file, str(PurePosixPath(name).with_suffix(".cls")), str(item.label).encode())
        height, width, orientation = row
        found.append((0, offset, len(content), height, width, item.label, orientation, digest(content)))
    file.write(bytes(2 * tarfile.BLOCKSIZE))  # the end of a tar file
    return np.array(found, ROW), left_out, counts


def _prepare(item: Item, options: Options, counts: Counter[str]) -> tuple[str, bytes, tuple[int, int, int]]:
    """The name and the content of the file to store; its sides once it is upright, and its orientation.

    Raises:
        DataError: it cannot be read or decoded.
    """
    content, path = checked(item.where), PurePosixPath(item.name)
    found = check(content, item.name)
    width, height = found.size
    counts.update(turned=found.orientation > 1, transparent=found.transparent, deep=found.deep)
    if options.resize is None or min(width, height) <= options.resize:
        known = path.suffix.lower() in EXTENSIONS
        name = item.name if known else f"{item.name}.{SUFFIXES.get(found.kind, found.kind.lower())}"
        return name, content, (height, width, found.orientation)
    image, _ = decode(content, item.name)
    scale = options.resize / min(width, height)
    image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
    smaller = io.BytesIO()
    try:
        image.save(smaller, "JPEG", quality=options.quality)
    except OSError as error:
        raise DataError(f"{item.name} cannot be reduced ({image.width} x {image.height}: {error})") from error
    counts["reduced"] += 1
    return str(path.with_suffix(".jpg")), smaller.getvalue(), (image.height, image.width, 1)


def _add(file: BinaryIO, name: str, content: bytes) -> int:
    """Append a member to a tar file; returns where its content begins."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    file.write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
    offset = file.tell()
    file.write(content)
    file.write(bytes(-len(content) % tarfile.BLOCKSIZE))
    return offset
