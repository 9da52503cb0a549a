"""What signals do to a program that trains."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

from rotssl.base.paths import AnyPath
from rotssl.runs import checkpoint

log = logging.getLogger(__name__)


def handle(stack: ExitStack, number: signal.Signals, handler: Callable[..., None]) -> None:
    """Handle a signal until the stack is closed."""
    stack.callback(signal.signal, number, signal.getsignal(number))
    signal.signal(number, handler)


def leave(folder: AnyPath, patience: float) -> None:
    """Save and end, in another thread: this one has signals to handle and, without Ray, the training to do."""
    threading.Thread(target=_save_and_end, args=[folder, patience], name="leave", daemon=True).start()


def interrupt(number: int, *_: object) -> None:
    """A signal handler that interrupts the program like Ctrl-C. The signal is ignored from then on: Slurm sends it twice."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _save_and_end(folder: AnyPath, patience: float) -> None:
    """Ask a run for a save of its state, and send SIGTERM to this process once there is one, or after so many seconds."""
    asked, before, until = folder / checkpoint.ASKED, checkpoint.last_save(folder), time.monotonic() + patience
    try:
        asked.touch()
        while checkpoint.last_save(folder) == before and time.monotonic() < until:
            time.sleep(0.1)
        asked.unlink(missing_ok=True)
    except OSError as error:
        log.warning("no state was saved: %s", error)
    os.kill(os.getpid(), signal.SIGTERM)
