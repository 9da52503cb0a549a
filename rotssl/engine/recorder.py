"""The end of an epoch: its cost, its point in the journal, and its checkpoint, all written beside what goes on."""

import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rotssl.engine.events import EpochDone, Note, StepDone
from rotssl.engine.runtime import Runtime
from rotssl.runs import checkpoint
from rotssl.runs.journal import Journal


@dataclass
class Cost:
    """What a run has cost so far; cumulative."""

    epochs: int = 0
    samples: int = 0
    train_seconds: float = 0.0
    device_seconds: float = 0.0  # added up, since the number of workers may change from start to start
    lost_seconds: float = 0.0
    flops: float = 0.0


class EpochRecorder:
    """Accounts for the epochs of a run and sees that they are kept; one for each worker, of which rank 0's writes.

    An epoch goes to the journal first and then into a checkpoint (``keep``): a crash in between repeats it and finds its point
    already there. What is measured on it comes after that (``finish``), so that an evaluation that fails costs no epoch. All is
    written by threads, the checkpoint from a copy of the state by one of its own, so that storage that hangs holds up no step but
    the first, which writes a picture; the end of the next epoch waits for them. Once they are there the epoch is announced, by
    the training thread, as whoever is told may end the run.

    Leaving the context waits for the last ones, and says so where that takes long. What went wrong with one is raised by the
    next call of ``announce``, or told where something else ends the run.

    Args:
        journal: of the run.
        runtime: who runs this.
    """

    def __init__(self, journal: Journal, runtime: Runtime) -> None:
        self.journal, self.runtime = journal, runtime
        self.cost = Cost()
        self.spent = 0.0  # seconds that all starts have trained, up to the last epoch booked
        self._spent_file = journal.folder / "trained_seconds"
        self._lines, self._checkpoints = ThreadPoolExecutor(1, "journal"), ThreadPoolExecutor(1, "checkpoint")
        self._noting: Future[None] | None = None
        self._kept: Future[Path] | None = None  # the newest checkpoint
        self._booked: Future[None] | None = None  # the line of its training
        self._untold: tuple[list[Future[Any]], EpochDone] | None = None  # what an event waits for, and the event

    def __enter__(self) -> "EpochRecorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        saving = self._kept
        if saving is not None and wait([saving], timeout=5).not_done:
            self.runtime.progress(Note("waiting for storage.path, where a checkpoint is being written"))
        self._checkpoints.shutdown()
        self._lines.shutdown()
        if kind is None:
            self.announce(wait=True)
        elif saving is not None and (failed := saving.exception()) not in (None, error):
            self.runtime.progress(Note(f"the last checkpoint could not be written: {failed}"))

    def resume(self, cost: Cost) -> None:
        """Take up what a checkpoint says of the cost, and the seconds that all starts before this one have trained.

        The file has them as far as they were noted, about every second; it may be gone, or be older than the checkpoint.
        """
        self.cost = cost
        try:
            noted = float(self._spent_file.read_text())
        except (OSError, ValueError):
            noted = 0.0
        self.spent = max(noted, cost.train_seconds + cost.lost_seconds)

    def note(self, seconds: float) -> None:
        """Note what the epoch under way has taken so far, unless the last note is yet to be written.

        Raises:
            OSError: the last one could not be.
        """
        if self._noting is not None:
            if not self._noting.done():
                return
            self._noting.result()
        self._noting = self._lines.submit(self._write, self.spent + seconds)

    def _write(self, spent: float, before: Future[None] | None = None) -> None:
        if before is not None:
            before.result()  # what could not be written then is not forgotten
        part = self._spent_file.with_suffix(".part")
        part.write_text(repr(spent))
        os.replace(part, self._spent_file)

    def book(self, epoch: int, samples: int, seconds: float, flops: float) -> dict[str, float]:
        """Account for an epoch. Of one that an earlier start had finished, but not saved, the first cost stands.

        Lost is what all starts have trained beyond that: epochs cut short, and epochs repeated.

        Args:
            epoch: 0-based.
            samples: images that it trained on, over all workers.
            seconds: of training.
            flops: of all workers.

        Returns:
            The metrics ``cost/...``, cumulative.
        """
        self.spent += seconds
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
        return {f"cost/{key}": float(value) for key, value in vars(self.cost).items()}

    def keep(self, epoch: int, metrics: dict[str, float], state: Mapping[str, Any]) -> None:
        """Write down what an epoch has trained; every worker calls it, and then ``finish``.

        Args:
            epoch: 0-based.
            metrics: of its training.
            state: for the checkpoint; copied before this returns.

        Raises:
            OSError: the disk is full, or the like, for the epoch before; for this one ``announce`` raises it.
        """
        if self.runtime.rank == 0:
            self.announce(wait=True)
            # Before the line: seconds in a point that are missing in the file would hide as many lost ones.
            self._noting = noting = self._lines.submit(self._write, self.spent, self._noting)
            self._booked = booked = self._lines.submit(self._append, noting, epoch + 1, metrics)
            folder = self.journal.folder / checkpoint.name(epoch + 1)
            self._kept = self._checkpoints.submit(self._save, booked, checkpoint.snapshot(state), folder)

    def wait_for_checkpoint(self) -> None:
        """Until the newest is on disk; for what might take this process with it.

        Raises:
            OSError: it could not be written.
        """
        if self._kept is not None:
            self._kept.result()

    def finish(self, epoch: int, metrics: dict[str, float], last: StepDone, found: dict[str, float]) -> None:
        """Close an epoch that was kept; every worker calls it.

        Args:
            epoch: 0-based.
            metrics: of its training, as kept.
            last: its last step, with which it is announced.
            found: what its evaluation measured; nothing where there was none, or where it failed.
        """
        metrics = metrics | found
        if self.runtime.rank == 0:
            assert self._kept is not None
            added = self._lines.submit(self._add, self._booked, epoch + 1, found)
            self._untold = [self._kept, added], EpochDone(**vars(last), metrics=metrics)
        self.runtime.report(epoch + 1, metrics, self._kept)

    def amend(self, epoch: int, found: dict[str, float], last: StepDone) -> None:
        """Add what an earlier start could not measure on an epoch (0-based) that it kept; rank 0 calls it."""
        self._lines.submit(self.journal.add, epoch + 1, found).result()
        self.runtime.progress(EpochDone(**vars(last), metrics=self.journal.point(epoch + 1) or {}))

    def _add(self, booked: Future[None] | None, epoch: int, found: dict[str, float]) -> None:
        if booked is not None:
            booked.result()  # without the line of its training, an epoch has no point
        self.journal.add(epoch, found)

    def _append(self, noting: Future[None], epoch: int, metrics: dict[str, float]) -> None:
        noting.result()
        self.journal.append(epoch, metrics)

    def _save(self, booked: Future[None], state: dict[str, Any], folder: Path) -> Path:
        booked.result()
        checkpoint.save(state, folder)
        self.runtime.prune()
        return folder

    def announce(self, wait: bool = False) -> None:
        """Tell of the epoch that was being written, if it is there by now.

        Args:
            wait: until it is there.

        Raises:
            OSError: it could not be written.
        """
        if self._untold is not None and (wait or all(part.done() for part in self._untold[0])):
            (parts, event), self._untold = self._untold, None
            for part in parts:
                part.result()
            self.runtime.progress(event)
