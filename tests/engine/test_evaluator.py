"""What an evaluation leaves, and what it may cost if it fails or ends the process."""

import dataclasses
import importlib
import itertools
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rotssl.base import distributed
from rotssl.commands import pretrain
from rotssl.data import datasets
from rotssl.engine import evaluator
from rotssl.engine.events import EpochDone
from rotssl.models.encoders import read_encoder
from rotssl.runs import checkpoint, journal
from rotssl.runs.state import RunState
from tests.small_runs import make_config, trainer

pytestmark = pytest.mark.contract
SHORT = {"data.limit": 64, "train.epochs": 3}


class Killed(BaseException):
    """What no handler of errors gets to see, as with SIGKILL."""


PLACES = {
    "encoding": "rotssl.engine.evaluator.encode_share",
    "knn": "rotssl.evaluation.measure.knn_hits",
    "probe": "rotssl.evaluation.measure.linear_hits",
}


def out_of_memory(*args, **options):
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")


@pytest.mark.parametrize("where", PLACES)
def test_an_evaluation_that_fails_costs_a_warning(tmp_path, monkeypatch, caplog, where):
    monkeypatch.setattr(PLACES[where], out_of_memory)
    run = trainer(make_config(tmp_path, "simclr", **SHORT))
    run.run()
    points = journal.read(run.config.run_dir)
    assert list(points) == [1, 2, 3] and all(point["cost/epochs"] == epoch for epoch, point in points.items())
    whole = {"knn/top1", "linear/top1", "feature/effective_rank"}
    missing = {"encoding": whole, "knn": {"knn/top1"}}
    for name in ("knn/top1", "linear/top1", "feature/effective_rank"):
        assert (name not in points[3]) == (name in missing.get(where, {"linear/top1"})), name
    assert len(caplog.records) == {"encoding": 3, "knn": 3, "probe": 1}[where]
    assert all("OutOfMemoryError: CUDA out of memory." in record.message for record in caplog.records)
    assert next(checkpoint.latest(run.config.run_dir))["epoch"] == 3 and (tmp_path / "rotssl/run/encoder.json").exists()


@pytest.mark.parametrize(
    ("saving", "epochs"),
    [(0.0, [1, 12, 16, 20, 24, 25]), (0.05, [1, 15, 20, 25])],  # with the last one: 3 seconds of 60; 1% of each epoch
)
def test_kNN_as_often_as_it_takes_with_checkpoints_a_twentieth_of_the_time(tmp_path, monkeypatch, saving, epochs):
    clock = itertools.count()  # an evaluation looks at it twice, so it takes a second
    monkeypatch.setattr(evaluator, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    config = make_config(tmp_path, "simclr", **{"data.limit": 64, "train.epochs": 25, "evaluation.knn_every": "auto"})
    run, seen = trainer(config), []
    for epoch in range(25):
        if run.evaluator.due(epoch, seconds=5.0, saving=saving * (epoch + 1)):
            assert "knn/top1" in run.evaluate(epoch)
            seen.append(epoch + 1)
    assert seen == epochs  # the last one in any case


def due(overrides):
    """After which of five epochs kNN is due on a worker, for which an epoch takes a hundred times as long if it is the second."""
    found = trainer(make_config(**overrides)).evaluator
    found.spent = 1.0
    return [found.due(epoch, 5.0 * 100 ** distributed.rank()) for epoch in range(5)]


def test_the_first_worker_decides_when_kNN_is_due(tmp_path, pool):
    overrides = {"folder": tmp_path, "method": "simclr", "data.limit": 64, "train.epochs": 6}
    assert pool.run(due, overrides | {"evaluation.knn_every": "auto"}) == [[False] * 3 + [True] * 2] * 2


@pytest.mark.parametrize("holdout", [0.1, 0.0], ids=["validation", "test"])
def test_the_last_evaluation_leaves_its_hits(tmp_path, holdout):
    config = make_config(tmp_path, "simclr", **SHORT, **{"evaluation.holdout": holdout, "train.stop_after": 2})
    splits = datasets.load(config.data, 0.1)
    if not holdout:
        splits = dataclasses.replace(splits, validation=None, test=splits.validation)
    for stop in (2, None):
        train = dataclasses.replace(config.train, stop_after=stop)
        run = trainer(dataclasses.replace(config, train=train), splits)
        run.run()
        assert (config.run_dir / "hits.npz").exists() == (stop is None)
    last = journal.read(config.run_dir)[3]
    with np.load(config.run_dir / "hits.npz") as hits:
        assert {name: (hits[name].dtype, hits[name].shape) for name in hits} == dict.fromkeys(
            ("knn", "linear"), (np.dtype(bool), (len(run.evaluator.queries),))
        )
        for name in hits:
            assert np.mean(hits[name]) == pytest.approx(last[f"{run.evaluator.prefix}{name}/top1"], abs=1e-12)
    assert not list(config.run_dir.glob("*.part"))


def test_hits_that_cannot_be_written_cost_a_warning(tmp_path, caplog):
    run = trainer(make_config(tmp_path, "simclr", **SHORT))
    (run.config.run_dir / "hits.npz.part").mkdir()
    run.run()
    assert {"knn/top1", "linear/top1"} < journal.read(run.config.run_dir)[3].keys()
    assert [record.message.split(" (")[0] for record in caplog.records] == ["hits.npz could not be written"]
    assert not (run.config.run_dir / "hits.npz").exists()


def test_what_could_not_be_measured_at_the_end_is_said_and_made_up_for(tmp_path, monkeypatch, capsys):
    config = make_config(tmp_path, "simclr", **SHORT, **{"scaling.num_workers": 0, "tracking.uri": "off"})
    with monkeypatch.context() as patch:
        patch.setattr(PLACES["probe"], out_of_memory)
        assert pretrain.pretrain(config) == 0
    record = RunState.of(config)
    assert (record.status, record.missing, record.is_done) == ("finished", ["linear/top1"], False)
    assert record.reason == "completed, but linear/top1 could not be measured; the same command tries again"
    assert pretrain.pretrain(config) == 0 and "is already finished" not in capsys.readouterr().out
    record, points = RunState.of(config), journal.read(config.run_dir)
    assert (record.is_done, record.reason, list(points)) == (True, "completed", [1, 2, 3])
    assert 0 <= points[3]["linear/top1"] <= 1
    assert pretrain.pretrain(config) == 0 and "is already finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("precision", "split", "kinds"),
    [
        ("fp32", "validation", (torch.float32, torch.float32)),
        ("bf16", "validation", (torch.bfloat16, torch.bfloat16)),
        ("bf16", "test", (torch.bfloat16, torch.float32)),
    ],
)
def test_validation_is_encoded_in_bf16_if_the_run_trains_in_it_and_test_never(tmp_path, precision, split, kinds):
    config = make_config(tmp_path, "simclr", **SHORT | {"train.epochs": 1, "train.precision": precision})
    whole = datasets.load(config.data, 0.1)
    run = trainer(config, dataclasses.replace(whole, **{"validation": None, split: whole.validation}))
    first, seen = next(m for m in run.model.encoder.modules() if isinstance(m, torch.nn.Conv2d)), set()
    first.register_forward_hook(lambda module, inputs, out: seen.add((module.training, out.dtype)))
    run.run()
    assert seen == {(True, kinds[0]), (False, kinds[1])}
    assert run.facts()["evaluation_precision"] == {torch.float32: "fp32", torch.bfloat16: "bf16"}[kinds[1]]


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_the_network_that_is_asked_for_is_evaluated_and_exported(tmp_path, network):
    config = make_config(tmp_path, "byol", **SHORT | {"train.epochs": 1, "evaluation.network": network})
    run = trainer(config)
    both, seen = {"student": run.model.encoder, "teacher": run.model.teacher[0]}, set()
    for name, encoder in both.items():
        encoder.register_forward_hook(lambda module, *_, name=name: seen.add((name, module.training)))
    run.run()
    assert {name for name, training in seen if not training} == {network}
    exported = read_encoder(config.run_dir)[0].state_dict()
    for name, encoder in both.items():
        same = all(torch.equal(exported[key], value) for key, value in encoder.state_dict().items() if key in exported)
        assert same == (name == network), name


@pytest.mark.parametrize("where", PLACES)
def test_where_one_worker_cannot_measure_its_share_all_leave_it(tmp_path, pool, where):
    missing = {"encoding": {"knn/top1", "linear/top1"}, "knn": {"knn/top1"}, "probe": {"linear/top1"}}[where]
    for points in pool.run(run_with_one_that_fails, {"folder": tmp_path, "method": "simclr", **SHORT}, PLACES[where]):
        assert list(points) == [1, 2, 3]
        assert {"knn/top1", "linear/top1"} - points[3].keys() == missing


def run_with_one_that_fails(overrides, where):
    module, name = where.rsplit(".", 1)
    real, rank = getattr(importlib.import_module(module), name), distributed.rank()

    def fails(*args, **options):
        if rank == 1:
            raise MemoryError("none left")
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, fails)
        run = trainer(make_config(**overrides))
        run.run()
    return journal.read(run.config.run_dir)


@pytest.mark.parametrize("epoch", [1, 3])
def test_an_epoch_whose_evaluation_kills_the_process_is_kept_and_measured_by_the_next_start(
    tmp_path, monkeypatch, epoch
):
    whole = trainer(make_config(tmp_path / "whole", "byol", **SHORT))
    whole.run()
    config, calls = make_config(tmp_path / "killed", "byol", **SHORT), []

    def kills(*args):
        calls.append(args)
        if len(calls) == epoch:
            raise Killed

    real = evaluator.Evaluator.evaluate
    monkeypatch.setattr(evaluator.Evaluator, "evaluate", lambda *args: kills(*args) or real(*args))
    with pytest.raises(Killed):
        trainer(config).run()
    before = journal.read(config.run_dir)
    assert list(before)[-1] == epoch and "knn/top1" not in before[epoch]
    assert next(checkpoint.latest(config.run_dir))["epoch"] == epoch  # not one short, again and again
    told = []
    again = trainer(config)
    again.runtime.progress = told.append
    again.run()
    after, expected = journal.read(config.run_dir), journal.read(whole.config.run_dir)
    assert list(after) == [1, 2, 3] and after[3]["cost/lost_seconds"] == 0
    for number, point in expected.items():
        assert before.get(number, {}).items() <= after[number].items()
        for key in ("knn/top1", "feature/effective_rank", "loss/total"):
            assert after[number][key] == point[key], (number, key)
    assert after[3]["linear/top1"] == expected[3]["linear/top1"]
    (late, *_) = [event for event in told if isinstance(event, EpochDone)]
    assert late.epoch == epoch and late.metrics == after[epoch]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_a_start_that_fails_in_the_first_evaluation_finds_its_checkpoint(tmp_path, monkeypatch):
    # However slow the disk is: what dies for want of memory does so in the first evaluation of each start.
    saved, at, run = [], {}, trainer(make_config(tmp_path, "simclr", **SHORT))
    save, evaluated = checkpoint.save, run.evaluator.evaluate

    def slow(*args):
        threading.Event().wait(0.3)  # an evaluation that did not wait would have begun by then
        save(*args)
        saved.append(args)

    def evaluate(encoder, epoch, skipped):
        at[epoch] = len(saved)
        return evaluated(encoder, epoch)

    monkeypatch.setattr(checkpoint, "save", slow)
    run.evaluator.evaluate = evaluate
    run.run()
    assert at[0] == 1 and at[2] == 3
