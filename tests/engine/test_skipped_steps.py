"""Steps of the trainer that are left out: they change nothing, nobody waits, and a run of nothing else fails."""

import math

import pytest
import torch

from rotssl.config.methods import METHODS
from rotssl.engine.runtime import RunFailed
from rotssl.runs import checkpoint, journal
from tests.devices import Waits
from tests.small_runs import make_config, trainer

pytestmark = pytest.mark.contract
SHORT = {"data.limit": 64, "train.epochs": 3}
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
    with pytest.raises(RunFailed, match=r"^all steps of epoch 2 were skipped") as caught:
        run.run()
    assert "\n" not in str(caught.value)
    kept = next(checkpoint.latest(run.config.run_dir))
    assert kept["epoch"] == 1
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, kept["model"][name]), name


def test_more_skipped_steps_than_are_allowed_end_a_run(tmp_path):
    run = trainer(make_config(tmp_path, "byol", **SHORT, **{"train.on_nan": "skip", "train.max_skipped": 1}))
    after = run.model.method.after_backward

    def overflows(ctx):
        after(ctx)
        if ctx.step % 4 <= ctx.epoch:  # one step of the first epoch, two of the second
            next(run.model.encoder.parameters()).grad.fill_(math.inf)

    run.model.method.after_backward = overflows
    with pytest.raises(
        RunFailed, match=r"^2 of 4 steps of epoch 2 were skipped .* more than train\.max_skipped \(1\)$"
    ):
        run.run()


def test_a_loss_that_is_not_finite_ends_a_run_in_fp16_too(tmp_path):
    run = trainer(make_config(tmp_path, "simclr", **SHORT, **{"train.precision": "fp16"}))
    normalize, step = run.augment.normalize, run.step

    def steps(images, ctx):  # a scale that is too large would break gradients, but no loss
        run.augment.normalize = (lambda images: normalize(images) * math.nan) if ctx.step == 1 else normalize
        return step(images, ctx)

    run.step = steps
    with pytest.raises(RunFailed, match=r"^\S+ became nan in epoch 1"):
        run.run()
