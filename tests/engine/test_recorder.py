"""The end of an epoch: journal, checkpoint and announcement, and MLflow beside it; what is slow must not hold up what trains."""

import errno
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import pytest
import torch

from rotssl.engine.events import EpochDone, Note, StepDone
from rotssl.engine.recorder import Cost, EpochRecorder
from rotssl.engine.runtime import LocalRuntime
from rotssl.runs import checkpoint, journal
from tests.small_runs import full_disk


class Disk:
    """torch.save, but as slow as one likes."""

    def __init__(self, monkeypatch):
        self.free, self.asked, self.error, self.save = threading.Event(), threading.Event(), None, torch.save
        monkeypatch.setattr(torch, "save", self)

    def __call__(self, state, path):
        self.asked.set()
        assert self.free.wait(timeout=20)
        if self.error:
            raise self.error
        self.save(state, path)


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.fixture
def told():
    return []


@pytest.fixture
def recorder(tmp_path, told):
    return EpochRecorder(journal.Journal(tmp_path), LocalRuntime(tmp_path, torch.device("cpu"), told.append))


def restarted(recorder, cost=None):
    """As the next start has it, whose checkpoint says this of the cost."""
    again = EpochRecorder(journal.Journal(recorder.journal.folder), recorder.runtime)
    again.resume(Cost(**cost) if cost else Cost())
    return again


def noted(recorder, folder):
    """The seconds that all starts have trained, once they are on disk."""
    recorder._lines.submit(int).result(timeout=20)
    return float((folder / "trained_seconds").read_text())


def finish(recorder, epoch, weights):
    state = {"model": {"w": weights}, "optimizer": {"state": [weights]}, "epoch": epoch + 1}
    recorder.keep(epoch, {"loss/total": 1.0}, state)
    recorder.finish(epoch, {"loss/total": 1.0}, StepDone(epoch + 1, epoch + 1, 9), {})


def close(recorder, epoch, metrics, found=None, state=MappingProxyType({})):
    recorder.keep(epoch, metrics, state)
    recorder.finish(epoch, metrics, StepDone(epoch + 1, epoch + 1, 9), found or {})


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(recorder, disk, told, tmp_path):
    weights = torch.zeros(3)
    with recorder:
        finish(recorder, 0, weights)  # the disk is not free yet
        weights += 1  # a step of the next epoch
        recorder.announce()
        assert disk.asked.wait(timeout=20)
        assert told == [] and checkpoint.found(tmp_path) == [] and set(journal.read(tmp_path)) == {1}
        disk.free.set()
        recorder.announce(wait=True)
        assert told == [EpochDone(1, 1, 9, {"loss/total": 1.0})]
    (state,) = checkpoint.latest(tmp_path)
    assert torch.equal(state["model"]["w"], torch.zeros(3)) and torch.equal(
        state["optimizer"]["state"][0], torch.zeros(3)
    )


def test_storage_that_hangs_holds_up_no_step(recorder, told, tmp_path, monkeypatch):
    free, fsync = threading.Event(), os.fsync

    def hanging(file):
        assert free.wait(timeout=20), "nobody went on while the journal was being written"
        fsync(file)

    monkeypatch.setattr(os, "fsync", hanging)
    with recorder:
        recorder.note(7.5)
        assert noted(recorder, tmp_path) == 7.5
        recorder.book(0, 64, 10.0, 0.0)
        finish(recorder, 0, torch.ones(1))
        recorder._noting.result(timeout=20)
        assert float((tmp_path / "trained_seconds").read_text()) == 10.0  # before the line of the epoch
        recorder.note(0.5)
        recorder.note(1.5)  # passed over, as the one before is not written yet
        recorder.announce()
        assert told == [] and checkpoint.found(tmp_path) == []
        free.set()
        recorder.announce(wait=True)
        assert [event.epoch for event in told] == [1] and set(journal.read(tmp_path)) == {1}
        assert noted(recorder, tmp_path) == 10.5


def test_a_note_that_cannot_be_written_ends_the_run_and_leaves_the_one_before(recorder, tmp_path):
    recorder.note(300.0)
    assert noted(recorder, tmp_path) == 300.0
    with pytest.raises(OSError, match="File too large"), full_disk(0), recorder:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            recorder.note(0.5)
    assert (tmp_path / "trained_seconds").read_text() == "300.0"


def test_a_note_that_could_not_be_written_is_raised_at_the_end_of_the_epoch(recorder, disk, tmp_path, monkeypatch):
    disk.free.set()
    replace, failed = os.replace, []

    def fails_once(source, target):
        if not failed:
            failed.append(target)
            raise OSError(errno.ENOSPC, "no space left")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_once)
    with pytest.raises(OSError, match="no space"), recorder:
        recorder.note(1.0)
        close(recorder, 0, recorder.book(0, 64, 10.0, 0.0))
    assert failed == [tmp_path / "trained_seconds"] and journal.read(tmp_path) == {}


def test_leaving_waits_for_the_last_checkpoint_and_two_are_kept(recorder, disk, told, tmp_path):
    disk.free.set()
    with recorder:
        for epoch in range(4):
            finish(recorder, epoch, torch.ones(1))
    assert [event.epoch for event in told] == [1, 2, 3, 4]
    assert sorted(path.name for path in tmp_path.glob("epoch_*")) == ["epoch_00003", "epoch_00004"]
    assert [state["epoch"] for state in checkpoint.latest(tmp_path)] == [4, 3]


def test_epochs_without_a_checkpoint_wait_for_no_disk_and_are_told_in_their_order(recorder, disk, told, tmp_path):
    with recorder:
        finish(recorder, 0, torch.ones(1))
        for epoch in (1, 2):
            close(recorder, epoch, {"loss/total": 1.0}, state=None)
        recorder._lines.submit(int).result(timeout=20)
        recorder.announce()
        assert told == [] and set(journal.read(tmp_path)) == {1, 2, 3}  # the first one's checkpoint is being written
        disk.free.set()
    assert [event.epoch for event in told] == [1, 2, 3]
    assert [state["epoch"] for state in checkpoint.latest(tmp_path)] == [1]


# A second each: with the next one and that at the end, 3 of 120, 4 of 160 and 5 of 200.
@pytest.mark.parametrize(("every", "epochs"), [(4, [4, 8, 12, 15, 16, 20]), ("auto", [12, 15, 16, 20])])
def test_as_often_saved_as_asked_for_or_as_takes_a_fortieth_of_the_time(recorder, every, epochs):
    recorder.save_every, recorder.keep_every = every, 15
    recorder.saving = recorder._latest = 1.0  # of a first one
    saved = []
    for epoch in range(20):
        recorder.book(epoch, 64, 10.0, 0.0)
        if recorder.due(epoch):
            saved.append(epoch + 1)
            recorder.saving += 0.0 if epoch == 14 else 1.0
    assert saved == epochs


@pytest.mark.parametrize("last", [True, False])
def test_a_checkpoint_that_cannot_be_written_ends_the_run(recorder, disk, told, tmp_path, last):
    disk.free.set()
    with pytest.raises(OSError, match="no space"), recorder:
        finish(recorder, 0, torch.ones(1))
        recorder.announce(wait=True)
        disk.error = OSError(errno.ENOSPC, "no space left")
        finish(recorder, 1, torch.ones(1))
        if not last:
            finish(recorder, 2, torch.ones(1))
            raise AssertionError("an epoch was finished after one that could not be saved")
    assert [event.epoch for event in told] == [1]
    assert set(journal.read(tmp_path)) == {1, 2}  # the epoch will be repeated, and find its point
    assert [state["epoch"] for state in checkpoint.latest(tmp_path)] == [1]


def test_what_ends_a_run_is_not_hidden_by_its_last_checkpoint(recorder, disk, told, tmp_path):
    threading.Timer(0.05, disk.free.set).start()
    with pytest.raises(KeyboardInterrupt), recorder:
        finish(recorder, 0, torch.ones(1))
        raise KeyboardInterrupt
    assert told == [] and len(checkpoint.found(tmp_path)) == 1


class Crashes:
    """A run of several starts, of which some are killed, and what it has really trained."""

    def __init__(self, folder):
        self.folder, self.trained, self.saved = (
            folder,
            0.0,
            [Cost()],
        )  # the cost after each epoch, as checkpoints have it
        self.start()

    def start(self):
        self.recorder = EpochRecorder(journal.Journal(self.folder), LocalRuntime(self.folder, torch.device("cpu")))
        self.recorder.resume(Cost(**vars(self.saved[-1])))

    def train(self, seconds, killed=""):
        """The next epoch; killed in the middle of it, or with its line in the journal and no checkpoint."""
        epoch, recorder = len(self.saved) - 1, self.recorder
        self.trained += seconds
        recorder.note(seconds)
        if killed != "midway":
            metrics = recorder.book(epoch, 64, seconds, 0.0)
            recorder._lines.submit(recorder._write, recorder.spent)
            recorder._lines.submit(recorder.journal.append, epoch + 1, metrics)
        recorder._lines.shutdown()
        recorder._lines = ThreadPoolExecutor(1)
        if killed:
            self.start()
        else:
            self.saved.append(Cost(**vars(recorder.cost)))

    @property
    def lost(self):
        """What it must have lost, and what it says."""
        return self.trained - self.saved[-1].train_seconds, self.saved[-1].lost_seconds


def test_an_epoch_killed_before_its_checkpoint_in_each_of_two_starts_is_lost_once(tmp_path):
    run = Crashes(tmp_path)
    for seconds, killed in ((51.0, "unsaved"), (55.0, ""), (57.0, "unsaved"), (58.0, "")):
        run.train(seconds, killed)
    assert run.lost == (113.0, 113.0)


def test_all_that_crashes_cost_is_lost_time_and_nothing_else(tmp_path):
    draw = random.Random(0)
    for schedule in range(25):
        run = Crashes(tmp_path / str(schedule))
        while len(run.saved) < 8:
            if (
                draw.random() < 0.1 and len(run.saved) > 1
            ):  # the newest checkpoint is damaged: its epoch is repeated too
                run.saved.pop()
                run.start()
            run.train(draw.uniform(1, 100), draw.choice(["", "", "midway", "unsaved"]))
        true, told = run.lost
        assert told == pytest.approx(true) and (told > 0) == (run.trained > run.saved[-1].train_seconds)


def test_a_run_that_nothing_cut_short_has_lost_nothing_however_often_it_was_stopped(tmp_path):
    run = Crashes(tmp_path)
    for seconds in (0.1, 0.2, 0.3, 0.7):
        run.train(seconds)
        run.start()
    assert run.saved[-1].lost_seconds == 0.0


def test_an_epoch_of_the_journal_was_trained_even_if_the_note_is_gone(tmp_path):
    run = Crashes(tmp_path)
    run.train(20.0, "unsaved")
    (tmp_path / "trained_seconds").unlink()
    run.start()
    run.train(15.0)
    assert run.lost == (15.0, 15.0)


# Epoch under way (0-based), its seconds, whether the journal had it already, and those of the epoch before if that was repeated.
@pytest.mark.parametrize(
    ("noted", "lost"), [("2 40.0 0 0.0", 40.0), ("3 7.0 0 5.0", 12.0), ("1 9.0 0 0.0", 0.0), ("torn", 0.0)]
)
def test_what_an_earlier_version_had_noted_is_lost_once(recorder, tmp_path, noted, lost):
    (tmp_path / "unfinished").write_text(noted)
    for _ in range(2):
        again = restarted(recorder, {"epochs": 2, "train_seconds": 20.0})
        again._spent_file.write_text(str(again.spent))
        assert again.spent == 20.0 + lost


@pytest.mark.parametrize("left", ["", "none", "3.0"])
def test_what_a_checkpoint_knows_to_be_lost_stays_lost_where_the_note_is_gone_or_old(recorder, tmp_path, left):
    if left:
        (tmp_path / "trained_seconds").write_text(left)
    again = restarted(recorder, {"epochs": 2, "train_seconds": 20.0, "lost_seconds": 5.0})
    assert again.spent == 25.0
    assert again.book(2, 64, 10.0, 0.0)["cost/lost_seconds"] == 5.0


def test_an_epoch_that_went_on_from_a_state_within_it_was_trained_once(recorder, tmp_path):
    (tmp_path / "trained_seconds").write_text("18.0")  # an epoch of 10, 7 up to the state, and 1 after it
    again = restarted(recorder, {"epochs": 1, "train_seconds": 10.0})
    found = again.book(1, 64, 12.0, 0.0, before=7.0)
    assert (found["cost/train_seconds"], found["cost/lost_seconds"]) == (22.0, 1.0)


def test_a_full_disk_is_an_error_of_the_system_and_is_told_where_something_else_ends_the_run(recorder, told, tmp_path):
    with full_disk(200_000), pytest.raises(OSError, match="File too large"), recorder:
        finish(recorder, 0, torch.ones(1_000_000))
    other = restarted(recorder)
    with full_disk(200_000), pytest.raises(KeyboardInterrupt), other:
        finish(other, 0, torch.ones(1_000_000))
        raise KeyboardInterrupt
    why = f"[Errno 27] File too large: '{tmp_path / 'epoch_00001.part'}'"
    assert told == [Note(f"the last checkpoint could not be written: {why}")]


def test_an_evaluation_is_not_written_without_its_training(recorder, disk, tmp_path, monkeypatch):
    disk.free.set()
    append = recorder.journal.append

    def full(epoch, metrics):
        if epoch == 2:
            raise OSError(errno.ENOSPC, "no space left")
        append(epoch, metrics)

    monkeypatch.setattr(recorder.journal, "append", full)
    with pytest.raises(OSError, match="no space"), recorder:
        close(recorder, 0, {"loss/total": 1.0}, {"knn/top1": 0.5})
        close(recorder, 1, {"loss/total": 1.0}, {"knn/top1": 0.6})
    assert journal.read(tmp_path) == {1: {"loss/total": 1.0, "knn/top1": 0.5}}
