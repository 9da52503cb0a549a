"""The tar files of a packed set, read at any offset: where they lie, or in a cache on this node.

The cache holds whole shards, each once for all processes of the node. A shard gets its name when it is complete and has its
checksum, so a process that is killed leaves nothing that counts. Where the cache has a limit, the shards that were opened longest
ago go first; who still reads one keeps it.
"""

import contextlib
import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import BinaryIO

from filelock import FileLock

from rotssl.base import heartbeat
from rotssl.base.place import Folder, Place
from rotssl.data.images import DataError
from rotssl.data.packed import Shard, Split

OPEN = 128  # files kept open
RETRY_S = 600.0  # for which a place that cannot be reached is asked again
STALE_S = 3600.0  # after which what a killed process left unfinished is removed


class Shards:
    """The shards of a split.

    Args:
        place: of the set.
        split: the split.
        cache: folder for copies of shards from a place that is no folder.
        limit: bytes of the cache; None: no limit.
        say: called with a line about a place that cannot be reached.
    """

    def __init__(
        self,
        place: Place,
        split: Split,
        cache: Path,
        limit: int | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.place, self.split, self.cache, self.limit, self.say = place, split, cache, limit, say
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()
        self._lock = Lock()

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """A part of a shard.

        Raises:
            DataError: it cannot be read.
        """
        file = self._file(shard)  # which stays open as long as somebody holds it
        try:
            found = os.pread(file.fileno(), length, offset)
        except OSError as error:
            raise DataError(f"{file.name} cannot be read ({error.strerror})") from error
        if len(found) < length:
            raise DataError(f"{file.name} ends before an image does")
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
        with contextlib.suppress(FileNotFoundError):
            return self._known(path)
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):  # one process of a node fetches it
                with contextlib.suppress(FileNotFoundError):
                    return self._known(path)
                self._make_room(shard.bytes)
                self._fetch(shard, path)
                return self._known(path)
        except OSError as error:
            raise DataError(f"data.cache: cannot write to {self.cache}: {error.strerror or error}") from error

    @staticmethod
    def _known(path: Path) -> BinaryIO:
        file = path.open("rb", buffering=0)
        os.utime(path)  # it was opened last
        return file

    def _fetch(self, shard: Shard, path: Path) -> None:
        """Copy a shard here; a place that cannot be reached is asked again for a while."""
        part = path.with_suffix(f".{os.getpid()}.part")
        started, wait = time.monotonic(), 1.0
        while True:
            try:
                self.place.fetch(shard.file, part)
                with part.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                        raise OSError("does not have the checksum that the manifest says")
                part.rename(path)
                return
            except Exception as error:  # of any kind: clients of object stores raise their own
                part.unlink(missing_ok=True)
                if time.monotonic() - started > RETRY_S:
                    raise DataError(f"{shard.file} cannot be fetched: {str(error).splitlines()[0]}") from error
                self.say(f"{shard.file} cannot be fetched, trying again: {str(error).splitlines()[0]}")
            heartbeat.beat()
            time.sleep(wait)
            wait = min(30.0, 2 * wait)

    def _make_room(self, needed: int) -> None:
        """Remove the shards that were opened longest ago, and what killed processes left, until one more fits."""
        if self.limit is None:
            return
        with FileLock(self.cache / "room.lock"):
            files = []
            for entry in os.scandir(self.cache):
                with contextlib.suppress(FileNotFoundError):
                    if entry.name.endswith(".part") and time.time() - entry.stat().st_mtime > STALE_S:
                        os.unlink(entry.path)
                    elif entry.name.endswith(".tar"):
                        files.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
            held = sum(size for _, size, _ in files)
            for _, size, path in sorted(files):
                if held + needed <= self.limit:
                    return
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                held -= size
