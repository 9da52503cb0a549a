"""Locks between processes, by flock: the system releases that of a process that dies."""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)
_WAIT_S = 0.05


class Held(Exception):
    """Another process holds the lock."""


@contextlib.contextmanager
def locked(path: Path, patience: float = 0) -> Iterator[None]:
    """Hold the lock of a file, which is created if missing and stays.

    On a file system without flock, such as Lustre mounted without it, there is a warning and no lock.

    Args:
        path: the file.
        patience: seconds to wait for another process.

    Raises:
        Held: another process still holds it.
        OSError: the file can't be opened for writing.
    """
    handle, until = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), time.monotonic() + patience
    try:
        while not _try(handle, path):
            if time.monotonic() >= until:
                raise Held(str(path))
            time.sleep(_WAIT_S)
        yield
    finally:
        with contextlib.suppress(OSError):  # without flock; a child that inherited the file must not keep it locked
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _try(handle: int, path: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # EWOULDBLOCK: the only answer that means another process
        return False
    except OSError as error:
        log.warning("%s cannot be locked (%s): do not start the same run twice at once", path, error.strerror)
    return True
