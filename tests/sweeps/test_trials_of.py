"""Which trials a sweep stands for, and which of them are done."""

import pytest

from rotssl.commands.ablate import trials_of
from rotssl.runs import journal
from tests.config.sweeps import SMALL, names_in, reader


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    return reader(tmp_path, monkeypatch)


@pytest.fixture
def names(sweep):
    return names_in(sweep)


def test_what_only_the_data_show_to_be_equal_is_one_trial(names):
    assert len(names("grid: {data.image_size: [auto, 32], optim.lr: [0.1]}")) == 2


def test_trials_of_one_worker_run_without_ray_train_and_others_with(sweep):
    for flag, expected in (("auto", 0), ("0", 0), ("1", 0), ("2", 2)):
        (trial, *_) = trials_of(sweep(SMALL + "grid: {rotation.weight: [1]}", "--scaling.num_workers", flag))
        assert trial.config.scaling.num_workers == expected
        assert trial.config.tracking.experiment == "some" and trial.config.run_dir.name == trial.name


def test_a_stopped_trial_is_done_for_a_sweep_that_stops(sweep):
    (trial, *_) = trials_of(sweep(SMALL + "grid: {rotation.weight: [1]}"))
    journal.Journal(trial.config.run_dir).append(trial.config.train.epochs, {"loss/total": 1.0})
    for status, ends, prunes in (
        ("finished", True, True),
        ("pruned", False, True),
        ("failed", False, False),
        ("running", False, False),
        ("stopped", False, False),
    ):
        trial.state().write(status)
        assert (trial.is_done(False), trial.is_done(True)) == (ends, prunes)
