"""The driver's watch over Ray Train workers: notices that none of them makes progress any more, and has them restarted.

Ray notices processes that die. One that hangs (a stopped process, a dead disk, a deadlock) keeps the others waiting for it, so
that soon no worker shows a sign of life: a step, an evaluated batch, a decoded image.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rotssl.base import heartbeat
from rotssl.engine.events import Usage
from rotssl.runtimes.ray_start import why_silent

log = logging.getLogger(__name__)
# A head that fails over may come back; Ray itself waits for 60 s.
HEAD_PATIENCE_S = 30


@dataclass(frozen=True)
class Joined:
    """A worker that starts to work: its rank, its actor and that of Ray Train's controller."""

    rank: int
    worker: Any
    controller: Any

    @classmethod
    def here(cls, rank: int) -> "Joined":
        """This worker."""
        import ray
        from ray.train.v2._internal.execution.context import get_train_context

        return cls(rank, ray.get_runtime_context().current_actor, get_train_context().controller_actor)


@dataclass(frozen=True)
class Alive:
    """A sign of life."""


@dataclass(frozen=True)
class Failed:
    """The workers have ended, for this reason; Ray Train's controller starts others."""

    reason: str
    controller: Any = None


class HeadGone(Exception):
    """The head of the cluster does not answer any more; the text is the one line to print."""


class Head:
    """The watch over the cluster's head (its GCS). Without it Ray ends this process after a minute, and no status is saved.

    Args:
        address: HOST:PORT of the GCS.
    """

    def __init__(self, address: str) -> None:
        self.address, self.seen = address, time.monotonic()

    def gone(self) -> str:
        """A line that says that the head is gone; empty if it answers."""
        if silence := why_silent(self.address):
            advice = "the same command goes on from the last checkpoint, once there is a cluster"
            return f"the head of the Ray cluster is gone ({self.address}: {silence}); {advice}"
        self.seen = time.monotonic()
        return ""

    def until_done(self, work: Callable[[], Any], look: Callable[[], None] = lambda: None) -> Any:
        """The result of ``work``, which runs in another thread and is left behind if the head is gone.

        ``look`` is called every second.

        Raises:
            HeadGone: it has not answered for 30 seconds.
        """
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="fit", daemon=True).start()
        while not wait([future], timeout=1).done:
            if line := self.gone():
                if time.monotonic() - self.seen > HEAD_PATIENCE_S:
                    raise HeadGone(line)
            else:
                look()
        return future.result()


@contextmanager
def signs_of_life(queue: Any, minutes: float) -> Iterator[None]:
    """Send the heartbeats of the body to the driver's queue, often enough for a watch of that patience."""
    if minutes == 0:
        yield
        return
    with heartbeat.listener(lambda: queue.actor.put_nowait.remote(Alive()), min(5.0, minutes * 60 / 10)):
        yield


class Watch:
    """Restarts the workers of a run that make no progress, or ends it if that does not help.

    Waiting for free resources is not a hang: the clock runs from the first worker's start to the last worker's death.

    Args:
        minutes: ``scaling.hang_minutes``; 0 turns the watch off.
        kill: ends an actor, whatever it does.
        ready: whether the images have been read; until then a restart would not help.
        say: called with a line about a hang, from another thread.
    """

    def __init__(
        self, minutes: float, kill: Callable[[Any], None], ready: Callable[[], bool], say: Callable[[str], None]
    ) -> None:
        self.minutes, self.kill, self.ready, self.say = minutes, kill, ready, say
        self.workers: dict[int, Any] = {}
        self.controller: Any = None
        self.last: float | None = None  # when the last sign of life came; None while there is no worker
        self.hangs, self.restarting, self.reason = 0, False, ""
        self.deadline: float | None = None  # for new workers to start
        self.gave_up = False  # another start would not help
        self._done = threading.Event()

    def see(self, item: Any) -> bool:
        """Note a sign of life; returns whether it was only for the watch."""
        if isinstance(item, Usage):
            return False  # a thread of its own sends it, also from a worker that hangs
        self.last = time.monotonic() if self.last is not None or isinstance(item, Joined) else None
        if isinstance(item, Joined):
            self.workers[item.rank], self.controller = item.worker, item.controller
            self.restarting, self.reason, self.deadline = False, "", None
        if isinstance(item, Failed):
            self.last, self.workers = None, {}  # waiting for a place is no hang
            self.controller = item.controller or self.controller
        return isinstance(item, Joined | Alive)

    def check(self) -> None:
        """Act if the last sign of life is too long ago."""
        if self.last is None and self.deadline is not None and time.monotonic() > self.deadline:
            self._give_up("and no new workers start")
        if self.last is None or time.monotonic() - self.last < self.minutes * 60:
            return
        self.last = time.monotonic()
        quiet = f"no progress for {self.minutes:g} minutes (scaling.hang_minutes)"
        if self.ready() and not self.restarting:
            self.hangs += 1
            self.say(f"{quiet}: the workers are ended and start again from the last checkpoint")
            self.restarting = True
            self.reason = f"{quiet}, {self.hangs} times"
            workers, self.workers = self.workers, {}
            if all([self._ended(worker) for worker in workers.values()]):
                return
        self._give_up("and no new workers start" if self.ready() else "the images are not read")

    def expect(self, seconds: float) -> None:
        """Expect new workers: they may wait for a place for so long, and then take as long as a hang."""
        self.deadline = time.monotonic() + seconds + 60 * self.minutes

    def _give_up(self, why: str) -> None:
        self.reason = f"no progress for {self.minutes:g} minutes (scaling.hang_minutes), {why}"
        self.last, self.deadline, self.gave_up = None, None, True
        self._ended(self.controller)  # and fit() with it

    def _ended(self, actor: Any) -> bool:
        try:
            self.kill(actor)
        except Exception as error:  # of any kind: the watch must go on
            log.warning("an actor that hangs could not be ended (%s)", error)
            return False
        return True

    @property
    def to_blame(self) -> str:
        """Why the run failed, if it was a hang; empty if new workers had started after the last one."""
        return self.reason if self.restarting or self.last is None else ""

    def rest(self) -> None:
        """Forget the workers and their controller, which have ended."""
        self.last, self.restarting, self.workers, self.controller, self.deadline = None, False, {}, None, None

    def stop(self) -> None:
        """End the workers and the controller at once, so that nothing of the run goes on while it is closed."""
        for actor in (self.controller, *self.workers.values()):  # it first: it would start others
            if actor is not None:
                self._ended(actor)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Watch within the body, in a thread of its own: that of the events may hang as well."""

        def look() -> None:
            while not self._done.wait(min(1.0, self.minutes * 60 / 10)):
                self.check()

        thread = threading.Thread(target=look, name="watch", daemon=True)
        if self.minutes > 0:
            thread.start()
        try:
            yield
        finally:
            self._done.set()
