"""What every method must do with every form of every task; a new entry in METHODS is tested by being there."""

import hashlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from rotssl import checkpoint, distributed, journal
from rotssl import config as cfg
from rotssl.data import datasets
from rotssl.engine import Trainer
from rotssl.methods import METHODS
from rotssl.methods.base import StepContext
from rotssl.pretrainer import build_pretrainer
from rotssl.runtime import LocalRuntime

CPU = torch.device("cpu")
TASKS = {
    "off": {"rotation.weight": 0},
    "extra": {},
    "one view": {"rotation.views": 1},
    "extra, half": {"rotation.fraction": 0.5},
    "extra, BN kept": {"rotation.update_bn": False},
    "shared": {"rotation.mode": "in_place"},
    "independent": {"rotation.mode": "in_place", "rotation.angles": "independent"},
    "shared, half": {"rotation.mode": "in_place", "rotation.fraction": 0.5},
}
ON = {name: task for name, task in TASKS.items() if name != "off"}
both = pytest.mark.parametrize("method", METHODS)
forms = pytest.mark.parametrize("task", ON.values(), ids=ON.keys())


def make_config(folder, method, **fields):
    small = {
        "data.name": "synthetic",
        "data.limit": 512,
        "data.image_size": 16,
        "train.batch_size": 16,
        "train.epochs": 4,
        "method.name": method,
        "method.hidden_dim": 32,
        "method.out_dim": 16,
        "tracking.run_name": "run",
        "storage.path": str(folder),
    }
    return cfg.resolve(cfg.build(small | fields), 32, 512)


def batch(config, seed=0):
    size = config.train.batch_size
    views = [torch.randn(size, 3, 16, 16, generator=torch.Generator().manual_seed(seed + v)) for v in range(2)]
    return views, StepContext(config.train.seed, 0, 0, 0.0, np.arange(size), 0, size)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@both
@pytest.mark.parametrize(
    "task",
    [t for n, t in ON.items() if not t.get("rotation.mode")],
    ids=[n for n, t in ON.items() if not t.get("rotation.mode")],
)
def test_extra_task_leaves_the_method_alone(tmp_path, method, task):
    off = make_config(tmp_path, method, **TASKS["off"])
    on = make_config(tmp_path, method, **task, **{"rotation.schedule": "linear"})
    plain, joined = build_pretrainer(off, CPU), build_pretrainer(on, CPU)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, joined.state_dict()[name]), name
    views, ctx = batch(off)
    a, b = plain(views, ctx), joined(views, ctx)
    assert torch.equal(a.logs["loss/ssl"], b.logs["loss/ssl"])
    assert torch.allclose(b.loss, b.logs["loss/ssl"] + b.logs["loss/rotation"])
    # At the end of a linear schedule the task weighs 0: what is left of the gradient is the method's part.
    end = StepContext(ctx.seed, 0, 0, 1.0, ctx.positions, 0, ctx.batch_size)
    plain, joined = build_pretrainer(off, CPU), build_pretrainer(on, CPU)
    plain(views, end).loss.backward()
    joined(views, end).loss.backward()
    ours = gradients(joined)
    for name, grad in gradients(plain).items():
        assert torch.equal(grad, ours[name]), name


@both
@forms
def test_every_parameter_gets_a_gradient(tmp_path, method, task):
    config = make_config(tmp_path, method, **task)
    model = build_pretrainer(config, CPU)
    views, ctx = batch(config)
    model(views, ctx).loss.backward()
    for name, grad in gradients(model).items():
        assert grad is not None and grad.abs().sum() > 0, name


@both
@pytest.mark.parametrize("kept", [True, False])
def test_update_bn_decides_about_running_statistics(tmp_path, method, kept):
    on, off = (
        make_config(tmp_path, method, **{"rotation.update_bn": kept}),
        make_config(tmp_path, method, **TASKS["off"]),
    )
    models = [build_pretrainer(c, CPU) for c in (on, off)]
    views, ctx = batch(on)
    for model in models:
        model(views, ctx)
    means = [model.encoder.state_dict()["stem.1.running_mean"] for model in models]
    assert torch.equal(*means) != kept


class Group(LocalRuntime):
    """The engine in a process group without Ray."""

    def __init__(self, run_dir):
        super().__init__(run_dir, CPU)
        self.rank, self.world_size = distributed.rank(), distributed.world_size()

    def wrap(self, model):
        return distributed.data_parallel(model, self.device)

    def report(self, epoch, metrics, folder):
        if self.rank == 0:
            super().report(epoch, metrics, folder)


def trainer(config):
    return Trainer(config, datasets.load(config.data, 0.1), Group(config.run_dir), journal.Journal(config.run_dir))


@contextmanager
def arithmetic(kind):
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def first_steps(overrides, steps, kind=torch.float32):
    """Losses of the first steps (means over ranks), and a digest of every view and rotation that this rank saw."""
    with arithmetic(kind):
        return _first_steps(overrides, steps, kind)


def _first_steps(overrides, steps, kind):
    run = trainer(make_config(**overrides))
    normalize = run.augment.normalize
    run.augment.normalize = lambda images: normalize(images).to(kind)
    losses, seen = [], []
    tasks = run.model.tasks
    for images, ctx in list(run._batches(0))[:steps]:
        views = run.augment(images, ctx.epoch, ctx.positions)
        turned = [task.transform(views, ctx) for task in tasks.values()]
        rows = [*views, *(t for turned_views, _ in turned for t in turned_views if len(t) == len(views[0]))]
        seen.append([hashlib.sha256(row.contiguous().numpy().tobytes()).hexdigest() for view in rows for row in view])
        seen[-1] = list(np.array(seen[-1]).reshape(len(rows), -1).T.tolist())
        logs = run._step(images, ctx)
        losses.append({key: float(distributed.mean(value)) for key, value in logs.items() if key.startswith("loss/")})
    return losses, seen


@pytest.mark.ddp
@both
@pytest.mark.parametrize("norm", ["sync", "group"])
@pytest.mark.parametrize(
    "task", [TASKS["extra"], TASKS["shared"], TASKS["extra, half"]], ids=["extra", "shared", "extra, half"]
)
@pytest.mark.parametrize(
    ("kind", "lr", "tolerance"), [(torch.float32, 1e-5, 1e-4), (torch.float64, 0.1, 1e-7)], ids=["single", "double"]
)
def test_two_workers_equal_one(tmp_path, pool, method, norm, task, kind, lr, tolerance):
    # Training amplifies rounding (a ReLU that flips moves the next steps), the more the higher the rate. So single precision is
    # compared at a low rate, and double precision, where 1e-16 has room to grow, at one that trains.
    overrides = {"folder": tmp_path, "method": method, "model.norm": norm, "optim.lr": lr, **task}
    alone, seen_alone = first_steps(overrides, 20, kind)
    (losses, seen_first), (_, seen_second) = pool.run(first_steps, overrides, 20, kind)
    for step in range(20):
        assert seen_alone[step] == seen_first[step] + seen_second[step]
        for key, value in alone[step].items():
            assert losses[step][key] == pytest.approx(value, rel=tolerance), (step, key)


def gradient_of_step(overrides):
    run = trainer(make_config(**overrides))
    images, ctx = next(iter(run._batches(0)))
    run.parallel(run.augment(images, 0, ctx.positions), ctx).loss.backward()
    return {name: grad.numpy() for name, grad in gradients(run.model).items()}


@pytest.mark.ddp
@both
@forms
def test_two_workers_have_the_gradient_of_one(tmp_path, pool, method, task):
    overrides = {"folder": tmp_path, "method": method, **task}
    alone = gradient_of_step(overrides)
    first, second = pool.run(gradient_of_step, overrides)
    scale = max(np.abs(grad).max() for grad in alone.values())
    for name, grad in alone.items():
        np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_allclose(first[name], grad, rtol=1e-3, atol=1e-5 * scale, err_msg=name)


def run_to(overrides):
    """Final weights of a run."""
    run = trainer(make_config(**overrides))
    run.run()
    return {name: value.numpy().copy() for name, value in run.model.state_dict().items()}


@both
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.ddp)])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, request, method, workers):
    def execute(**fields):
        overrides = {"method": method, "data.limit": 64, **fields}
        return run_to(overrides) if workers == 1 else request.getfixturevalue("pool").run(run_to, overrides)[0]

    whole = execute(folder=tmp_path / "whole")
    execute(folder=tmp_path / "halves", **{"train.stop_after": 2})
    resumed = execute(folder=tmp_path / "halves")
    for name, value in whole.items():
        np.testing.assert_array_equal(value, resumed[name], err_msg=name)
    for folder in ("whole", "halves"):
        lines = (tmp_path / folder / "rotssl" / "run" / journal.Journal.NAME).read_text().splitlines()
        assert len(lines) == 4


def test_crash_between_journal_and_checkpoint_counts_as_lost_time(tmp_path):
    config = make_config(tmp_path, "simclr", **{"data.limit": 64})
    trainer(cfg.replace(config, {"train.stop_after": 3})).run()
    before = journal.read(config.run_dir)
    for folder in checkpoint.found(config.run_dir)[:1]:  # the last checkpoint never arrived
        (folder / checkpoint.FILE).unlink()
    trainer(config).run()
    after = journal.read(config.run_dir)
    assert {epoch: after[epoch] for epoch in before} == before and list(after) == [1, 2, 3, 4]
    assert before[3]["cost/lost_seconds"] == 0 < after[4]["cost/lost_seconds"]
    assert after[4]["cost/samples"] == 4 * 64 and after[4]["cost/epochs"] == 4


def test_nan_fails_and_keeps_the_last_checkpoint(tmp_path):
    from rotssl.runtime import RunFailed

    config = make_config(tmp_path, "byol", **{"optim.lr": 1e12, "optim.warmup_epochs": 1, "data.limit": 256})
    with pytest.raises(RunFailed, match=r"optim\.lr 1e\+12"):
        trainer(config).run()
    assert not list(Path(config.run_dir).glob("epoch_*/checkpoint.pt"))


@pytest.mark.ddp
def test_device_seconds_add_up_over_numbers_of_workers(tmp_path, pool):
    overrides = {"folder": tmp_path, "method": "simclr", "data.limit": 64}
    pool.run(run_to, {**overrides, "train.stop_after": 2})
    run_to(overrides)  # goes on alone
    points = journal.read(make_config(**overrides).run_dir)
    two, whole = points[2], points[4]
    assert two["cost/device_seconds"] == pytest.approx(2 * two["cost/train_seconds"])
    alone = whole["cost/train_seconds"] - two["cost/train_seconds"]
    assert whole["cost/device_seconds"] == pytest.approx(two["cost/device_seconds"] + alone)
