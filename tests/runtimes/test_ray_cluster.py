"""How many workers share a batch on a cluster."""

import logging
from types import SimpleNamespace

import pytest

from rotssl import config as cfg
from rotssl.config.fields import ConfigError
from rotssl.runtimes import ray_cluster


def node(cpus, gpus=0, alive=True):
    return {"Alive": alive, "Resources": {"CPU": float(cpus), **({"GPU": float(gpus)} if gpus else {}), "memory": 1e9}}


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 16),  # with 32, one rotated image in the end
        ({"rotation.fraction_end": None}, 32),
        ({"rotation.mode": "extra"}, 32),
        ({"train.batch_size": 48}, 8),  # of 12, each would be left with one of its four
    ],
)
def test_as_many_workers_as_can_share_the_batch(fields, count):
    config = cfg.resolve(cfg.build(fields), 28, 5000)
    workers = ray_cluster.plan_workers(config, {"CPU": 64, "GPU": 32}, [node(64, 32) | {"NodeManagerAddress": "a"}])
    assert workers.count == count
    # Those that stay idle are told of, with the field that keeps them so.
    assert bool(workers.why) == (count < 32) and (not workers.why or workers.why.split(":")[0] in cfg.schema())


def test_a_run_waits_for_the_nodes_of_a_cluster_that_still_grows(monkeypatch, caplog):
    now, asked = [0.0], []
    monkeypatch.setattr(ray_cluster.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ray_cluster, "_wake_autoscaler", asked.append)
    ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 1.0 * len(ray.here)}, nodes=lambda: ray.here)

    def sleep(seconds):
        now[0] += seconds
        if now[0] == 8 and growing:
            ray.here = [node(1) | {"NodeManagerAddress": host} for host in "ab"]

    monkeypatch.setattr(ray_cluster.time, "sleep", sleep)
    config = cfg.resolve(cfg.build({"scaling.num_workers": 2, "scaling.wait_minutes": 1}), 28, 5000)
    for growing in (True, False):
        now[0], ray.here = 0.0, [node(1) | {"NodeManagerAddress": "a"}]
        with caplog.at_level(logging.WARNING, "rotssl"):
            if growing:
                assert ray_cluster._wait_for_room(config, ray, 60, True).count == 2 and now == [8]
            else:
                with pytest.raises(ConfigError, match=r"got 2 with 1 CPU each, but the cluster has 1 CPUs"):
                    ray_cluster._wait_for_room(config, ray, 60, True)
                assert now[0] == 60
        assert asked == [config] * (1 if growing else 2) + [None]  # asked for every half minute, and taken back
        assert len(caplog.records) == 1 and "waiting for nodes (scaling.wait_minutes 1)" in caplog.text
        caplog.clear()
        asked.clear()
    with pytest.raises(ConfigError):  # a cluster of our own does not grow
        ray_cluster._wait_for_room(config, ray, 0, True)
    assert not asked and now[0] == 60
