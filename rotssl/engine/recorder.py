"""Recording of finished epochs: cost, journal line and checkpoint, written in the background."""

import contextlib
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rotssl.base.paths import AnyPath, remove_tree
from rotssl.engine import hardware
from rotssl.engine.events import EpochDone, Note, StepDone
from rotssl.engine.runtime import Runtime
from rotssl.runs import checkpoint
from rotssl.runs.journal import Journal

SHARE = 0.05  # of the time of training, for evaluations with knn_every auto and checkpoints
NOTE_S = 10.0  # between saves of the seconds trained, in an object store


@dataclass
class Cost:
    """The cumulative cost of a run."""

    epochs: int = 0
    samples: int = 0
    train_seconds: float = 0.0
    device_seconds: float = 0.0  # summed, since the number of workers may change between starts
    lost_seconds: float = 0.0
    flops: float = 0.0


class EpochRecorder:
    """Records each finished epoch: cost, journal line, checkpoint. Every worker has one; only rank 0 writes.

    An epoch goes to the journal first and then into a checkpoint (``keep``): after a crash in between, it is repeated, and its
    point is already there. Its evaluation is recorded after that (``finish``), so a failed evaluation does not lose the epoch.
    Threads do the writing, one of them the checkpoint from a copy of the state, so that slow storage does not delay any step
    except the first, which writes a picture; the next checkpoint waits for them. Once all is written, the training thread
    announces the epoch, because a listener may end the run. Epochs are announced in their order.

    Leaving the context waits for pending writes, with a note if that takes long. A write error is raised by the next call of
    ``announce``, or reported as a note if another error ends the run.

    Args:
        journal: journal of the run.
        runtime: environment that this runs in.
        keep_every: the checkpoints of every so many epochs are never deleted; 0: of none.
        save_every: epochs from checkpoint to checkpoint, or ``auto``; see ``due``.

    Attributes:
        trained: seconds that this start has trained.
        saving: of these and those after, seconds that training has waited for checkpoints.
    """

    def __init__(self, journal: Journal, runtime: Runtime, keep_every: int = 0, save_every: int | str = 1) -> None:
        self.journal, self.runtime, self.keep_every, self.save_every = journal, runtime, keep_every, save_every
        self.cost, self.memory = Cost(), hardware.MemoryHeld(runtime.device)
        self.trained = self.saving = self._latest = 0.0
        self.spent = 0.0  # seconds trained by all starts, up to the last booked epoch
        self._spent_file = journal.folder / "trained_seconds"
        self._lines, self._checkpoints = ThreadPoolExecutor(1, "journal"), ThreadPoolExecutor(1, "checkpoint")
        self._noting: Future[None] | None = None
        self._note_at = 0.0
        self._kept: Future[AnyPath] | None = None  # the newest checkpoint
        self._within: Future[None] | None = None  # the newest one within an epoch
        self._booked: Future[None] | None = None  # its journal line
        self._pending: list[Future[Any]] = []  # writes of the epoch under way
        # Pending writes, and the event that waits for them.
        self._untold: deque[tuple[list[Future[Any]], EpochDone]] = deque()

    def __enter__(self) -> "EpochRecorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        saving, started = self._kept, time.perf_counter()
        if saving is not None and wait([saving], timeout=5).not_done:
            self.runtime.progress(Note("waiting for a checkpoint to be written to storage.path"))
        self._checkpoints.shutdown()
        self.saving += time.perf_counter() - started
        self._lines.shutdown()
        if kind is None:
            self.announce(wait=True)
        elif saving is not None and (failed := saving.exception()) not in (None, error):
            self.runtime.progress(Note(f"the last checkpoint could not be written: {failed}"))

    def resume(self, cost: Cost) -> None:
        """Restore the cost from a checkpoint, and the seconds trained by all earlier starts.

        The file of trained seconds is updated about once per second. It may be missing; what the checkpoint and the last line of
        the journal know was trained all the same.
        """
        self.cost = cost
        last = self.journal.last()
        try:
            noted = float(self._spent_file.read_text())
        except (OSError, ValueError):
            noted = 0.0
        saved = cost.train_seconds + cost.lost_seconds
        journaled = last.get("cost/train_seconds", 0.0) + last.get("cost/lost_seconds", 0.0)
        self.spent = max(noted, saved, journaled) + self._noted_by_earlier_versions()

    def _noted_by_earlier_versions(self) -> float:
        """Seconds of an epoch that was cut short, from the file in which versions before 0.2 noted them; read once."""
        file = self.journal.folder / "unfinished"
        if self.runtime.rank != 0 or not file.exists():
            return 0.0
        try:
            cut, seconds, again, unsaved = map(float, file.read_text().split())
        except ValueError:
            return 0.0
        file.unlink()
        recorded = not again and self.journal.point(int(cut) + 1) is not None
        if recorded or cut < self.cost.epochs:
            return 0.0
        return seconds + (unsaved if cut > self.cost.epochs else 0.0)

    def note(self, seconds: float) -> None:
        """Save the seconds that the current epoch has taken so far, unless the last save is still pending.

        In an object store it is saved less often, since each write costs.

        Raises:
            OSError: the last save failed.
        """
        if not isinstance(self._spent_file, Path):
            if time.monotonic() < self._note_at:
                return
            self._note_at = time.monotonic() + NOTE_S
        if self._noting is not None:
            if not self._noting.done():
                return
            self._noting.result()
        self._noting = self._lines.submit(self._write, self.spent + seconds)

    def _write(self, spent: float, before: Future[None] | None = None) -> None:
        if before is not None:
            before.result()  # what could not be written then is not forgotten
        if not isinstance(self._spent_file, Path):
            self._spent_file.write_bytes(repr(spent).encode())
            return
        part = self._spent_file.with_suffix(".part")
        part.write_text(repr(spent))
        part.replace(self._spent_file)

    def book(self, epoch: int, samples: int, seconds: float, flops: float, before: float = 0.0) -> dict[str, float]:
        """Account for an epoch; one that an earlier start finished but did not save keeps its first cost.

        Lost seconds are those that all starts trained beyond the cost: interrupted and repeated epochs.

        Args:
            epoch: 0-based.
            samples: number of images trained on, over all workers.
            seconds: seconds of training.
            flops: FLOPs of all workers.
            before: how many of the seconds an earlier start trained.

        Returns:
            The metrics ``cost/...``, cumulative, and ``memory/...``.
        """
        self.spent += seconds - before
        self.trained += seconds - before
        earlier = self.journal.point(epoch + 1)
        if earlier is not None:
            self.cost = Cost(**{key: type(getattr(self.cost, key))(earlier[f"cost/{key}"]) for key in vars(self.cost)})
        else:
            self.cost.epochs += 1
            self.cost.samples += samples
            self.cost.train_seconds += seconds
            self.cost.device_seconds += seconds * self.runtime.world_size
            self.cost.flops += flops
        self.cost.lost_seconds = max(0.0, self.spent - self.cost.train_seconds)
        return {f"cost/{key}": float(value) for key, value in vars(self.cost).items()} | self.memory()

    def due(self, epoch: int) -> bool:
        """Whether to save the state after a booked epoch (0-based) that is neither the first nor the last one of a start.

        With ``train.save_every auto`` where no other checkpoint is being written, and checkpoints take no more than half of
        ``SHARE`` with this one and that at the end, going by the last one; the other half is left for evaluations.
        """
        if self.keep_every and (epoch + 1) % self.keep_every == 0:
            return True
        if not isinstance(self.save_every, str):
            return (epoch + 1) % self.save_every == 0
        writing = self._kept is not None and not self._kept.done()
        return not writing and self.saving + 2 * self._latest <= SHARE / 2 * self.trained

    def keep(self, epoch: int, metrics: dict[str, float], state: Mapping[str, Any] | None) -> None:
        """Record the training of an epoch; every worker must call it, and then ``finish``.

        Args:
            epoch: 0-based.
            metrics: metrics of its training.
            state: state for the checkpoint, copied before this returns; None: the epoch gets none.

        Raises:
            OSError: an earlier epoch could not be written, for example to a full disk; ``announce`` raises it for this one.
        """
        started = time.perf_counter()
        if self.runtime.rank == 0:
            self.announce(wait=state is not None)
            if self._within is not None and state is not None:
                self._within.result()
            # Before the line: seconds in a point that the file lacks would hide as many lost seconds.
            self._noting = noting = self._lines.submit(self._write, self.spent, self._noting)
            self._booked = booked = self._lines.submit(self._append, noting, epoch + 1, metrics)
            self._pending = [booked]
            if state is not None:
                folder = self.journal.folder / checkpoint.name(epoch + 1)
                self._kept = self._checkpoints.submit(self._save, booked, checkpoint.snapshot(state), folder)
                self._pending.append(self._kept)
        if state is not None:
            self._latest = time.perf_counter() - started
            self.saving += self._latest

    def keep_within(self, state: Mapping[str, Any]) -> None:
        """Save a state within an epoch, unless the last one is still being written.

        Raises:
            OSError: the last one could not be written.
        """
        if self.runtime.rank == 0 and (self._within is None or self._within.done()):
            if self._within is not None:
                self._within.result()
            folder, started = self.journal.folder / checkpoint.WITHIN, time.perf_counter()
            self._within = self._checkpoints.submit(checkpoint.save, checkpoint.snapshot(state), folder)
            self.saving += time.perf_counter() - started

    def wait_for_checkpoint(self) -> None:
        """Wait until the newest checkpoint is on disk, before a step that might kill this process.

        Raises:
            OSError: it could not be written.
        """
        if self._kept is not None:
            started = time.perf_counter()
            self._kept.result()
            self.saving += time.perf_counter() - started

    def finish(self, epoch: int, metrics: dict[str, float], last: StepDone, found: dict[str, float]) -> None:
        """Finish an epoch after ``keep``; every worker must call it.

        Args:
            epoch: 0-based.
            metrics: metrics of its training, as given to ``keep``.
            last: its last step, used to announce it.
            found: metrics of its evaluation; empty if there was none or it failed.
        """
        metrics = metrics | found
        if self.runtime.rank == 0:
            added = self._lines.submit(self._add, self._booked, epoch + 1, found)
            done = EpochDone(**vars(last), metrics=metrics, saved=len(self._pending) > 1)
            self._untold.append(([*self._pending, added], done))
        self.runtime.report(metrics)

    def amend(self, epoch: int, found: dict[str, float], last: StepDone) -> None:
        """Add metrics to an epoch (0-based) that an earlier start recorded without them; only rank 0 calls it."""
        self._lines.submit(self.journal.add, epoch + 1, found).result()
        self.runtime.progress(EpochDone(**vars(last), metrics=self.journal.point(epoch + 1) or {}))

    def _add(self, booked: Future[None] | None, epoch: int, found: dict[str, float]) -> None:
        if booked is not None:
            booked.result()  # without the line of its training, an epoch must have no point
        self.journal.add(epoch, found)

    def _append(self, noting: Future[None], epoch: int, metrics: dict[str, float]) -> None:
        noting.result()
        self.journal.append(epoch, metrics)

    def _save(self, booked: Future[None], state: dict[str, Any], folder: AnyPath) -> AnyPath:
        booked.result()
        checkpoint.save(state, folder)
        if self.keep_every and state["epoch"] % self.keep_every == 0:
            checkpoint.hold(folder)
        with contextlib.suppress(OSError):  # it is older
            remove_tree(self.journal.folder / checkpoint.WITHIN)
        self.runtime.prune()
        return folder

    def announce(self, wait: bool = False) -> None:
        """Announce the pending epochs that have been written.

        Args:
            wait: whether to wait until all are written.

        Raises:
            OSError: one could not be written.
        """
        while self._untold and (wait or all(part.done() for part in self._untold[0][0])):
            parts, event = self._untold.popleft()
            for part in parts:
                part.result()
            self.runtime.progress(event)
