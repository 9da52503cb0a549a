"""What goes to MLflow beside a run: a store that hangs holds up nothing, and nothing is written twice."""

import itertools
import threading
import time

import pytest

from rotssl.engine.events import EpochDone, Facts, Note
from rotssl.runs import journal
from rotssl.tracking import store as store_
from rotssl.tracking import writer
from rotssl.tracking.follower import Follower


def test_an_experiment_that_another_process_makes_meanwhile_is_taken():
    from mlflow.exceptions import MlflowException

    class Raced:
        made = None

        def get_experiment_by_name(self, name):
            return self.made

        def create_experiment(self, name, artifact_location):
            self.made = name
            raise MlflowException("it exists")

    assert writer._experiment(Raced(), "rotssl", None) == "rotssl"


def wait_until(holds, seconds=20):
    """Whether a condition holds within so many seconds."""
    ends = time.monotonic() + seconds
    while not holds() and time.monotonic() < ends:
        time.sleep(0.005)
    return bool(holds())


class Store:
    """A Tracker whose store answers when it is told to."""

    works, uri, run_id = True, "off", ""

    def __init__(self):
        self.answers, self.asked, self.seen, self.tags = threading.Event(), threading.Event(), [], {}

    def sync(self, points, tags):
        self.progress = tags["progress"]
        self.asked.set()
        assert self.answers.wait(timeout=20)
        self.seen.append(sorted(points))
        return self.works

    def tag(self, tags):
        self.tags |= tags


def test_a_store_that_hangs_holds_up_nothing_and_gets_the_rest_later(tmp_path):
    book, store = journal.Journal(tmp_path), Store()
    with Follower(store, tmp_path, 3) as follower:
        follower.handle(Facts({"device": "cpu"}))
        for epoch in (1, 2, 3):
            book.append(epoch, {"loss/total": 1.0})
            follower.handle(EpochDone(epoch, 1, 1, {}))
            assert store.asked.wait(timeout=20)
        assert store.seen == []
        store.answers.set()
    assert store.seen[0] == [1] and store.tags == {"device": "cpu"}
    with Follower(store, tmp_path, 3) as follower:
        follower.handle(EpochDone(3, 1, 1, {}))
        follower.handle(Note("going on"))
        assert wait_until(lambda: store.seen[-1] == [1, 2, 3])


def test_mlflow_hears_of_epochs_whose_events_are_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(Follower, "LOOK_S", 0.01)
    book, store = journal.Journal(tmp_path), Store()
    store.answers.set()
    with Follower(store, tmp_path, 3):
        for epoch in (1, 2):
            book.append(epoch, {"loss/total": 1.0})
            assert wait_until(lambda epoch=epoch: store.seen and store.seen[-1][-1] == epoch)
    assert store.seen == [[1], [1, 2]]  # what has not changed is not sent again
    assert store.progress == "2 of 3 epochs"
    store.works = False  # and what could not be sent is sent again, without an epoch that tells to
    monkeypatch.setattr("rotssl.tracking.follower.RETRY_S", 0.05)
    with Follower(store, tmp_path, 3):
        assert wait_until(lambda: len(store.seen) >= 5)
    (tmp_path / journal.Journal.NAME).unlink()
    (tmp_path / journal.Journal.NAME / "a folder in place of lines").mkdir(parents=True)
    with pytest.raises(IsADirectoryError), Follower(store, tmp_path, 3) as follower:
        assert wait_until(lambda: follower._error)


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


class Server:
    """A client of a server that may take a request and not answer."""

    def __init__(self, client):
        self.client, self.histories, self.hangs, self.asked = client, 0, False, []

    def __getattr__(self, name):
        self.asked.append(name)
        return getattr(self.client, name)

    def get_metric_history(self, *given):
        self.histories += 1
        return self.client.get_metric_history(*given)

    def log_batch(self, *given, **more):
        if self.hangs:
            self.late = given, more
            raise TimeoutError("no answer")
        self.client.log_batch(*given, **more)


@pytest.mark.contract
def test_what_a_server_that_hung_takes_later_is_there_once(tmp_path, monkeypatch):
    uri, points = f"sqlite:///{tmp_path / 'mlflow.db'}", {1: {"loss/total": 2.0, "knn/top1": 0.5}}
    run_id = writer.open_run(uri, "experiment", "run", None, {}, {}, tmp_path / "artifacts")
    server = Server(store_.client_of(uri))
    monkeypatch.setattr(writer, "client_of", lambda uri: server)
    tracker, clock = writer.Tracker(uri, run_id), itertools.count(1000)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    server.hangs = True
    assert not tracker.sync(points)
    server.hangs = False
    assert tracker.sync(points)
    given, more = server.late
    server.client.log_batch(*given, **more)  # only now
    for key in points[1]:
        assert len(server.client.get_metric_history(run_id, key)) == 1


@pytest.mark.contract
def test_the_end_of_a_run_asks_for_no_history_and_its_next_start_does(tmp_path, monkeypatch):
    uri, points = f"sqlite:///{tmp_path / 'mlflow.db'}", {1: {"loss/total": 2.0, "knn/top1": 0.5}}

    def start(known=None):
        return writer.open_run(uri, "experiment", "run", known, {}, {}, tmp_path / "artifacts")

    run_id = start()
    server = Server(store_.client_of(uri))
    monkeypatch.setattr(writer, "client_of", lambda uri, create=False: server)
    assert writer.Tracker(uri, run_id).sync(points)
    assert writer.Tracker(uri, run_id).sync(points | {2: points[1]})  # the one that closes it
    assert server.histories == 0
    server.asked.clear()
    writer.Tracker(uri, run_id).tag({"device": "cpu", "world_size": 2})  # one request for all of them
    assert server.asked == []  # but log_batch
    assert {"device": "cpu", "world_size": "2"}.items() <= server.client.get_run(run_id).data.tags.items()
    assert start(run_id) == run_id and writer.Tracker(uri, run_id).sync(points)
    assert server.histories == 2


def test_an_interrupted_run_is_ended_before_anything_slow(tmp_path):
    store, ended = Store(), []
    store.answers.set()
    store.finish = lambda *given: ended.append(given)
    for error, seen in ((ValueError, []), (KeyboardInterrupt, [("KILLED", "interrupted", [])])):
        with pytest.raises(error), Follower(store, tmp_path, 3):
            raise error
        assert ended == seen
