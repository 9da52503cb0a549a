"""How many workers share a batch on a cluster."""

import pytest

from rotssl import config as cfg
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
