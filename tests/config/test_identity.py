"""What makes two runs the same one, and how runs are named."""

import dataclasses

import pytest
import yaml

from rotssl import config as cfg
from rotssl.config.cli import parse
from rotssl.config.tasks import TASKS
from tests.config.command_lines import recipe
from tests.config.sweeps import names_in, reader


@pytest.fixture
def names(tmp_path, monkeypatch):
    return names_in(reader(tmp_path, monkeypatch))


SAME_RUN = ["scaling.num_workers=0", "tracking.run_name=x", "storage.path=/x", "train.stop_after=3"]
OTHER_RUN = ["train.seed=1", "rotation.weight=0", "data.limit=999", "method.momentum=0.9", "model.norm=batch"]


@pytest.mark.parametrize("given", SAME_RUN + OTHER_RUN)
def test_the_identity_is_what_is_computed_and_nothing_else(given):
    same = given in SAME_RUN
    key, value = given.split("=")
    before, after = (cfg.resolve(cfg.build(given), 28, 5000) for given in ({}, {key: value}))
    assert (cfg.fingerprint(before) == cfg.fingerprint(after)) is same
    assert (key in cfg.identity_of(before)) is not same


@pytest.mark.parametrize("given", ["views.size_start=16", "views.split=2", "rotation.head_on=projector"])
def test_a_field_that_came_later_is_in_the_identity_of_runs_that_use_it_only(given):
    key, value = given.split("=")
    before, after = (cfg.identity_of(cfg.resolve(cfg.build(given), 28, 5000)) for given in ({}, {key: value}))
    assert set(after) - set(before) == {key}


def test_names_of_runs_are_those_of_before():
    # Another hash would start every run and sweep anew that has no name of its own; only a change of what is computed may.
    then = {"optim.lr": 0.24, "method.momentum": 0.99, "method.momentum_end": 1.0}  # the defaults of BYOL at that time
    assert cfg.fingerprint(cfg.resolve(cfg.build(then), 28, 5000)) == "4d43d1e4"
    assert cfg.fingerprint(cfg.resolve(cfg.build({}), 28, 5000)) == "eb9933f9"


@pytest.mark.parametrize("given", ["", "method.name=simclr optim.lr=1e-5 views.blur=1,0.1", "tracking.run_name=12"])
def test_a_printed_config_read_again_is_the_same_run(tmp_path, given):
    config = cfg.resolve(cfg.build(dict(word.split("=") for word in given.split())), 28, 5000)
    again = parse(["--config", recipe(tmp_path, yaml.safe_dump(cfg.to_dict(config), sort_keys=False))]).config
    assert cfg.flat(again) == cfg.flat(config) and cfg.resolve(again, 28, 5000) == config
    assert cfg.resolve(again, 28, 5000) == config
    assert cfg.fingerprint(again) == cfg.fingerprint(config)


def test_a_trial_is_its_resolved_configuration(names):
    grid = "grid: {rotation.weight: [0, %s], train.epochs: [2, %s]}"
    old, wide = set(names(grid % ("1", "4"))), set(names(grid % ("1, 3", "4, 6")))
    assert (len(old), len(wide)) == (4, 9) and old < wide
    for flags in (
        ["--scaling.num_workers", "2"],
        ["--scaling.cpus_per_worker", "3", "--scaling.use_gpu", "true"],
        ["--tracking.experiment", "other", "--tracking.uri", "http://127.0.0.1:9"],
        ["--storage.path", "elsewhere"],
        ["--sweep.name", "other", "--sweep.scheduler", "asha", "--sweep.concurrency", "1"],
        ["--data.image_size", "32", "--encoder.stem", "imagenet"],  # what auto stands for
        ["--evaluation.linear", "false", "--train.accumulate", "2"],  # not what is computed
    ):
        assert set(names(grid % ("1", "4"), *flags)) == old, flags
    for flags in (["--optim.lr", "0.3"], ["--train.seed", "1"], ["--data.limit", "512"], ["--model.norm", "batch"]):
        assert not set(names(grid % ("1", "4"), *flags)) & old, flags


def test_a_name_says_what_matters_most(names):
    found = names("grid: {rotation.weight: [0.3], train.epochs: [2, 4], jigsaw.weight: [2]}")
    assert [name.rsplit("-", 1)[0] for name in found] == [
        "byol-rotation0-2ep-seed0",
        "byol-rotation0.3-jigsaw2-2ep-seed0",
        "byol-rotation0-4ep-seed0",
        "byol-rotation0.3-jigsaw2-4ep-seed0",
    ]


def test_a_task_that_came_later_leaves_the_identity_of_runs_without_it_alone(monkeypatch):
    config = cfg.resolve(cfg.build({"rotation.weight": 1.0}), 28, 5000)
    assert "rotation.crop_scale" in cfg.identity_of(config)
    monkeypatch.setitem(TASKS, "rotation", dataclasses.replace(TASKS["rotation"], later=True))
    kept = {key for key in cfg.identity_of(config) if key.startswith("rotation.")}
    assert kept == {
        "rotation.fraction",
        "rotation.fraction_end",
        "rotation.crop_size",
    }  # resolved; the others have their defaults, pairs of numbers too
