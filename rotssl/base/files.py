"""Files that are written whole: after a crash at any moment there is the old content or the new one, never a part of it."""

import errno
import os
from pathlib import Path

# What file systems answer that cannot sync a folder; they do not promise more than the rename.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


def sync_folder(folder: Path) -> None:
    """Bring the names of a folder's files to the disk.

    Raises:
        OSError: the disk fails.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(handle)


def put(part: Path, path: Path) -> None:
    """Give a file, which is on the disk, its name in place of an older one; the name is on the disk afterwards.

    Raises:
        OSError: the name cannot be written.
    """
    part.replace(path)
    sync_folder(path.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole.

    Raises:
        OSError: it cannot be written; the old file is unchanged.
    """
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())  # a name that came to the disk before its content would leave an empty file
    put(part, path)
