"""The sign of life of a run's driver: a file whose time is renewed, so that others see whether it still works."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rotssl.base.paths import AnyPath, changed

log = logging.getLogger(__name__)
NAME = "alive"
EVERY_S = 10.0
STALE_S = 60.0  # without a sign, somebody who works has missed five


@contextlib.contextmanager
def kept(folder: AnyPath) -> Iterator[None]:
    """Renew the sign of life in a run's folder within the body; it is removed in the end, but not by whoever is killed."""
    ending, sign = threading.Event(), folder / NAME

    def renew() -> None:
        failed = False
        while True:
            try:
                sign.touch()
            except OSError as error:
                if not failed and isinstance(folder, Path):  # of an object store others say so
                    log.warning("%s cannot be renewed (%s); jobs/status.py will take the run for dead", sign, error)
                failed = True
            if ending.wait(EVERY_S):
                return

    thread = threading.Thread(target=renew, name="alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()
        with contextlib.suppress(OSError):
            sign.unlink(missing_ok=True)


def silent_for(folder: AnyPath) -> float | None:
    """Seconds since the last sign of life; None if there is none."""
    try:
        return max(0.0, time.time() - changed(folder / NAME))
    except FileNotFoundError:
        return None
