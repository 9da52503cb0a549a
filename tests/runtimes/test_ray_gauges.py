"""What Prometheus sees of a run."""

import sys
from types import SimpleNamespace

import pytest

from rotssl.engine.events import EpochDone, Note, StepDone
from rotssl.runs.journal import Journal
from rotssl.runtimes import ray_gauges
from rotssl.runtimes.ray_gauges import MEANING, Gauges, gauged
from tests.small_runs import make_config

POINT = {"loss/total": 2.5, "throughput/images_per_second": 800.0, "cost/train_seconds": 30.0}


@pytest.fixture
def shown(monkeypatch):
    """Name -> (value, tags) of the gauges that were set."""
    found = {}

    class Gauge:
        def __init__(self, name, description, tag_keys):
            assert description
            self.name, self.keys = name, tag_keys

        def set_default_tags(self, tags):
            self.tags = tags

        def set(self, value):
            assert tuple(self.tags) == self.keys
            found[self.name] = value, self.tags

    monkeypatch.setattr("ray.util.metrics.Gauge", Gauge)
    return found


def test_an_epoch_sets_the_gauges_and_what_it_lacks_stays(tmp_path, shown):
    gauges = Gauges(make_config(tmp_path, "byol"))
    tags = {"experiment": "rotssl", "run": "run"}
    assert shown == {"rotssl_epochs": (4, tags), "rotssl_epoch": (0, tags)}
    gauges.handle(EpochDone(1, 10, 40, POINT | {"knn/top1": 0.5}))
    gauges.handle(EpochDone(2, 20, 40, POINT | {"cost/train_seconds": 50.0}))
    gauges.handle(Note("nothing of a number"))
    assert {name: value for name, (value, _) in shown.items()} == {
        "rotssl_epoch": 2,
        "rotssl_epochs": 4,
        "rotssl_seconds_left": 50.0,
        "rotssl_images_per_second": 800.0,
        "rotssl_loss": 2.5,
        "rotssl_knn_accuracy": 0.5,
    }
    assert set(shown) == set(MEANING)


def test_gauges_are_set_again_before_ray_forgets_them(tmp_path, shown, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(ray_gauges.time, "monotonic", lambda: now[0])
    gauges = Gauges(make_config(tmp_path, "byol"))
    gauges.handle(EpochDone(1, 10, 40, POINT))
    before = dict(shown)
    for now[0], expected in ((1.0, {}), (ray_gauges.REFRESH_S, before), (ray_gauges.REFRESH_S + 1, {})):
        shown.clear()
        gauges.handle(StepDone(2, 11, 40))
        assert shown == expected


def test_a_resumed_run_shows_where_it_is(tmp_path, shown):
    config = make_config(tmp_path, "byol")
    journal = Journal(config.run_dir)
    journal.append(1, POINT | {"knn/top1": 0.5})
    journal.append(2, POINT | {"cost/train_seconds": 60.0})
    Gauges(config)
    assert (shown["rotssl_epoch"][0], shown["rotssl_seconds_left"][0], shown["rotssl_knn_accuracy"][0]) == (2, 60, 0.5)


@pytest.mark.parametrize("ray", [None, False, True])
def test_only_a_process_that_is_connected_to_ray_has_gauges(tmp_path, shown, monkeypatch, ray):
    monkeypatch.setitem(sys.modules, "ray", None if ray is None else SimpleNamespace(is_initialized=lambda: ray))
    seen = []
    show = gauged(make_config(tmp_path, "byol"), seen.append)
    show(EpochDone(1, 10, 40, POINT))
    assert seen == [EpochDone(1, 10, 40, POINT)] and bool(shown) is bool(ray)
