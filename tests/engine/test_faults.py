"""What goes wrong beside training, or in a step of it, and what that may cost."""

import math
import os
import threading

import numpy as np
import pytest
import torch

from rotssl import config as cfg
from rotssl import lifecycle
from rotssl.base import distributed
from rotssl.commands import pretrain
from rotssl.config.methods import METHODS
from rotssl.engine import evaluator
from rotssl.engine.events import EpochDone
from rotssl.engine.runtime import LocalRuntime, RunFailed
from rotssl.runs import checkpoint, journal
from rotssl.runs.state import RunState
from tests.devices import SmallMemory, Waits
from tests.runs import make_config, trainer

pytestmark = pytest.mark.contract
SHORT = {"data.limit": 64, "train.epochs": 3}


class Killed(BaseException):
    """What no handler of errors gets to see, as with SIGKILL."""


def test_a_device_always_has_an_index(tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    with pytest.raises(ValueError, match="index"):  # which the thread that reads ahead would die of
        torch.cuda.set_device(torch.device("cuda"))
    torch.cuda.set_device(LocalRuntime(tmp_path, torch.device("cuda")).device)
    torch.cuda.set_device(LocalRuntime(tmp_path, torch.device("cuda", 1)).device)
    assert chosen == [3, 1] and LocalRuntime(tmp_path, torch.device("cpu")).device == torch.device("cpu")


PLACES = {
    "encoding": "rotssl.engine.evaluator.encode_share",
    "room": "rotssl.base.distributed.room_for_all",
    "knn": "rotssl.evaluation.measure.knn_top1",
    "probe": "rotssl.evaluation.measure.linear_top1",
}


def out_of_memory(*args):
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")


@pytest.mark.parametrize("where", PLACES)
def test_an_evaluation_that_fails_costs_a_warning(tmp_path, monkeypatch, caplog, where):
    monkeypatch.setattr(PLACES[where], out_of_memory)
    run = trainer(make_config(tmp_path, "simclr", **SHORT))
    run.run()
    points = journal.read(run.config.run_dir)
    assert list(points) == [1, 2, 3] and all(point["cost/epochs"] == epoch for epoch, point in points.items())
    whole = {"knn/top1", "linear/top1", "feature/effective_rank"}
    missing = {"encoding": whole, "room": whole, "knn": {"knn/top1"}}
    for name in ("knn/top1", "linear/top1", "feature/effective_rank"):
        assert (name not in points[3]) == (name in missing.get(where, {"linear/top1"})), name
    assert len(caplog.records) == {"encoding": 3, "room": 3, "knn": 3, "probe": 1}[where]
    assert all("OutOfMemoryError: CUDA out of memory." in record.message for record in caplog.records)
    assert next(checkpoint.latest(run.config.run_dir))["epoch"] == 3 and (tmp_path / "rotssl/run/encoder.json").exists()


def test_what_could_not_be_measured_at_the_end_is_said_and_made_up_for(tmp_path, monkeypatch, capsys):
    config = make_config(tmp_path, "simclr", **SHORT, **{"scaling.num_workers": 0, "tracking.uri": "off"})
    with monkeypatch.context() as patch:
        patch.setattr(PLACES["probe"], out_of_memory)
        assert pretrain.pretrain(config) == 0
    record = RunState.of(config)
    assert (record.status, record.missing, record.is_done) == ("finished", ["linear/top1"], False)
    assert record.reason == "completed, but linear/top1 could not be measured; the same command tries again"
    assert pretrain.pretrain(config) == 0 and "is finished already" not in capsys.readouterr().out
    record, points = RunState.of(config), journal.read(config.run_dir)
    assert (record.is_done, record.reason, list(points)) == (True, "completed", [1, 2, 3])
    assert 0 <= points[3]["linear/top1"] <= 1
    assert pretrain.pretrain(config) == 0 and "is finished already" in capsys.readouterr().out


def test_features_of_all_workers_come_to_the_first(pool):
    first, second = pool.run(gathered)
    np.testing.assert_array_equal(first, [[0, 0], [0, 0], [1, 1], [1, 1]])
    np.testing.assert_array_equal(second, [[1, 1], [1, 1]])


def gathered():
    rows = torch.full((2, 2), float(distributed.rank()))
    return distributed.gather_to_first(rows, distributed.room_for_all(rows)).numpy()


def test_where_one_worker_cannot_encode_its_share_all_leave_it(tmp_path, pool):
    for points in pool.run(run_with_one_that_fails, {"folder": tmp_path, "method": "simclr", **SHORT}):
        assert list(points) == [1, 2, 3] and not any("knn/top1" in point for point in points.values())


def run_with_one_that_fails(overrides):
    def fails(*args):
        if distributed.rank() == 1:
            raise MemoryError("none left")
        return real(*args)

    real, evaluator.encode_share = evaluator.encode_share, fails
    try:
        run = trainer(make_config(**overrides))
        run.run()
    finally:
        evaluator.encode_share = real
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

    def evaluate(encoder, epoch):
        at[epoch] = len(saved)
        return evaluated(encoder, epoch)

    monkeypatch.setattr(checkpoint, "save", slow)
    run.evaluator.evaluate = evaluate
    run.run()
    assert at[0] == 1 and at[2] == 3


def test_a_batch_that_does_not_fit_into_memory_is_one_line(tmp_path):
    run = trainer(make_config(tmp_path, "simclr", **SHORT))
    with SmallMemory(1e6), pytest.raises(RunFailed) as caught:
        run.run()
    text = str(caught.value)
    assert text.startswith("train.batch_size: got 16, for which there is not enough memory") and "\n" not in text


# --- a run that goes on otherwise ----------------------------------------------------------------------------------------------

NOT_COMPUTED = {
    "evaluation.knn_every": 0,
    "evaluation.knn_bf16": True,
    "evaluation.linear": False,
    "train.compile": True,
    "train.accumulate": 2,
    "tasks.log_gradients_every": 5,
    "data.root": "/elsewhere",
}


def test_what_is_not_computed_may_change_when_a_run_goes_on_and_is_said(tmp_path):
    assert set(NOT_COMPUTED) == set(cfg.MAY_CHANGE)
    config = make_config(tmp_path, "byol")
    config.run_dir.mkdir(parents=True)
    RunState.of(config).write("running")
    for key, value in NOT_COMPUTED.items():
        other = cfg.replace(config, {key: value})
        assert RunState.of(other).changes == [f"{key}: {value} in place of {cfg.flat(config)[key]}"]
        assert (cfg.fingerprint(other) == cfg.fingerprint(config)) == (key != "data.root"), key
    changed = RunState.of(cfg.replace(config, NOT_COMPUTED))
    assert len(changed.changes) == len(NOT_COMPUTED)
    changed.write("running")
    assert RunState.of(cfg.replace(config, NOT_COMPUTED)).changes == []  # said once
    with pytest.raises(cfg.ConfigError, match=r"^evaluation\.holdout: got 0\.2, but run 'run' was started with 0\.1"):
        RunState.of(cfg.replace(config, {"evaluation.holdout": 0.2}))


def test_a_run_goes_on_without_the_evaluation_that_it_could_not_have(tmp_path):
    config = make_config(tmp_path, "simclr", **SHORT)
    trainer(cfg.replace(config, {"train.stop_after": 1})).run()
    off = {"evaluation.linear": False, "evaluation.knn_every": 0}
    trainer(cfg.replace(config, {**off, "train.stop_after": 2})).run()
    trainer(cfg.replace(config, {"evaluation.linear": False})).run()
    points = journal.read(config.run_dir)
    # The second was not measured as it ended, but by the start after, which was asked to.
    assert ["knn/top1" in point for point in points.values()] == [True, True, True] and "linear/top1" not in points[3]


def test_a_run_does_not_go_on_with_other_images(tmp_path):
    config = make_config(tmp_path, "simclr", **SHORT)
    run = trainer(cfg.replace(config, {"train.stop_after": 1}))
    run.run()
    state = next(checkpoint.latest(config.run_dir))
    known = state["images"]
    assert known["count"] == 64 and len(known["means"]) == 64
    near, far = [mean + 1 for mean in known["means"]], [known["means"][0] + 3, *known["means"][1:]]
    for change, words in (
        ({"count": 65}, "64 of them, not 65"),
        ({"classes": 1}, "their classes have other names"),
        ({"labels": 1}, "they have other labels, or another order"),
        ({"means": far}, "the pictures are others"),
    ):
        with pytest.raises(
            RunFailed, match=f"^data.root: these are not the images that this run was started with: {words}"
        ):
            run.restore(state | {"images": known | change})
    for same in (known, known | {"means": near}, None):  # moved, decoded by another library, of version 0.1
        assert run.restore(state | {"images": same}) == 1


def test_a_run_may_go_on_in_more_passes(tmp_path):
    found = []
    for passes in (1, 4):
        fields = {"data.name": "synthetic", "train.accumulate": passes, "storage.path": str(tmp_path)}
        found.append(lifecycle.prepare(cfg.build(fields))[0])
    assert found[0].run_dir == found[1].run_dir
    found[0].run_dir.mkdir(parents=True)
    RunState.of(found[0]).write("running")
    assert RunState.of(found[1]).changes == ["train.accumulate: 4 in place of 1"]


def test_fields_that_came_later_leave_earlier_runs_alone(tmp_path):
    config = make_config(tmp_path, "byol")
    config.run_dir.mkdir(parents=True)
    RunState.of(config).write("running")
    assert "rotation.head_on" not in cfg.identity_of(config)
    assert RunState.of(cfg.replace(config, {"rotation.head_on": "encoder"})).changes == []
    with pytest.raises(
        cfg.ConfigError, match=r"^rotation\.head_on: got projector, but run 'run' was started with encoder"
    ):
        RunState.of(cfg.replace(config, {"rotation.head_on": "projector"}))


# --- steps that are left out ---------------------------------------------------------------------------------------------------

OPTIMIZERS = ["sgd", "adamw", "lars"]


def guarded(folder, method, name, **fields):
    fields = {"optim.name": name, "optim.lr": 0.05, "data.limit": 64, "optim.warmup_epochs": 0, **fields}
    return trainer(make_config(folder, method, **fields))


@pytest.mark.parametrize("fields", [{"train.precision": "fp16"}, {"train.on_nan": "skip"}], ids=["fp16", "on_nan"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "method", ["mocov2", "swav", "dino"]
)  # queue and teacher, queue and prototypes, centre and teacher
def test_a_step_that_overflows_changes_nothing(tmp_path, method, name, fields):
    run = guarded(tmp_path, method, name, **fields)
    batches, after = list(run.batches(0)), run.model.method.after_backward

    def overflows(ctx):
        after(ctx)
        next(run.model.encoder.parameters()).grad.fill_(math.inf)

    def state():
        moments = {
            f"{i}.{key}": value
            for i, kept in enumerate(run.optimizer.state.values())
            for key, value in kept.items()
            if torch.is_tensor(value)
        }
        return {name: value.detach().clone() for name, value in [*run.model.state_dict().items(), *moments.items()]}

    while run.step(*batches[0])["optim/skipped_steps"] == 1:  # until fp16 has found its scale
        assert run.scaler.get_scale() > 1e-3
    before, scale = state(), run.scaler.get_scale()
    run.model.method.after_backward = overflows
    scaled = run.scaler.unscale_
    if run.scaler.is_enabled():  # what overflows does so before the scaler looks

        def unscale(optimizer):
            next(run.model.encoder.parameters()).grad.fill_(math.inf)
            scaled(optimizer)

        run.scaler.unscale_ = unscale
    assert run.step(*batches[1])["optim/skipped_steps"] == 1
    for key, value in state().items():
        assert torch.equal(value, before[key]), key
    assert not run.scaler.is_enabled() or run.scaler.get_scale() == scale / 2
    run.model.method.after_backward, run.scaler.unscale_ = after, scaled
    assert run.step(*batches[2])["optim/skipped_steps"] == 0
    moved = state()
    assert all(torch.isfinite(value).all() for value in moved.values())
    assert any(not torch.equal(value, before[key]) for key, value in moved.items() if key.startswith("encoder"))
    assert method == "swav" or any(
        not torch.equal(value, before[key]) for key, value in moved.items() if key.startswith("teacher.0.")
    )


@pytest.mark.parametrize(
    "fields", [{}, {"train.precision": "fp16"}, {"train.on_nan": "skip"}], ids=["plain", "fp16", "on_nan"]
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_host_waits_for_no_value_in_a_step(tmp_path, name, fields):
    run = guarded(tmp_path, "byol", name, **fields)
    first, second, *_ = run.batches(0)
    run.step(*first)  # which writes a picture
    with Waits() as waits:
        run.step(*second)
    assert waits.found == []


@pytest.mark.parametrize("method", METHODS)
def test_a_guarded_step_that_is_taken_is_the_plain_one(tmp_path, method):
    found = []
    for fields in ({}, {"train.on_nan": "skip"}):
        run = guarded(tmp_path / str(len(found)), method, "sgd", **fields)
        for batch in list(run.batches(0))[:3]:
            run.step(*batch)
        found.append(run.model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_means_of_an_epoch_leave_out_what_is_not_finite_in_a_step_that_was(tmp_path):
    run = trainer(make_config(tmp_path, "simclr", **SHORT, **{"train.on_nan": "skip", "train.stop_after": 1}))
    normalize, losses, step = run.augment.normalize, [], run.step

    def steps(images, ctx):
        run.augment.normalize = (lambda images: normalize(images) * math.nan) if ctx.step == 1 else normalize
        logs = step(images, ctx)
        losses.append(float(logs["loss/total"]))
        return logs

    run.step = steps
    run.run()
    point = journal.read(run.config.run_dir)[1]
    finite = [loss for loss in losses if math.isfinite(loss)]
    assert len(losses) == 4 and len(finite) == 3 and point["optim/skipped_steps"] == 0.25
    assert point["loss/total"] == pytest.approx(sum(finite) / 3)


def test_a_run_that_leaves_out_every_step_fails_in_a_line_and_its_model_is_that_of_the_checkpoint(tmp_path):
    run = trainer(make_config(tmp_path, "byol", **SHORT, **{"train.on_nan": "skip"}))
    after = run.model.method.after_backward

    def overflows(ctx):
        after(ctx)
        if ctx.epoch == 1:
            next(run.model.encoder.parameters()).grad.fill_(math.inf)

    run.model.method.after_backward = overflows
    with pytest.raises(RunFailed, match=r"^every step of epoch 2 had a non-finite gradient and was skipped") as caught:
        run.run()
    assert "\n" not in str(caught.value)
    kept = next(checkpoint.latest(run.config.run_dir))
    assert kept["epoch"] == 1
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, kept["model"][name]), name


def test_a_loss_that_is_not_finite_ends_a_run_in_fp16_too(tmp_path):
    run = trainer(make_config(tmp_path, "simclr", **SHORT, **{"train.precision": "fp16"}))
    normalize, step = run.augment.normalize, run.step

    def steps(images, ctx):  # a scale that is too large would break gradients, but no loss
        run.augment.normalize = (lambda images: normalize(images) * math.nan) if ctx.step == 1 else normalize
        return step(images, ctx)

    run.step = steps
    with pytest.raises(RunFailed, match=r"^\S+ became nan in epoch 1"):
        run.run()


def test_deterministic_sets_what_cuda_wants(tmp_path, monkeypatch):
    for given, expected in ((None, ":4096:8"), (":16:8", ":16:8")):
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        if given:
            monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        try:
            trainer(make_config(tmp_path, "simclr", **{"train.deterministic": True}))
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == expected and not torch.backends.cudnn.benchmark
        finally:
            torch.use_deterministic_algorithms(False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    trainer(make_config(tmp_path, "simclr"))
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
