"""Paths of a run: local ones, or in an object store; and what is done with either.

A file is written whole: after a crash at any moment there is the old content or the new one, never a part of it.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Hashable, Iterator
from pathlib import Path

from rotssl.base import files
from rotssl.base.objects import ObjectPath
from rotssl.base.place import Objects, place

AnyPath = Path | ObjectPath
_ON_DISK = "on_disk"  # the last of the parts of a file that was copied from an object store to a disk


def at(address: str | Path) -> AnyPath:
    """The path of an address: a local one, or as in ``place.place``.

    Raises:
        ValueError: as in ``place.place``.
    """
    text = str(address)
    if "://" not in text:
        return Path(os.path.expanduser(text))
    store = place(text)
    assert isinstance(store, Objects)
    where, mark, options = text.partition("?")
    return ObjectPath(store, where.rstrip("/"), mark + options)


def folders(folder: AnyPath) -> list[AnyPath]:
    """The folders in a folder, by name; none if it is not there or must not be read."""
    if isinstance(folder, ObjectPath):
        return [folder / entry.name for entry in folder.entries() if not entry.is_file]
    return sorted(path for path in folder.glob("*") if path.is_dir())  # passes over what must not be read


def write_whole(path: AnyPath, content: str | bytes) -> None:
    """Write a file whole.

    Raises:
        OSError: it cannot be written; the old file is unchanged.
    """
    if isinstance(path, ObjectPath):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    else:
        files.write_whole(path, content)


def append_line(path: AnyPath, line: bytes) -> None:
    """Add a line to a file, which is created if missing; it is on the disk afterwards.

    Of an object store always give the same ``path``: each adds to a part of its own.

    Raises:
        OSError: it cannot be written.
    """
    if isinstance(path, ObjectPath):
        path.append(line + b"\n")
        return
    path = path / _ON_DISK if path.is_dir() else path
    made = not path.exists()
    with path.open("a+b") as file:
        # Terminate a line that a crash cut short, so that it does not corrupt the next one.
        file.seek(0, os.SEEK_END)
        torn = False
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write((b"\n" if torn else b"") + line + b"\n")
        file.flush()
        os.fsync(file.fileno())
    if made:
        files.sync_folder(path.parent)


def read_lines(path: AnyPath) -> list[bytes]:
    """The lines that ``append_line`` has written; none if there is no file.

    Raises:
        OSError: it cannot be read.
    """
    if isinstance(path, ObjectPath):
        return path.parts().splitlines()
    if path.is_dir():
        return [line for part in sorted(path.iterdir()) for line in part.read_bytes().splitlines()]
    return path.read_bytes().splitlines() if path.exists() else []


def stamp(path: AnyPath) -> Hashable:
    """Changes whenever ``append_line`` changes a file; None if there is none."""
    if isinstance(path, ObjectPath):
        return tuple(filter(None, [path.entry(), *path.entries()])) or None
    parts = sorted(path.iterdir()) if path.is_dir() else [path]
    try:
        found = [part.stat() for part in parts]
    except FileNotFoundError:
        return None
    return tuple((each.st_size, each.st_mtime_ns) for each in found)


def changed(path: AnyPath) -> float:
    """Seconds since 1970 of a file's last change, on the clock of the file system or the store.

    Raises:
        FileNotFoundError: it is not there.
    """
    return path.changed() if isinstance(path, ObjectPath) else path.stat().st_mtime


def remove_tree(path: AnyPath) -> None:
    """Remove a folder with all that is in it, if it is there.

    Raises:
        OSError: it cannot be removed.
    """
    if isinstance(path, ObjectPath):
        path.remove()
    else:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)


@contextlib.contextmanager
def fetched(path: AnyPath) -> Iterator[Path]:
    """The file on this machine within the body, under its own name: itself, or a copy from an object store.

    Raises:
        OSError: it cannot be read.
    """
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="rotssl-") as scratch:
        here = Path(scratch) / path.name
        path.download(here)
        yield here


@contextlib.contextmanager
def filled(folder: AnyPath) -> Iterator[Path]:
    """A folder of this machine whose files are in ``folder`` after the body: itself, which is created, or one that is copied.

    Raises:
        OSError: it cannot be written.
    """
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="rotssl-") as scratch:
        yield Path(scratch)
        for file in sorted(Path(scratch).iterdir()):
            (folder / file.name).upload(file)


@contextlib.contextmanager
def filled_whole(folder: AnyPath) -> Iterator[Path]:
    """As ``filled``, but if the body fails nothing of it is in ``folder``, which may have other files.

    Raises:
        OSError: it cannot be written.
    """
    beside = folder.parent if isinstance(folder, Path) else None  # on the same disk, so that files are renamed
    if beside is not None:
        beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".rotssl-", dir=beside) as scratch:
        yield Path(scratch)
        with filled(folder) as here:
            for file in sorted(Path(scratch).iterdir()):
                shutil.move(file, here / file.name)
            files.sync_folder(here)
