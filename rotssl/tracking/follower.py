"""A run in MLflow that follows its journal while it trains."""

import datetime
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

from rotssl.base.paths import AnyPath
from rotssl.engine.events import EpochDone, Event, Facts, Usage
from rotssl.runs import journal
from rotssl.runs.journal import Points
from rotssl.tracking.system import SystemMetrics
from rotssl.tracking.writer import Tracker

RETRY_S = 20.0  # before a store that could not be reached is tried again


class Follower:
    """Keeps a run in MLflow in sync with its journal, in a separate thread, so that training never waits for the store.

    The thread looks at the journal itself, not only when it hears of an epoch: events may be lost with a node.
    Points added during a sync are sent by the next one, or by the Tracker that closes the run. Leaving the context waits for the
    current sync.

    Args:
        tracker: tracker of the run, used by this thread only.
        folder: folder of the run.
        epochs: of the whole run.
    """

    LOOK_S = 2.0

    def __init__(self, tracker: Tracker, folder: AnyPath, epochs: int) -> None:
        self.tracker, self.folder, self.epochs = tracker, folder, epochs
        self._tags: SimpleQueue[dict[str, str]] = SimpleQueue()
        self._system = SystemMetrics(tracker.uri, tracker.run_id)
        self._wake, self._ending = threading.Event(), False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._follow, name="tracking", daemon=True)

    def __enter__(self) -> "Follower":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending = True
        self._wake.set()
        self._thread.join()
        if kind is KeyboardInterrupt:
            # At once: whoever stops the program may kill it in seconds, of which a plot and a last sync take too many.
            self.tracker.finish("KILLED", "interrupted", [])
        if kind is None and self._error is not None:
            raise self._error  # the journal could not be read

    def handle(self, event: Event) -> None:
        """Handle an event of the engine: facts become tags, a finished epoch starts a sync, samples of machines are logged."""
        if isinstance(event, Usage):
            self._system.add(event.metrics)
        if isinstance(event, Facts):
            self._tags.put(dict(event.tags))
        if isinstance(event, Facts | EpochDone):
            self._wake.set()

    def _follow(self) -> None:
        known: object = None
        look = self.LOOK_S if isinstance(self.folder, Path) else 5 * self.LOOK_S  # each look at an object store costs
        retry = 0.0  # when to try again after a failure, on time.monotonic()'s clock
        while True:
            told = self._wake.wait(look)
            self._wake.clear()
            while not self._tags.empty():
                self.tracker.tag(self._tags.get())
            if self._ending:
                self._system.send()  # of a run that took no longer than this thread's first look, these are all
                return
            try:
                now = journal.stamp(self.folder)
                # Of a file that another machine writes, size and time may be older than its content.
                if told or (now != known and time.monotonic() >= retry):
                    points = journal.read(self.folder)
                    sent = not points or self.tracker.sync(points, progress(points, self.epochs))
                    known, retry = (now, 0.0) if sent else (None, time.monotonic() + RETRY_S)
                    if not sent:
                        self._system.rest()
                self._system.send()
                self._error = None
            except OSError as error:
                self._error = error


def progress(points: Points, epochs: int) -> dict[str, str]:
    """Tags that say how far a run of so many epochs is, and when it should end."""
    left = datetime.timedelta(seconds=journal.seconds_left(points, epochs))
    ends = datetime.datetime.now(datetime.UTC) + left
    return {"progress": f"{max(points, default=0)} of {epochs} epochs", "eta": f"{ends:%Y-%m-%d %H:%M} UTC"}
