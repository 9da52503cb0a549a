"""The commands behind the programs in jobs/, one module each."""

import contextlib
import errno
import logging
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from rotssl.base import show
from rotssl.base.address import without_login
from rotssl.base.paths import AnyPath, at
from rotssl.config.fields import ConfigError
from rotssl.runs.state import recorded as recorded

EXIT_OK, EXIT_FAILED, EXIT_BAD_CONFIG, EXIT_INTERRUPTED = 0, 1, 2, 130

# Errors of the disk or of what stands there, not of the program: a line says more than a traceback.
_DISK = (
    *(errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN),
    *(errno.EHOSTDOWN, errno.EREMOTEIO),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.EACCES, errno.EPERM),
)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return without_login(super().format(record))


def say(line: str) -> None:
    """Print a line that is not part of the result to stderr, in a notebook to its cell, and flush it."""
    print(without_login(line), file=show.stream(), flush=True)


def folder_of(flag: str, address: str) -> AnyPath:
    """The folder that a flag names.

    Raises:
        ConfigError: it is an address that cannot be used.
    """
    try:
        return at(address)
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}") from error


def run_at(address: str, flag: str = "--checkpoint") -> AnyPath:
    """The folder of a run that a flag names.

    Raises:
        ConfigError: it is an address that cannot be used, or there is no run.
    """
    place = folder_of(flag, address)
    if not (place / "config.yaml").exists():
        what = "has no config.yaml" if place.exists() else "is not there"
        raise ConfigError(f"{flag}: {place} {what}: expected the folder of a run")
    return place


@contextlib.contextmanager
def warnings_shown() -> Iterator[None]:
    """Print the warnings of the package to stderr within the body, each as a line."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(_Formatter("warning: %(message)s"))
    logger = logging.getLogger("rotssl")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def run_command(body: Callable[[], int]) -> NoReturn:
    """Run the body and exit with its code.

    A ConfigError prints one line to stderr and exits with 2, a disk that fails with 1, an interrupt with 130.
    """
    try:
        with warnings_shown():
            code = body()
    except ConfigError as error:
        print(without_login(f"error: {' '.join(str(error).split())}"), file=sys.stderr)
        code = EXIT_BAD_CONFIG
    except OSError as error:
        if error.errno not in _DISK:
            raise
        print(
            f"error: {error.strerror}: {error.filename or 'a file below storage.path, data.root or data.cache'}",
            file=sys.stderr,
        )
        code = EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        code = EXIT_INTERRUPTED
    sys.stdout.flush()
    sys.exit(code)
