"""A place for files: a folder of this machine, or a prefix of an object store (S3, Google Cloud, Azure) through pyarrow.

A folder gets a file by renaming, so it is there whole or not at all. An object store shows an object once it is closed, which an
error may cause too early: who writes there writes again until nothing fails.
"""

import errno
import functools
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotssl.base.address import without_login
from rotssl.base.errors import in_a_line
from rotssl.base.files import put, write_whole

_CREDENTIALS = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("AWS_ENDPOINT_URL", "AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_KEY"),
)


class Place(ABC):
    """Files by name; a name may have folders in it, with slashes."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file; None if there is none."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            OSError: it cannot be read.
        """

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Write a file whole.

        Raises:
            OSError: it cannot be written.
        """

    @abstractmethod
    def take(self, name: str, file: Path) -> None:
        """Move a finished file of this machine here.

        Raises:
            OSError: it cannot be written.
        """

    @abstractmethod
    def fetch(self, name: str, file: Path) -> None:
        """Copy a file to one of this machine.

        Raises:
            OSError: it cannot be read, or the copy not be written.
        """

    @abstractmethod
    def part(self, name: str, offset: int, length: int) -> bytes:
        """A part of a file; shorter where the file ends.

        Raises:
            OSError: it cannot be read.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, if it is there, or a folder with all that is in it."""


class Folder(Place):
    """A folder of this machine, or of a file system that is mounted on it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def size(self, name: str) -> int | None:
        """See Place."""
        try:
            return (self.path / name).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        """See Place."""
        return (self.path / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """See Place."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)

    def take(self, name: str, file: Path) -> None:
        """See Place; the file is on the disk afterwards."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.stat().st_dev != path.parent.stat().st_dev:
            near = path.with_name(f"{path.name}.part")
            shutil.copyfile(file, near)
            file.unlink()
            file = near
        with file.open("rb") as content:
            os.fsync(content.fileno())
        put(file, path)

    def fetch(self, name: str, file: Path) -> None:
        """See Place."""
        shutil.copyfile(self.path / name, file)

    def part(self, name: str, offset: int, length: int) -> bytes:
        """See Place."""
        with (self.path / name).open("rb", buffering=0) as file:
            return os.pread(file.fileno(), length, offset)

    def remove(self, name: str) -> None:
        """See Place."""
        path = self.path / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Entry:
    """What is known of a file or a folder: its last name, bytes (0 of a folder), and seconds since 1970 of its last change."""

    name: str
    is_file: bool
    bytes: int
    changed: float


class Objects(Place):
    """A prefix of an object store.

    Args:
        system: pyarrow's file system.
        prefix: bucket and key, without a slash at the end.
    """

    def __init__(self, system: Any, prefix: str) -> None:
        self.system, self.prefix = system, prefix

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}".rstrip("/")

    def entry(self, name: str) -> Entry | None:
        """What is known of a file or a folder; None if it is not there."""
        (found,) = self.system.get_file_info([self._key(name)])
        return _entry(found)

    def entries(self, name: str) -> Iterator[Entry]:
        """What is known of all that a folder holds; of nothing if it is not there."""
        from pyarrow import fs

        where = fs.FileSelector(self._key(name), allow_not_found=True)
        return filter(None, map(_entry, self.system.get_file_info(where)))

    def size(self, name: str) -> int | None:
        """See Place."""
        (found,) = self.system.get_file_info([self._key(name)])
        return int(found.size) if found.is_file else None

    def read(self, name: str) -> bytes:
        """See Place."""
        with self.system.open_input_stream(self._key(name)) as stream:
            return bytes(stream.read())

    def write(self, name: str, content: bytes) -> None:
        """See Place."""
        with self.system.open_output_stream(self._key(name)) as stream:
            stream.write(content)

    def take(self, name: str, file: Path) -> None:
        """See Place."""
        self.copy(name, file)
        file.unlink()

    def copy(self, name: str, file: Path) -> None:
        """Copy a file of this machine here.

        Raises:
            OSError: it cannot be written.
        """
        with file.open("rb") as source, self.system.open_output_stream(self._key(name)) as stream:
            shutil.copyfileobj(source, stream, 8 << 20)

    def fetch(self, name: str, file: Path) -> None:
        """See Place."""
        with self.system.open_input_stream(self._key(name)) as stream, file.open("wb") as target:
            shutil.copyfileobj(stream, target, 8 << 20)

    def part(self, name: str, offset: int, length: int) -> bytes:
        """See Place."""
        with self.system.open_input_file(self._key(name)) as file:
            return bytes(file.read_at(length, offset))

    def remove(self, name: str) -> None:
        """See Place."""
        (found,) = self.system.get_file_info([self._key(name)])
        if found.is_file:
            self.system.delete_file(self._key(name))
        elif found.type.name == "Directory":
            self.system.delete_dir(self._key(name))


def _entry(found: Any) -> Entry | None:
    """What pyarrow knows."""
    kind = found.type.name
    if kind == "NotFound":
        return None
    is_file = kind == "File"
    return Entry(found.base_name, is_file, int(found.size) if is_file else 0, (found.mtime_ns or 0) / 1e9)


def credentials() -> dict[str, str]:
    """What the environment says of object stores and their user, for processes on other machines."""
    return {key: os.environ[key] for key in _CREDENTIALS if key in os.environ}


def place(address: str) -> Place:
    """The place of an address: a path, or ``s3://``, ``gs://`` or ``abfs://`` with a bucket and a prefix.

    Options of pyarrow may follow, as in ``s3://bucket/prefix?endpoint_override=HOST:PORT&scheme=http``; credentials come from the
    environment.

    Raises:
        ValueError: no such address is known, or it has a login in it, which would be in every record.
        OSError: the store was asked for the bucket's region and did not answer.
    """
    if without_login(address) != address:
        raise ValueError(f"{without_login(address)}: no login in the address; credentials come from the environment")
    if "://" not in address:
        return Folder(Path(os.path.expanduser(address)))
    return _objects(address)


@functools.lru_cache(maxsize=16)  # a client takes long to make, and has connections
def _objects(address: str) -> Objects:
    from pyarrow import fs

    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    asked = address
    if region and address.startswith("s3://") and "region=" not in address:  # else the store is asked for it
        asked += f"{'&' if '?' in address else '?'}region={region}"
    try:
        system, prefix = fs.FileSystem.from_uri(asked)
    except (ValueError, NotImplementedError, OSError) as error:  # the last one where a client's library is missing
        if "NETWORK" in str(error) or "curlCode" in str(error):
            raise OSError(errno.EIO, in_a_line(error), address) from error
        raise ValueError(f"{address}: {in_a_line(error)}") from error
    if any(part in ("", ".", "..") for part in prefix.strip("/").split("/")):
        raise ValueError(f"{address}: an empty part, . or .. in an address names nothing")
    if system.type_name == "s3":  # a small file is one request then, not three; an address cannot say so
        rebuild, (options,) = system.__reduce__()
        system = rebuild({**options, "allow_delayed_open": True})
    return Objects(system, prefix.rstrip("/"))
