"""The tar files of a packed set, read at any offset: where they lie, in copies on this node, or by ranges of an object store.

Of a set in an object store each node copies whole shards, once for all of its processes, up to a limit; pictures of the other
shards are read one by one. Which shards are copied follows from the manifest alone. Shards are never dropped for others: every
epoch reads each picture once, so any set of copies of a given size saves as many reads.
"""

import contextlib
import errno
import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from threading import Event, Lock
from typing import BinaryIO, TypeVar

from filelock import FileLock, Timeout

from rotssl.base import heartbeat
from rotssl.base.errors import in_a_line
from rotssl.base.place import Folder, Place
from rotssl.data.images import DataError
from rotssl.data.packed import Shard, Split

OPEN = 128  # files kept open
RETRY_S = 300.0  # for which a place that cannot be reached is asked again; less than workers wait for each other
STALE_S = 3600.0  # after which what a killed process left unfinished is removed
Result = TypeVar("Result")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


class Shards:
    """The shards of a split.

    Args:
        place: of the set.
        split: the split.
        cache: folder for copies of shards from a place that is no folder.
        limit: bytes of the copies; None: all shards are copied.
        say: called with a line about a place that cannot be reached.

    Attributes:
        stop: ends the waiting for a place that cannot be reached.
        copied: numbers of the shards that are copied.
        room: bytes that are left of the limit.
    """

    def __init__(
        self,
        place: Place,
        split: Split,
        cache: Path,
        limit: int | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.place, self.split, self.cache, self.say = place, split, cache, say
        self.stop = Event()
        self.copied, self.room = set[int](), limit
        for number, shard in enumerate(split.shards):
            if self.room is None or shard.bytes <= self.room:
                self.copied.add(number)
                self.room = None if self.room is None else self.room - shard.bytes
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()
        self._lock, self._failing = Lock(), 0.0

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """A part of a shard.

        Raises:
            DataError: it cannot be read.
        """
        name = self.split.shards[shard].file
        if not isinstance(self.place, Folder) and shard not in self.copied:
            try:
                found = self._persist(name, lambda: self.place.part(name, offset, length))
            except OSError as error:
                raise DataError(f"{name} cannot be read ({in_a_line(error)})") from error
        else:
            file = self._file(shard)  # which stays open as long as somebody holds it
            try:
                found = os.pread(file.fileno(), length, offset)
            except OSError as error:
                raise DataError(f"{file.name} cannot be read ({error.strerror})") from error
        if len(found) < length:
            raise DataError(f"{name} ends before an image does")
        return found

    def _file(self, number: int) -> BinaryIO:
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
        file = self._opened(self.split.shards[number])
        with self._lock:
            self._open[number] = file
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
        return file

    def _opened(self, shard: Shard) -> BinaryIO:
        if isinstance(self.place, Folder):
            path = self.place.path / shard.file
            try:
                return path.open("rb", buffering=0)
            except OSError as error:
                raise DataError(f"{path} cannot be read ({error.strerror})") from error
        path = self.cache / f"{shard.sha256[:32]}.tar"
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            while (file := self._copy(path, shard)) is None:
                # One process of the node fetches it; the others look now and then.
                with contextlib.suppress(Timeout), FileLock(path.with_suffix(".lock"), timeout=1.0):
                    return self._copy(path, shard) or self._persist(shard.file, lambda: self._fetch(shard, path))
                heartbeat.beat()
                self._check_stop(shard.file)
            return file
        except OSError as error:
            raise DataError(f"data.cache: cannot write to {self.cache}: {in_a_line(error)}") from error

    @staticmethod
    def _copy(path: Path, shard: Shard) -> BinaryIO | None:
        """The copy of a shard, if it is whole; after a loss of power a file may be short."""
        try:
            file = path.open("rb", buffering=0)
        except FileNotFoundError:
            return None
        if os.fstat(file.fileno()).st_size == shard.bytes:
            return file
        file.close()
        return None

    def _fetch(self, shard: Shard, path: Path) -> BinaryIO:
        """Copy a shard here, and open it."""
        for left in self.cache.glob("*.part"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > STALE_S:
                    left.unlink()
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            self.place.fetch(shard.file, part)
            with part.open("rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() != shard.sha256:
                    raise ValueError("does not have the checksum that the manifest says")
            file = part.open("rb", buffering=0)
            part.rename(path)
            return file
        finally:
            part.unlink(missing_ok=True)

    def _persist(self, name: str, ask: Callable[[], Result]) -> Result:
        """What a place answers; one that cannot be reached is asked again for a while, all threads counting together.

        Raises:
            DataError: it could not be reached for that long, or the run ends.
            OSError: a disk of this machine is full or cannot be written.
        """
        wait = 1.0
        while True:
            try:
                found = ask()
                self._failing = 0.0
                return found
            except Exception as error:  # of any kind: clients of object stores raise their own
                if isinstance(error, OSError) and error.errno in _FULL:
                    raise
                now = time.monotonic()
                self._failing = self._failing or now
                if now - self._failing > RETRY_S:
                    raise DataError(f"{name} cannot be fetched: {in_a_line(error)}") from error
                self.say(f"{name} cannot be fetched, trying again: {in_a_line(error)}")
            heartbeat.beat()
            self.stop.wait(wait)
            self._check_stop(name)
            wait = min(30.0, 2 * wait)

    def _check_stop(self, name: str) -> None:
        if self.stop.is_set():
            raise DataError(f"{name} is not waited for any more")
