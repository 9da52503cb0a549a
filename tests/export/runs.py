"""A finished run, with its store, for the tests of what is made of it."""

from rotssl import config as cfg
from rotssl import lifecycle
from rotssl.commands import pretrain
from tests.programs import SMALL, with_store


def finished(folder, **fields):
    """The resolved configuration of a small run of BYOL, which has a teacher, in this process."""
    fields = {
        **SMALL,
        "train.epochs": 1,
        "rotation.weight": 0.0,
        "evaluation.linear": False,
        "scaling.num_workers": 0,
        "storage.path": str(with_store(folder)),
        "tracking.run_name": "run",
        **fields,
    }
    config, _ = lifecycle.prepare(cfg.build(fields))
    assert pretrain.pretrain(config) == 0
    return config


def store_of(config):
    return f"sqlite:///{config.storage.path}/mlflow.db"
