"""Workers that fail and nodes that go: when a run starts again, on how many workers, what it says, and when it ends."""

import os
import queue
import threading
from types import SimpleNamespace

import pytest

from rotssl.engine.events import Alert, EpochDone
from rotssl.runs.journal import Journal
from rotssl.runtimes import attempts, ray_train, watch
from rotssl.runtimes.ray_cluster import Workers
from rotssl.runtimes.watch import Failed, Joined
from tests.small_runs import make_config


def node(number, alive=True, cpus=1.0):
    return {"NodeID": str(number), "NodeManagerAddress": f"10.0.0.{number}", "Alive": alive, "Resources": {"CPU": cpus}}


class Cluster:
    """Ray and its Train with a script of what happens to each start of the workers, and a clock of its own."""

    def __init__(self, folder, monkeypatch, **fields):
        self.config = make_config(folder, "byol", **{"scaling.num_workers": 2, **fields})
        self.journal, self.epochs = Journal(self.config.run_dir), 0
        self.now, self.here, self.said, self.counts = 0.0, [node(1), node(2)], [], []
        self.events, self.handling, self.killed = queue.Queue(), False, threading.Event()
        context = SimpleNamespace(gcs_address="nowhere:1")
        ray = SimpleNamespace(
            kill=lambda _: self.killed.set(),
            get_runtime_context=lambda: context,
            is_initialized=lambda: False,
            nodes=lambda: list(self.here),
        )
        monkeypatch.setattr(ray_train, "import_ray", lambda: ray)
        monkeypatch.setattr(ray_train, "_queue", lambda _: self)
        monkeypatch.setattr(ray_train, "_trainer", self._trainer)
        monkeypatch.setattr(watch.Head, "gone", lambda _: "")
        monkeypatch.setattr(ray_train, "Attempts", self._attempts)
        monkeypatch.setattr(attempts.time, "monotonic", lambda: self.now)
        monkeypatch.setenv(attempts.START_TIMEOUT, "")

    def get(self, block, timeout):
        if self.handling:
            self.events.task_done()
        self.handling = False
        event = self.events.get(block, 0.01)
        self.handling = True
        return event

    def tell(self, event):
        """Send an event, and wait until the driver has handled it."""
        self.events.put(event)
        self.events.join()

    def _trainer(self, config, workers, data, queue, scratch):
        self.counts.append(workers.count)
        self.killed.clear()
        return SimpleNamespace(fit=self._train)

    def _train(self):
        """What happens in Ray Train, which starts workers again by itself until it is killed."""
        from ray.exceptions import ActorDiedError

        while True:  # a worker may die before it has joined
            result = self.script.pop(0)()
            if self.killed.is_set():
                raise ActorDiedError
            if result is not None:
                return result

    def _attempts(self, *given):
        self.starts = attempts.Attempts(*given)
        return self.starts

    def show(self, event):
        if isinstance(event, Alert):
            self.said.append(event.text)

    def fit(self, *script):
        self.script = list(script)
        return ray_train.fit(self.config, Workers(2, False, 2), self.show, data="images")

    # --- what may happen -------------------------------------------------------------------------------------------------------

    def die(self):
        self.tell(Failed("ValueError: a worker's own", "controller"))

    def die_after_an_epoch(self):
        self.epochs += 1
        self.journal.append(self.epochs, {"loss/total": 1.0})
        self.die()

    def lose_a_node(self):
        self.here = [node(1), node(2, alive=False)]
        self.die()

    def wait_in_vain(self):
        from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
        from ray.train.v2.api.exceptions import ControllerError

        self.now += float(os.environ[attempts.START_TIMEOUT])
        raise ControllerError(WorkerGroupStartupTimeoutError(2))

    def lose_the_controller(self):
        from ray.exceptions import ActorDiedError

        raise ActorDiedError

    def come_back_after_an_epoch(self):
        self.here = [node(1), node(3)]
        self.tell(Joined(0, "worker", "controller"))
        self.tell(EpochDone(1, 1, 1, {}, saved=False))
        assert not self.killed.is_set()  # the epoch would be lost
        self.tell(EpochDone(2, 1, 1, {}))
        assert self.killed.wait(20)

    def wait_for_an_epoch(self):
        self.tell(Joined(0, "worker", "controller"))
        self.tell(EpochDone(2, 1, 1, {}))
        assert not self.killed.is_set()

    def end(self):
        return SimpleNamespace(return_value={})


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    return lambda **fields: Cluster(tmp_path, monkeypatch, **fields)


def test_workers_that_fail_again_and_again_without_progress_end_the_run(cluster):
    made = cluster()
    assert made.fit(*[made.die] * 4) == "ValueError: a worker's own"
    assert made.said == ["ValueError: a worker's own; the workers start again from the last checkpoint"] * 3


def test_a_long_run_survives_any_number_of_failures_with_progress_between_them(cluster):
    made = cluster()
    assert made.fit(*[made.die_after_an_epoch, made.die] * 5, made.end) is None
    assert len(made.said) == 10 and made.counts == [2]  # Ray Train starts them again by itself


@pytest.mark.parametrize("minutes", [2, 30])
def test_nodes_are_waited_for_as_long_as_asked(cluster, minutes):
    made = cluster(**{"scaling.wait_minutes": minutes})
    reason = made.fit(made.lose_a_node, made.wait_in_vain)
    assert made.now == 60 * minutes and f"no 2 workers could start for {minutes} minutes" in reason
    assert made.said == ["node 10.0.0.2 of the cluster is gone; the workers start again from the last checkpoint"]


def test_an_elastic_run_goes_on_with_fewer_workers_until_the_others_are_back(cluster):
    made = cluster(**{"scaling.elastic": True, "scaling.wait_minutes": 30})
    assert made.fit(made.lose_a_node, made.wait_in_vain, made.come_back_after_an_epoch, made.end) is None
    assert made.counts == [2, 1, 2] and made.now == attempts.ELASTIC_S
    assert made.said[1:] == [
        "going on with 1 of 2 workers (scaling.elastic)",
        "the cluster has room for 2 workers again: they start from the last checkpoint",
    ]


def test_an_elastic_run_leaves_alone_what_others_use(cluster):
    made = cluster(**{"scaling.elastic": True, "scaling.wait_minutes": 10})
    again = made.come_back_after_an_epoch
    script = [made.lose_a_node, made.wait_in_vain, again, made.wait_in_vain, made.wait_for_an_epoch, made.end]
    assert made.fit(*script) is None
    assert made.counts == [2, 1, 2, 1]  # the node is back, but somebody else's: no other try for ten minutes


def test_an_elastic_run_gives_a_node_that_has_only_just_come_another_try(cluster):
    made = cluster(**{"scaling.elastic": True})

    def come_at_the_last_moment():
        made.here = [node(1)]
        made.starts.look()
        made.here = [node(1), node(2)]
        made.wait_in_vain()

    assert made.fit(come_at_the_last_moment, made.end) is None
    assert made.counts == [2, 2]


def test_workers_that_never_start_again_are_given_up(cluster):
    made = cluster(**{"scaling.hang_minutes": 0.5, "scaling.wait_minutes": 1})
    guard = watch.Watch(0.5, made.killed.set, lambda: True, print)
    guard.kill = lambda _: made.killed.set()
    guard.see(Joined(0, "worker", "controller"))
    guard.see(Failed("gone", "controller"))
    guard.expect(60)
    made.now = 89.0
    guard.check()
    assert not guard.gave_up
    made.now = 91.0
    guard.check()
    assert guard.gave_up and made.killed.is_set() and guard.reason.endswith("and no new workers start")


def test_what_is_waited_for_is_said_once(cluster):
    made = cluster()
    guard = watch.Watch(0, print, lambda: True, print)
    starts = attempts.Attempts(made.config, Workers(2, False, 2), lambda: made.here, guard, made.said.append)
    starts.start()
    starts.look()
    made.here = [node(1)]
    starts.look()
    assert made.said == []  # they may still be starting
    made.now = attempts.QUIET_S
    for _ in range(3):
        starts.look()
    assert made.said == ["waiting for room for 2 workers: the cluster has room for 1 (scaling.wait_minutes 10)"]
    made.here = []
    starts.look()
    assert made.said[1].startswith("waiting for room for 2 workers: the cluster has room for 0")
    guard.see(Joined(0, "worker", "controller"))
    made.now = 1000.0
    starts.look()
    assert len(made.said) == 2 and starts.waiting_since == 1000.0


def test_a_run_that_failed_by_hangs_says_so(cluster, monkeypatch):
    made = cluster()
    monkeypatch.setattr(watch.Watch, "to_blame", "no progress")
    assert made.fit(*[made.die] * 4) == "no progress"
    assert made.said == []  # the watch has said it


def test_a_controller_that_dies_is_a_failure_like_others(cluster):
    made = cluster()
    assert made.fit(made.lose_the_controller, made.die, made.end) is None
    assert made.counts == [2, 2] and len(made.said) == 2 and "ActorDiedError" in made.said[0]


def test_a_failure_is_told_in_words(monkeypatch):
    from ray.exceptions import ActorDiedError, ActorUnavailableError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    from rotssl.runtimes import ray_group
    from rotssl.runtimes.ray_group import Tell, cause

    told, here = [], SimpleNamespace(current_actor="controller")
    monkeypatch.setattr(ray_group.ray, "get_runtime_context", lambda: here)
    Tell(SimpleNamespace(actor=SimpleNamespace(put_nowait=SimpleNamespace(remote=told.append)))).after_exception(
        None, {0: RuntimeError("Connection closed by peer"), 1: ActorDiedError()}
    )
    assert told == [Failed("worker 1 has died", "controller")]
    assert cause({1: ActorUnavailableError("RpcError", None)}) == "worker 1 does not answer"
    asked = WorkerHealthCheckFailedError("The actor ...", ActorUnavailableError("RpcError", None))
    assert cause({0: RuntimeError("Connection reset"), 1: asked}) == "worker 1 does not answer"
    assert cause({2: ValueError("Traceback\n  File\nValueError: wrong")}) == "ValueError: wrong"
