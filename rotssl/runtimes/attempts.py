"""What happens when workers fail or nodes go: whether the run starts again, on how many workers, and what is said about it.

Ray Train starts workers again by itself. But it counts failures over a whole run, however long, gives missing nodes a minute, and
says nothing. So it is told never to give up, and here is decided when that is. It ends only where workers do not start in time.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rotssl import config as cfg
from rotssl.base.errors import in_a_line
from rotssl.config import ResolvedConfig
from rotssl.engine.events import EpochDone, Event
from rotssl.runs import checkpoint, journal
from rotssl.runtimes.ray_cluster import Workers, gone_from, places_for
from rotssl.runtimes.watch import Failed, Watch

log = logging.getLogger(__name__)
MAX_FAILURES = 3  # in a row, without progress between them
ELASTIC_S = 60.0  # that missing workers are waited for before a run goes on with fewer
WAIT_MINUTES = 10.0  # of scaling.wait_minutes auto
QUIET_S = 10.0  # that workers take to start, before anything is said
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"  # that Ray Train reads

Nodes = Sequence[Mapping[str, Any]]


class Attempts:
    """The starts of the workers of a run.

    Args:
        config: of the run.
        asked: the workers that it should have.
        nodes: gives the nodes of the cluster.
        guard: that watches the workers.
        say: called with a line for people.

    Attributes:
        workers: those of the next start.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        asked: Workers,
        nodes: Callable[[], Nodes],
        guard: Watch,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.asked, self.nodes, self.guard, self.say = config, asked, nodes, guard, say
        self.workers = asked
        wait = config.scaling.wait_minutes
        self.minutes = WAIT_MINUTES if wait == "auto" else wait
        self.failures, self.growing, self.told, self.ended = 0, False, "", ""
        self.reached = (0, 0.0)
        self.reached = self._progress()
        self.known = list(nodes())
        self.begun = self.waiting_since = self.grow_at = time.monotonic()
        self.pause = 60 * self.minutes  # before another try to grow
        self.short = False  # whether nodes were missing at some time since the workers began to start

    def _progress(self) -> tuple[int, float]:
        """Grows with every epoch, and with every state that is saved within one; as before if the disk does not answer."""
        try:
            return max(journal.read(self.config.run_dir), default=0), checkpoint.last_save(self.config.run_dir)
        except OSError as error:
            log.warning("the progress of the run cannot be read (%s)", in_a_line(error))
            return self.reached

    def room(self) -> int:
        """The number of workers for which the cluster has room now, if nobody else uses it."""
        return places_for(self.config, self.nodes(), self.asked.use_gpu)

    def fitting(self) -> int:
        """The largest number of workers that fit, and can share the batch; 0: not one."""
        counts = range(min(self.room(), self.asked.count), 0, -1)
        return next((count for count in counts if not cfg.unshared(self.config, count)), 0)

    def start(self) -> None:
        """Note that the workers start, and how long Ray Train shall wait for them."""
        self.begun, self.short = time.monotonic(), False
        patience = self.waiting_since + 60 * self.minutes - self.begun
        if self.config.scaling.elastic:
            patience = min(patience, ELASTIC_S)
        os.environ[START_TIMEOUT] = str(max(patience, QUIET_S))

    def look(self) -> None:
        """Say what is waited for, if the workers do not start for want of room; called every second or so."""
        if self.guard.last is not None:
            self.waiting_since, self.told = time.monotonic(), ""
            return
        try:
            room, count = self.room(), self.workers.count
        except Exception as error:  # of any kind: Ray raises plain ones while its head does not answer
            log.debug("the nodes are not known (%s)", error)
            return
        self.short = self.short or room < count
        if room >= count or time.monotonic() - self.begun < QUIET_S:
            return
        line = f"waiting for room for {count} workers: the cluster has room for {room}"
        if line != self.told:
            self.told = line
            self.say(f"{line} (scaling.wait_minutes {self.minutes:g})")

    def heard(self, show: Callable[[Event], None]) -> Callable[[Any], None]:
        """``show``, which is called with each event of the run.

        Failures are counted, and end the run if they are too many. After an epoch with a checkpoint, workers that were missed may
        come back.
        """

        def handle(event: Any) -> None:
            if isinstance(event, Failed):
                self.failed(event.reason)
                return
            show(event)
            fewer = self.workers.count < self.asked.count and time.monotonic() >= self.grow_at
            saved = isinstance(event, EpochDone) and event.saved
            if saved and fewer and not self.growing and self.fitting() > self.workers.count:
                self.growing = True
                self.say(
                    f"the cluster has room for {self.fitting()} workers again: they start from the last checkpoint"
                )
                self.guard.stop()

        return handle

    def failed(self, reason: str) -> None:
        """Count a failure of workers, which Ray Train is about to start again, and say it; one too many ends the run.

        Args:
            reason: why they ended.
        """
        if self.growing:
            return
        self.begun = time.monotonic()
        self.guard.expect(60 * self.minutes)
        now, hung = self._progress(), self.guard.to_blame
        self.failures = self.failures + 1 if now <= self.reached else 1
        self.reached = now
        why = hung or self._whereabouts() or reason
        if self.failures > MAX_FAILURES:
            self.ended = why
            self.guard.stop()
        elif not hung:  # the watch has said it
            self.say(f"{why}; the workers start again from the last checkpoint")

    def again(self, reason: str, timed_out: bool) -> str:
        """Decide whether to start the workers again after Ray Train has ended.

        Args:
            reason: why it has.
            timed_out: whether workers did not start in the time that ``start`` has set.

        Returns:
            An empty text, or why the run ends.
        """
        before = self.workers.count
        if self.guard.gave_up:
            return self.guard.reason
        if timed_out:
            self.workers = replace(self.asked, count=self._smaller() if self.config.scaling.elastic else before)
            waited = time.monotonic() - self.waiting_since >= 60 * self.minutes - 1
            if waited and self.workers.count == before:
                minutes = f"{self.minutes:g} minutes (scaling.wait_minutes)"
                return f"no {before} workers could start for {minutes}; the cluster has room for {self.room()}"
        elif self.growing:
            self.growing, self.workers = False, replace(self.asked, count=self.fitting() or before)
        elif not self.ended:
            self.failed(reason)
        self.guard.rest()
        if self.workers.count < before:
            self.say(f"going on with {self.workers.count} of {self.asked.count} workers (scaling.elastic)")
        return self.ended

    def _smaller(self) -> int:
        """The number of workers after some that did not start in time: as many as fit, or fewer if others are where they fit."""
        before, fit = self.workers.count, self.fitting()
        if fit < before:
            return fit or before
        if self.short:  # the last of them has only just come
            return before
        # The nodes have room, but somebody else uses it. Another try to grow costs a minute, so it comes later each time.
        self.grow_at = time.monotonic() + self.pause
        self.pause *= 2
        return next((count for count in range(before - 1, 0, -1) if not cfg.unshared(self.config, count)), before)

    def _whereabouts(self) -> str:
        """A line about nodes that are gone since this was last asked; empty if all are there, or nobody knows."""
        try:
            now = list(self.nodes())
        except Exception as error:  # as in look
            log.debug("the nodes are not known (%s)", error)
            return ""
        gone, self.known = gone_from(self.known, now), now
        return f"{', '.join(gone)} of the cluster {'is' if len(gone) == 1 else 'are'} gone" if gone else ""
