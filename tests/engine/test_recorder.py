"""The end of an epoch: journal, checkpoint and announcement, and MLflow beside it; what is slow must not hold up what trains."""

import errno
import os
import threading
import time

import pytest
import torch

from rotssl.engine.recorder import EpochRecorder
from rotssl.engine.runtime import LocalRuntime
from rotssl.runs import checkpoint, journal
from rotssl.tracking import store as store_
from rotssl.tracking import writer
from rotssl.tracking.writer import Follower
from tests.runs import full_disk


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
def ledger(tmp_path, told):
    return EpochRecorder(journal.Journal(tmp_path), LocalRuntime(tmp_path, torch.device("cpu"), told.append))


def restarted(ledger, seconds=0.0):
    """As the next start has it, whose checkpoint has so many lost seconds."""
    again = EpochRecorder(journal.Journal(ledger.journal.folder), ledger.runtime)
    again.cost.lost_seconds = seconds
    return again


def written(ledger, folder):
    """The note, once it is on disk."""
    ledger._lines.submit(int).result(timeout=20)
    return (folder / "unfinished").read_text()


def finish(ledger, epoch, weights):
    state = {"model": {"w": weights}, "optimizer": {"state": [weights]}, "epoch": epoch + 1}
    ledger.keep(epoch, {"loss/total": 1.0}, state)
    ledger.finish(epoch, {"loss/total": 1.0}, {"step": epoch + 1}, {})


def close(ledger, epoch, metrics, found=None):
    ledger.keep(epoch, metrics, {})
    ledger.finish(epoch, metrics, {}, found or {})


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(ledger, disk, told, tmp_path):
    weights = torch.zeros(3)
    with ledger:
        finish(ledger, 0, weights)  # the disk is not free yet
        weights += 1  # a step of the next epoch
        ledger.announce()
        assert disk.asked.wait(timeout=20)
        assert told == [] and checkpoint.found(tmp_path) == [] and set(journal.read(tmp_path)) == {1}
        disk.free.set()
        ledger.announce(wait=True)
        assert told == [{"epoch": 0, "step": 1, "metrics": {"loss/total": 1.0}}]
    (state,) = checkpoint.latest(tmp_path)
    assert torch.equal(state["model"]["w"], torch.zeros(3)) and torch.equal(
        state["optimizer"]["state"][0], torch.zeros(3)
    )


def test_storage_that_hangs_holds_up_no_step(ledger, told, tmp_path, monkeypatch):
    free, fsync = threading.Event(), os.fsync

    def hanging(file):
        assert free.wait(timeout=20), "nobody went on while the journal was being written"
        fsync(file)

    monkeypatch.setattr(os, "fsync", hanging)
    with ledger:
        ledger.note(0, 7.5)
        assert written(ledger, tmp_path) == "0 7.5 0 0.0"
        finish(ledger, 0, torch.ones(1))
        ledger.note(1, 0.5)
        ledger.note(1, 1.5)  # passed over, as the one before is not written yet
        ledger.announce()
        assert (
            told == [] and checkpoint.found(tmp_path) == [] and (tmp_path / "unfinished").read_text() == "0 7.5 0 0.0"
        )
        free.set()
        ledger.announce(wait=True)
        assert [event["epoch"] for event in told] == [0] and set(journal.read(tmp_path)) == {1}
        assert written(ledger, tmp_path) == "1 0.5 0 0.0"
    assert not (tmp_path / "unfinished").exists()


def test_a_note_that_cannot_be_written_ends_the_run_and_leaves_the_one_before(ledger, tmp_path):
    ledger.note(0, 300.0)
    assert written(ledger, tmp_path) == "0 300.0 0 0.0"
    with pytest.raises(OSError, match="File too large"), full_disk(0), ledger:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            ledger.note(0, 0.5)
    assert (tmp_path / "unfinished").read_text() == "0 300.0 0 0.0"


def test_leaving_waits_for_the_last_checkpoint_and_two_are_kept(ledger, disk, told, tmp_path):
    disk.free.set()
    with ledger:
        for epoch in range(4):
            finish(ledger, epoch, torch.ones(1))
    assert [event["epoch"] for event in told] == [0, 1, 2, 3]
    assert sorted(path.name for path in tmp_path.glob("epoch_*")) == ["epoch_00003", "epoch_00004"]
    assert [state["epoch"] for state in checkpoint.latest(tmp_path)] == [4, 3]


@pytest.mark.parametrize("last", [True, False])
def test_a_checkpoint_that_cannot_be_written_ends_the_run(ledger, disk, told, tmp_path, last):
    disk.free.set()
    with pytest.raises(OSError, match="no space"), ledger:
        finish(ledger, 0, torch.ones(1))
        ledger.announce(wait=True)
        disk.error = OSError(errno.ENOSPC, "no space left")
        finish(ledger, 1, torch.ones(1))
        if not last:
            finish(ledger, 2, torch.ones(1))
            raise AssertionError("an epoch was finished after one that could not be saved")
    assert [event["epoch"] for event in told] == [0]
    assert set(journal.read(tmp_path)) == {1, 2}  # the epoch will be repeated, and find its point
    assert [state["epoch"] for state in checkpoint.latest(tmp_path)] == [1]


def test_what_ends_a_run_is_not_hidden_by_its_last_checkpoint(ledger, disk, told, tmp_path):
    threading.Timer(0.05, disk.free.set).start()
    with pytest.raises(KeyboardInterrupt), ledger:
        finish(ledger, 0, torch.ones(1))
        raise KeyboardInterrupt
    assert told == [] and len(checkpoint.found(tmp_path)) == 1


@pytest.mark.parametrize(("cut", "lost"), [(1, 0.0), (2, 7.5), (3, 7.5)])
def test_lost_time_counts_in_the_epoch_after_one_that_was_not_saved_too(ledger, tmp_path, cut, lost):
    ledger.note(cut, 7.5)
    assert written(ledger, tmp_path) == f"{cut} 7.5 0 0.0"
    for _ in range(2):  # the first one was killed before it noted anything
        ledger = restarted(ledger)
        ledger.count_lost(2)
        assert ledger.cost.lost_seconds == lost


def test_all_crashes_in_an_epoch_count(ledger, tmp_path):
    for lost in (100.0, 200.0):
        ledger.note(1, 100.0)
        written(ledger, tmp_path)
        ledger = restarted(ledger)
        ledger.count_lost(1)
        assert ledger.cost.lost_seconds == lost
    with ledger:
        found = ledger.book(1, 64, 30.0, 0.0)
        assert (found["cost/lost_seconds"], found["cost/train_seconds"]) == (200.0, 30.0)
        close(ledger, 1, found)
        ledger.note(2, 1.0)
        assert written(ledger, tmp_path) == "2 1.0 0 0.0"


def test_an_epoch_that_is_repeated_is_lost_once_and_what_is_cut_short_in_it_too(ledger, disk, tmp_path):
    # Killed before the checkpoint of an epoch that the journal has, and again in the middle of repeating it.
    with pytest.raises(KeyboardInterrupt), ledger:
        ledger.note(0, 49.0)
        close(ledger, 0, ledger.book(0, 64, 50.0, 0.0))
        disk.free.set()
        raise KeyboardInterrupt
    second = restarted(ledger)
    second.count_lost(0)
    assert second.cost.lost_seconds == 0  # the note is of an epoch that has its point
    second.note(0, 20.0)
    assert written(second, tmp_path) == "0 20.0 1 0.0"
    third = restarted(ledger)
    third.count_lost(0)
    with third:
        found = third.book(0, 64, 51.0, 0.0)
        assert (found["cost/lost_seconds"], found["cost/train_seconds"]) == (71.0, 50.0)
        disk.free.clear()
        close(third, 0, found)
        third.note(1, 3.0)  # whose predecessor is not saved yet
        assert written(third, tmp_path) == "1 3.0 0 71.0"
        disk.free.set()
        for epoch, lost in ((0, 74.0), (1, 3.0)):  # as what is lost begins at the last checkpoint
            again = restarted(ledger)
            again.count_lost(epoch)
            assert again.cost.lost_seconds == lost
        assert third.book(1, 64, 50.0, 0.0)["cost/lost_seconds"] == 71.0
    # Two epochs to repeat, as both checkpoints were damaged: the points of neither know what the repeats cost.
    book = journal.Journal(tmp_path / "two")
    for epoch, lost in ((1, 5.0), (2, 5.0), (3, 10.0)):
        book.append(epoch, {f"cost/{key}": 0.0 for key in vars(ledger.cost)} | {"cost/lost_seconds": lost})
    fourth = EpochRecorder(book, ledger.runtime)
    fourth.cost.lost_seconds = 5.0
    assert [fourth.book(epoch, 64, 50.0, 0.0)["cost/lost_seconds"] for epoch in (1, 2, 3)] == [55.0, 110.0, 110.0]


def test_a_full_disk_is_an_error_of_the_system_and_is_told_where_something_else_ends_the_run(ledger, told, tmp_path):
    with full_disk(200_000), pytest.raises(OSError, match="File too large"), ledger:
        finish(ledger, 0, torch.ones(1_000_000))
    other = restarted(ledger)
    with full_disk(200_000), pytest.raises(KeyboardInterrupt), other:
        finish(other, 0, torch.ones(1_000_000))
        raise KeyboardInterrupt
    why = f"[Errno 27] File too large: '{tmp_path / 'epoch_00001.part'}'"
    assert [event.get("note") for event in told] == [f"the last checkpoint could not be written: {why}"]


class Store:
    """A Tracker whose store answers when it is told to."""

    def __init__(self):
        self.answers, self.asked, self.seen, self.tags = threading.Event(), threading.Event(), [], {}

    def sync(self, points):
        self.asked.set()
        assert self.answers.wait(timeout=20)
        self.seen.append(sorted(points))
        return True

    def tag(self, tags):
        self.tags |= tags


def test_a_store_that_hangs_holds_up_nothing_and_gets_the_rest_later(tmp_path):
    book, store = journal.Journal(tmp_path), Store()
    with Follower(store, tmp_path) as follower:
        follower.handle({"facts": {"device": "cpu"}})
        for epoch in (1, 2, 3):
            book.append(epoch, {"loss/total": 1.0})
            follower.handle({"epoch": epoch - 1, "metrics": {}})
            assert store.asked.wait(timeout=20)
        assert store.seen == []
        store.answers.set()
    assert store.seen == [[1]] and store.tags == {"device": "cpu"}  # what came meanwhile waits for the next epoch
    with Follower(store, tmp_path) as follower:
        follower.handle({"epoch": 2, "metrics": {}})
        follower.handle({"note": "going on"})
    assert store.seen == [[1], [1, 2, 3]]


def test_an_evaluation_is_not_written_without_its_training(ledger, disk, tmp_path, monkeypatch):
    disk.free.set()
    append = ledger.journal.append

    def full(epoch, metrics):
        if epoch == 2:
            raise OSError(errno.ENOSPC, "no space left")
        append(epoch, metrics)

    monkeypatch.setattr(ledger.journal, "append", full)
    with pytest.raises(OSError, match="no space"), ledger:
        close(ledger, 0, {"loss/total": 1.0}, {"knn/top1": 0.5})
        close(ledger, 1, {"loss/total": 1.0}, {"knn/top1": 0.6})
    assert journal.read(tmp_path) == {1: {"loss/total": 1.0, "knn/top1": 0.5}}


@pytest.mark.contract
def test_what_is_measured_later_reaches_mlflow_and_nothing_twice(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run_id = writer.open_run(uri, "experiment", "run", None, {}, {}, tmp_path / "artifacts")
    trained = {"cost/epochs": 1.0, "loss/total": 2.0}
    assert writer.Tracker(uri, run_id).sync({1: trained})
    points = {1: trained | {"knn/top1": 0.5}, 2: {"cost/epochs": 2.0, "loss/total": 1.0, "knn/top1": 0.6}}
    later = writer.Tracker(uri, run_id)  # of the next start
    assert later.sync({1: points[1]}) and later.sync(points) and writer.Tracker(uri, run_id).sync(points)
    client = store_.client_of(uri)
    for key in points[2]:
        history = [(point.step, point.value) for point in client.get_metric_history(run_id, key)]
        assert sorted(history) == [(1, points[1][key]), (2, points[2][key])], key
