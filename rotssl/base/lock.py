"""Locks between processes: the system releases that of a process that dies; in an object store it expires (claims.py)."""

import contextlib
import errno
import logging
from collections.abc import Iterator

from filelock import FileLock, Timeout

from rotssl.base.claims import claimed
from rotssl.base.errors import Held
from rotssl.base.objects import ObjectPath
from rotssl.base.paths import AnyPath

log = logging.getLogger(__name__)
# What a file system without flock answers, such as Lustre mounted without it.
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO)


@contextlib.contextmanager
def locked(path: AnyPath, patience: float = 0) -> Iterator[None]:
    """Hold the lock of a file, which is created if missing and stays; in an object store it is a folder.

    On a file system without flock there is a warning and no lock.

    Args:
        path: the file.
        patience: seconds to wait for another process.

    Raises:
        Held: another process still holds it.
        OSError: the file can't be opened for writing.
    """
    if isinstance(path, ObjectPath):
        with claimed(path, patience):
            yield
        return
    # The library's fallback, a file that is removed in the end, would outlive a process that is killed.
    lock = FileLock(path, timeout=patience, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise Held(str(path)) from error
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        log.warning("%s cannot be locked (%s): do not start the same run twice at once", path, error.strerror)
    try:
        yield
    finally:
        lock.release()
