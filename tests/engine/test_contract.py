"""What every method must do with every form of every task; a new entry in METHODS is tested by being there."""

import dataclasses
import hashlib
import json
import math
from itertools import islice

import numpy as np
import pytest
import torch

from rotssl.base import distributed
from rotssl.config.methods import METHODS
from rotssl.config.tasks import TASKS as REGISTRY
from rotssl.engine.pretrainer import build_pretrainer
from rotssl.runs import journal
from tests.devices import Waits
from tests.engine.forms import DISJOINT, EQUIVARIANCE, GROWS, JIGSAW, TASKS
from tests.small_runs import CPU, PAPER, arithmetic, batch, make_config, run_to, trainer

pytestmark = pytest.mark.contract
ON = {name: task for name, task in TASKS.items() if name != "off"}
EXTRA = {
    name: task
    for name, task in ON.items()
    if (task.get("rotation.mode") in ("extra", "four_way") or task.get("rotation.weight") == 0)
    and "rotation.joint" not in task
    and "equivariance.weight" not in task  # it takes images from the method
}
PER_IMAGE = [method for method, spec in METHODS.items() if spec.per_image]
MULTI_CROP = [method for method, spec in METHODS.items() if spec.multi_crop]
every = pytest.mark.parametrize("method", METHODS)
# Methods never see tasks (test_imports.py holds that), so a covering set stands for the product of the two: one method of each
# kind (negatives, a queue and a student that sees one view, a teacher) with each form, and each method with a form of each kind.
# Variations of a form do with one method.
KINDS, FORMS = ("simclr", "mocov2", "byol"), ("extra", "shared", "jigsaw")
VARIATIONS = {
    *("one small view", "extra, BN kept", "four way, half", "disjoint on the projector", "conditioned, independent"),
    *("extra on a stage", "two angles", "equivariance, by share", "equivariance and jigsaw, extra", "shared, fewer"),
    *("extra on the first stage", "augment", "contrastive, fewer, extra", "eight angles"),
    "cosine, fewer, extra",
}
RARE = {"on the stem", "contrastive", "contrastive, four way"}


def covering(forms, methods=METHODS):
    """Each method with each form of a task; what is not in the covering set is for ``make test-all``."""

    def marks(form, method):
        few = () if form in RARE else KINDS[-1:] if form in VARIATIONS else KINDS
        whole = form in FORMS or method in few
        return () if whole else pytest.mark.exhaustive

    cases = [
        pytest.param(method, task, id=f"{form}-{method}", marks=marks(form, method))
        for form, task in forms.items()
        for method in methods
    ]
    return pytest.mark.parametrize(("method", "task"), cases)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@covering(EXTRA)
def test_extra_task_leaves_the_method_alone(tmp_path, method, task):
    off = make_config(tmp_path, method, **TASKS["off"])
    falling = {f"{name}.schedule": "linear" for name in REGISTRY}
    on = make_config(tmp_path, method, **task, **falling)
    plain, joined = build_pretrainer(off, CPU), build_pretrainer(on, CPU)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, joined.state_dict()[name]), name
    views, ctx = batch(on, joined)
    a, b = plain(views, ctx), joined(views, ctx)
    assert torch.equal(a.logs["loss/ssl"], b.logs["loss/ssl"])
    tasks = [b.logs[f"loss/{name}"] * joined.balance.weight(name, 0.0) for name, _ in joined.named_tasks()]
    assert len(tasks) >= 1 and torch.allclose(b.loss, b.logs["loss/ssl"] + sum(tasks))
    # At the end of a linear schedule the tasks weigh 0: what is left of the gradient is the method's part.
    end = dataclasses.replace(ctx, progress=1.0)
    plain, joined = build_pretrainer(off, CPU), build_pretrainer(on, CPU)
    plain(views, end).loss.backward()
    joined(views, end).loss.backward()
    ours = gradients(joined)
    for name, grad in gradients(plain).items():
        assert torch.equal(grad, ours[name]), name


@covering(ON)
def test_every_parameter_gets_a_gradient_and_the_host_waits_for_no_value(tmp_path, method, task):
    config = make_config(tmp_path, method, **task)
    model = build_pretrainer(config, CPU)
    views, ctx = batch(config, model)
    with Waits() as waits:
        model(views, ctx).loss.backward()
    assert waits.found == []
    for name, grad in gradients(model).items():
        assert grad is not None and grad.abs().sum() > 0, name


@pytest.mark.parametrize("norm", ["batch", "sync"])
@pytest.mark.parametrize("method", MULTI_CROP)
def test_local_views_take_part(tmp_path, method, norm):
    config = make_config(tmp_path, method, **PAPER, **{"views.local_count": 2, "model.norm": norm})
    model = build_pretrainer(config, CPU)
    views, ctx = batch(config, model)
    assert [tuple(view.shape[2:]) for view in views.local] == [(7, 7), (7, 7)]
    passes = []
    model.encoder.register_forward_pre_hook(lambda _, args: passes.append(tuple(args[0].shape)))
    leaf = views.local[1].requires_grad_()
    model(views, ctx).loss.backward()
    assert leaf.grad.abs().sum() > 0
    # One pass a resolution, whose views have statistics of their own if the method says so.
    assert passes == [(32, 3, 16, 16), (32, 3, 7, 7), (32, 3, 16, 16)]


@every
def test_collapse_shows_in_the_spread(tmp_path, method):
    config = make_config(tmp_path, method)
    model = build_pretrainer(config, CPU)
    views, ctx = batch(config, model)
    assert model(views, ctx).logs["feature/std"] > 0.1
    with torch.no_grad():
        for p in model.encoder.parameters():  # every image gets the same features
            p.zero_()
    assert model(views, ctx).logs["feature/std"] < 1e-3


@every
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("task", ["rotation", "jigsaw"])
def test_update_bn_decides_about_running_statistics(tmp_path, method, kept, task):
    fields = (
        {"rotation.weight": 0, **JIGSAW, "jigsaw.update_bn": kept}
        if task == "jigsaw"
        else {**PAPER, "rotation.update_bn": kept}
    )
    on, off = make_config(tmp_path, method, **fields), make_config(tmp_path, method, **TASKS["off"])
    models = [build_pretrainer(c, CPU) for c in (on, off)]
    views, ctx = batch(on, models[0])
    for model in models:
        model(views, ctx)
    means = [model.encoder.state_dict()["stem.1.running_mean"] for model in models]
    assert torch.equal(*means) != kept


def digest(tensor):
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def first_steps(overrides, steps):
    """In double precision: losses of the first steps (means over ranks), digests of what this rank saw and of its last state."""
    with arithmetic(torch.float64):
        run = trainer(make_config(**overrides))
        losses, seen = [], []
        batches = (item for epoch in range(4) for item in run.batches(epoch))
        for images, ctx in islice(batches, steps):
            views = run.augment(images, ctx)
            made = [*views.full, *views.local]
            for name, task in run.model.named_tasks():
                made += task.transform(views.own.get(name, views.full), ctx)[0]
            versions = [block for view in made if len(view) % len(images) == 0 for block in view.split(len(images))]
            seen.append([[digest(block[i]) for block in versions] for i in range(len(images))])
            logs = run.step(images, ctx)
            losses.append({key: float(distributed.mean(logs[key])) for key in sorted(logs) if key.startswith("loss/")})
        return losses, seen, {name: digest(value) for name, value in run.model.state_dict().items()}


OVER_TWO = {
    "extra on the projector, local views": {**PAPER, "views.local_count": 2, "rotation.head_on": "projector", **GROWS},
    "shared, fewer": TASKS["shared, fewer"] | {"rotation.share": 0.2, "views.local_count": 2},
    "whole batches": {"model.norm_splits": 4, "rotation.conditioned": True},
    "disjoint": DISJOINT | {"data.limit": 256},
    "split": TASKS["split"] | {"views.local_count": 2},
    "contrastive, fewer, extra": TASKS["contrastive, fewer, extra"],
    "cosine, fewer, extra": TASKS["cosine, fewer, extra"],
    "four way and jigsaw": TASKS["four way"] | JIGSAW,
    "equivariance": EQUIVARIANCE | {"data.limit": 256},
}
# Each norm with a form that the other has not; in whole, all pairs, and longer.
PAIRS = [("sync", "extra on the projector, local views", 6), ("group", "shared, fewer", 6)]
LONGER = [(norm, form, 10) for norm in ("sync", "group") for form in OVER_TWO if form != "whole batches"]
# Rows that only the task uses, and a queue that gets the others; several losses of a pass, of which a queue gets one.
PARTED = [("sync", form, 6) for form in ("disjoint", "equivariance", "split")]


def over_two():
    cases = [(method, *case, ()) for method in METHODS for case in PAIRS]
    cases += [(m, *case, () if m in KINDS else pytest.mark.exhaustive) for m in METHODS for case in PARTED]
    cases += [("mocov2", "split", "whole batches", 6, ())]
    cases += [(method, *case, pytest.mark.exhaustive) for method in METHODS for case in LONGER]
    return [pytest.param(*case, id=f"{case[0]}-{case[1]}-{case[2]}-{case[3]}", marks=marks) for *case, marks in cases]


@pytest.mark.parametrize(("method", "norm", "form", "steps"), over_two())
def test_two_workers_equal_one(tmp_path, pool, method, norm, form, steps):
    # Training amplifies rounding (a ReLU that flips moves the next steps), so this is in double precision, where 1e-16 has room
    # to grow, at a rate that trains. Four steps an epoch: by the sixth queues take part, and what was frozen moves.
    task = {key: value for key, value in OVER_TWO[form].items() if method in MULTI_CROP or key != "views.local_count"}
    overrides = {"folder": tmp_path, "method": method, "model.norm": norm, "optim.lr": METHODS[method].lr, **task}
    overrides = {"data.limit": 64} | overrides
    alone, seen_alone, _ = first_steps(overrides, steps)
    (losses, seen_first, first), (_, seen_second, second) = pool.run(first_steps, overrides, steps)
    apart = {name for name in first if norm == "split" and "running_" in name}  # until the end of an epoch
    assert {name for name in first if first[name] != second[name]} <= apart  # queues, prototypes, centres are the same
    for step in range(steps):
        assert seen_alone[step] == seen_first[step] + seen_second[step]
        for key, value in alone[step].items():
            assert losses[step][key] == pytest.approx(value, rel=1e-7, abs=1e-9), (step, key)


def gradient_of_step(overrides):
    with arithmetic(torch.float64):  # in single precision a ReLU may flip
        run = trainer(make_config(**overrides))
        images, ctx = next(iter(run.batches(0)))
        run.parallel(run.augment(images, ctx), ctx).loss.backward()
        return {name: grad.numpy() for name, grad in gradients(run.model).items()}


@covering(ON)
def test_two_workers_have_the_gradient_of_one(tmp_path, pool, method, task):
    overrides = {"folder": tmp_path, "method": method, **task}
    alone = gradient_of_step(overrides)
    first, second = pool.run(gradient_of_step, overrides)
    scale = max(np.abs(grad).max() for grad in alone.values())
    for name, grad in alone.items():
        np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_allclose(first[name], grad, rtol=1e-3, atol=1e-5 * scale, err_msg=name)


@every
def test_state_moves_with_a_step_and_stays_in_one_that_is_skipped(tmp_path, method):
    run = trainer(make_config(tmp_path, method, **{"train.on_nan": "skip", "data.limit": 64}))
    normalization = ("running_mean", "running_var", "num_batches_tracked")

    def state():
        return {
            name: value.clone() for name, value in run.model.method.named_buffers() if not name.endswith(normalization)
        }

    start, batches, normalize = state(), list(run.batches(0)), run.augment.normalize
    assert run.step(*batches[0])["optim/skipped_steps"] == 0
    moved = state()
    for name, value in moved.items():
        assert torch.isfinite(value).all() and not torch.equal(value, start[name]), name
    run.augment.normalize = lambda images: normalize(images) * math.nan
    assert run.step(*batches[1])["optim/skipped_steps"] == 1
    for name, value in state().items():
        assert torch.equal(value, moved[name]), name
    run.augment.normalize = normalize
    with Waits() as waits:
        run.step(*batches[2])  # what the skipped one saw is dropped
    assert waits.found == []
    assert all(torch.isfinite(value).all() for value in state().values())


def one_step(overrides):
    """Weights and buffers after one step on a whole batch, and the step's logs."""
    run = trainer(make_config(**overrides))
    logs = run.step(*next(iter(run.batches(0))))
    return run.model.state_dict(), logs


@covering({name: task for name, task in ON.items() if "rotation.loss" not in task}, PER_IMAGE)
def test_accumulated_step_equals_that_of_the_whole_batch(tmp_path, method, task):
    overrides = {"folder": tmp_path, "method": method, "model.norm": "group", "optim.clip_norm": 0.5, **task}
    overrides["tasks.log_gradients_every"] = 1
    with arithmetic(torch.float64):
        (whole, logs), (cut, cut_logs) = (one_step(overrides | {"train.accumulate": passes}) for passes in (1, 4))
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-5, atol=1e-6, msg=name)
    for name in logs.keys() - {"feature/std"}:  # a spread over fewer images
        torch.testing.assert_close(cut_logs[name], logs[name], rtol=1e-5, atol=1e-6, msg=name)


def accumulated(overrides):
    """Weights and buffers after one step, in double precision."""
    with arithmetic(torch.float64):
        return {name: value.numpy().copy() for name, value in one_step(overrides)[0].items()}


@pytest.mark.parametrize("method", PER_IMAGE)
def test_accumulated_step_of_two_workers_equals_that_of_one_on_the_whole_batch(tmp_path, pool, method):
    overrides = {"folder": tmp_path, "method": method, "model.norm": "group", **JIGSAW}
    whole = accumulated(overrides)
    first, second = pool.run(accumulated, overrides | {"train.accumulate": 4})
    for name, value in whole.items():
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
        np.testing.assert_allclose(first[name], value, rtol=1e-7, atol=1e-9, err_msg=name)


# A teacher, a queue: what two workers have to have the same again.
RESUMED = [(method, workers) for method in METHODS for workers in (1, 2)]
IN_PAIRS = ("byol", "mocov2")


@pytest.mark.parametrize(
    ("method", "workers"),
    [pytest.param(*c, marks=() if c[1] == 1 or c[0] in IN_PAIRS else pytest.mark.exhaustive) for c in RESUMED],
)
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, request, method, workers):
    measured = method == "byol"  # no method has a part in evaluation
    small = GROWS | {"views.size_until": 0.6}  # up to the middle of the third epoch

    def execute(**fields):
        overrides = {"method": method, "data.limit": 64, "evaluation.knn_every": int(measured), **small, **fields}
        overrides["rotation.share"] = 0.2  # whose averages are part of the state
        return run_to(overrides) if workers == 1 else request.getfixturevalue("pool").run(run_to, overrides)[0]

    whole = execute(folder=tmp_path / "whole")
    execute(folder=tmp_path / "halves", **{"train.stop_after": 2})
    resumed = execute(folder=tmp_path / "halves")
    for name, value in whole.items():
        np.testing.assert_array_equal(value, resumed[name], err_msg=name)
    for folder in ("whole", "halves"):
        lines = (tmp_path / folder / "rotssl" / "run" / journal.Journal.NAME).read_text().splitlines()
        told = [(json.loads(line)["epoch"], key) for line in lines for key in json.loads(line) if key != "epoch"]
        assert len(told) == len(set(told)) and sorted({epoch for epoch, _ in told}) == [1, 2, 3, 4]
        assert len(lines) == (8 if measured else 4)  # for each epoch one of its training, one of its evaluation
