"""System metrics in MLflow: samples arrive, a store that does not answer drops them, and a resumed run goes on rising."""

import threading
from types import SimpleNamespace

import pytest

from rotssl.engine.events import EpochDone, Usage
from rotssl.runs import journal
from rotssl.tracking import system, writer
from rotssl.tracking.follower import Follower
from rotssl.tracking.store import client_of
from rotssl.tracking.system import SystemMetrics
from rotssl.tracking.writer import Tracker
from tests.programs import with_store
from tests.tracking.test_writer import wait_until

CPU = "system/node_1/cpu_utilization_percentage"


class Client:
    """MLflow's client, which answers as it is told to."""

    def __init__(self):
        self.logged, self.asked, self.error = [], 0, None

    def get_run(self, run_id):
        self.asked += 1
        if self.error:
            raise self.error
        return SimpleNamespace(info=SimpleNamespace(start_time=900_000))

    def log_batch(self, run_id, metrics):
        self.asked += 1
        if self.error:
            raise self.error
        self.logged += [(metric.key, metric.step, metric.value) for metric in metrics]


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, from 100 after the run's first start on, as a list of one."""
    now = [0.0]
    monkeypatch.setattr(system.time, "time", lambda: 1000 + now[0])
    monkeypatch.setattr(system.time, "monotonic", lambda: 5000 + now[0])
    return now


@pytest.fixture
def client(monkeypatch):
    made = Client()
    monkeypatch.setattr(system, "client_of", lambda uri: made)
    return made


def test_the_step_is_the_second_of_the_run_and_each_second_is_logged_once(clock, client):
    first = SystemMetrics("http://store", "run")
    for clock[0] in (1, 11.2, 11.9, 21):
        first.add({CPU: clock[0], "system/node_0/cpu_utilization_percentage": 1.0})
    first.send()
    assert [(step, value) for key, step, value in client.logged if key == CPU] == [(101, 1), (111, 11.2), (121, 21)]
    asked = client.asked
    first.send()
    assert client.asked == asked, "nothing new"
    clock[0] = 500.0
    later = SystemMetrics("http://store", "run")  # of the next start
    later.add({CPU: 5.0})
    later.send()
    assert client.logged[-1] == (CPU, 600, 5.0)


def test_what_a_store_does_not_take_is_dropped_and_it_is_left_alone_for_a_while(clock, client):
    samples = SystemMetrics("http://store", "run")
    client.error = ConnectionError("refused")
    for clock[0] in (1, 2, 3):
        samples.add({CPU: clock[0]})
        samples.send()
    assert client.asked == 1, "each try may take as long as a store's patience"
    client.error = None
    clock[0] = 1 + system.REST_S
    samples.add({CPU: 9.0})
    samples.send()
    assert client.logged == [(CPU, 121, 9.0)]
    for clock[0] in range(1000, 1000 + 2 * system.KEPT):  # a store that hangs holds up the thread that sends
        samples.add({CPU: 0.0})
    samples.send()
    assert len(client.logged) == 1 + system.KEPT


def test_without_a_store_nothing_is_kept(clock, client):
    samples = SystemMetrics("off", "")
    samples.add({CPU: 1.0})
    samples.send()
    assert client.asked == 0 and not samples._samples


@pytest.mark.contract
def test_samples_reach_mlflow_beside_the_epochs_and_are_none_of_its_epochs(tmp_path, monkeypatch):
    monkeypatch.setattr(Follower, "LOOK_S", 0.02)
    uri = f"sqlite:///{with_store(tmp_path) / 'mlflow.db'}"
    opened = (uri, "experiment", "run", None, {}, {"run_dir": "there", "config_hash": "x"}, tmp_path / "artifacts")
    run_id = writer.open_run(*opened)
    book, store = journal.Journal(tmp_path), client_of(uri)

    def steps(key):
        return [point.step for point in store.get_metric_history(run_id, key)]

    with Follower(Tracker(uri, run_id), tmp_path, 2) as follower:
        follower.handle(Usage({CPU: 50.0}))
        assert wait_until(lambda: steps(CPU))
    assert writer.open_run(*opened) == run_id  # killed before its first epoch, and not taken for another one
    book.append(1, {"loss/total": 1.0, "cost/train_seconds": 1.0})
    tracker = Tracker(uri, run_id)
    with Follower(tracker, tmp_path, 2) as follower:
        follower.handle(EpochDone(1, 1, 2, {}))
        assert wait_until(lambda: steps("loss/total"))
        follower.handle(Usage({CPU: 60.0}))
        assert wait_until(lambda: steps(CPU)[-1] > steps(CPU)[0] or follower.handle(Usage({CPU: 70.0})))
    assert set(tracker._epochs()) == {"loss/total", "cost/train_seconds"}


def test_the_samples_of_a_run_that_is_over_at_once_are_logged(tmp_path, monkeypatch, client):
    monkeypatch.setattr(Follower, "LOOK_S", 20)
    with Follower(Tracker("http://store", "run"), tmp_path, 2) as follower:
        follower.handle(Usage({CPU: 50.0}))
    assert [(key, value) for key, _, value in client.logged] == [(CPU, 50.0)]


def test_a_store_that_takes_no_epoch_is_not_asked_to_take_samples(tmp_path, monkeypatch, client):
    monkeypatch.setattr(Follower, "LOOK_S", 0.01)
    asked = threading.Event()

    class Dead(Tracker):
        def sync(self, points, tags=None):
            asked.set()
            return False

    journal.Journal(tmp_path).append(1, {"loss/total": 1.0})
    with Follower(Dead("http://store", "run"), tmp_path, 2) as follower:
        follower.handle(Usage({CPU: 50.0}))
        assert asked.wait(20)
        follower.handle(Usage({CPU: 50.0}))
        assert wait_until(lambda: not follower._system._samples)
    assert client.asked == 0
