"""Finished runs, trained in this process, for the tests of what is made of them."""

import json
import shutil

from rotssl import config as cfg
from rotssl import lifecycle
from rotssl.commands import pretrain
from rotssl.config.recipes import dump
from tests.programs import SMALL, mlflow_client, with_store

FIELDS = {**SMALL, "scaling.num_workers": 0, "tracking.run_name": "run"}

SHORT = {"train.epochs": 1, "rotation.weight": 0.0, "evaluation.linear": False}  # where neither is needed


def prepared(folder, **fields):
    """The resolved configuration of a small run of BYOL, which has a teacher."""
    return lifecycle.prepare(cfg.build({**FIELDS, "storage.path": str(with_store(folder)), **fields}))[0]


def finished(folder, **fields):
    """That run, trained: its configuration."""
    config = prepared(folder, **fields)
    assert pretrain.pretrain(config) == 0
    return config


def copied(config, folder, off=False, **fields):
    """The configuration of a copy of a run in another folder, with a copy of its store, or as if MLflow had been off.

    MLflow has the artifacts where they were.
    """
    uri = "off" if off else f"sqlite:///{folder}/mlflow.db"
    made = cfg.replace(config, {"storage.path": str(folder), "tracking.uri": uri, **fields})
    shutil.copytree(config.run_dir, made.run_dir)
    (made.run_dir / "config.yaml").write_text(dump(made))
    file = made.run_dir / "run.json"
    record = json.loads(file.read_text()) | {"uri": uri}
    if off:
        record["run_id"] = None
    else:
        shutil.copy(f"{config.storage.path}/mlflow.db", folder)
        mlflow_client(uri).set_tag(record["run_id"], "run_dir", str(made.run_dir))
    file.write_text(json.dumps(record))
    return made


def store_of(config):
    return f"sqlite:///{config.storage.path}/mlflow.db"
