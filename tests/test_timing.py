"""The time that runs would take, from a few timed steps."""

import tempfile
import time

import pytest

from rotssl import config as cfg
from rotssl import timing
from tests.test_jobs import SMALL


def resolved(**fields):
    return cfg.resolve(cfg.build({**SMALL, "data.limit": 512, "scaling.num_workers": 0, **fields}), 16, 512)


def test_runs_of_one_kind_cost_in_proportion_to_their_length():
    configs = [
        resolved(**{"train.epochs": epochs, "train.seed": seed, "optim.lr": lr, "rotation.weight": weight})
        for epochs, seed, lr, weight in ((2, 0, 0.1, 1.0), (6, 1, 1e9, 0.3), (4, 0, 0.1, 0.0))
    ]
    short, long, plain = timing.estimate(configs, [512] * 3, 1, False)
    assert long == pytest.approx(3 * short) and plain > 0
    assert timing._kind(configs[0]) == timing._kind(configs[1]) != timing._kind(configs[2])


def test_the_estimate_is_about_what_steps_take(monkeypatch):
    def slow(trainer, images, ctx):
        time.sleep(0.05)

    monkeypatch.setattr(timing.Trainer, "step", slow)
    monkeypatch.setattr(timing.Trainer, "evaluate", lambda trainer, epoch: time.sleep(0.1))
    training, evaluation = timing.seconds_per_epoch(resolved(**{"train.batch_size": 32}), 512, 1, False)
    assert 16 * 0.05 <= training < 16 * 0.1
    # 5 steps of 32 images and 256 of validation were measured, 512 and 256 are to be.
    assert 0.1 * 768 / 416 <= evaluation < 0.3 * 768 / 416
    assert timing.seconds_per_epoch(resolved(**{"evaluation.knn_every": 0}), 512, 1, False)[1] == 0
    half, _ = timing.seconds_per_epoch(resolved(**{"train.batch_size": 64}), 512, 2, False)
    assert 8 * 0.05 <= half < 8 * 0.1  # two workers share each batch


def test_nothing_is_left_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    timing.estimate([resolved(**{"storage.path": str(tmp_path / "results")})], [512], 1, False)
    assert list(tmp_path.iterdir()) == []
