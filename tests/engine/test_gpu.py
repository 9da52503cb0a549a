"""What only a GPU shows: steps without a wait, the numbers of a CPU, no memory left, and runs that change between the two."""

import math
import os
import shutil
from itertools import islice

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product; deterministic steps ask for it

import pytest
import torch
import torch.distributed as dist

from rotssl import config as cfg
from rotssl.base import distributed
from rotssl.config.fields import ConfigError
from rotssl.config.methods import METHODS
from rotssl.data import datasets
from rotssl.engine import estimate, timing
from rotssl.engine.runtime import LocalRuntime, RunFailed
from rotssl.engine.trainer import Trainer
from rotssl.models import norm
from rotssl.runs import checkpoint, journal
from tests.small_runs import PAPER, make_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.filterwarnings("ignore:Please use the new API settings to control TF32"),
]
FP32 = {"train.precision": "fp32"}
OPTIMIZERS = ["sgd", "adamw", "lars"]
# As in batches of the default size: a share of the images turns, which falls from step to step.
FEWER = {"rotation.fraction": 0.75, "rotation.fraction_end": 0.25}
TASKS = {
    "in place": {},
    "fewer": FEWER,
    "extra": PAPER,
    "on the projector": {**PAPER, "rotation.head_on": "projector"},
    "four way and jigsaw": {
        "rotation.mode": "four_way",
        "jigsaw.weight": 1.0,
        "jigsaw.grid": 2,
        "jigsaw.permutations": 20,
    },
}


def engine(config, device):
    splits = datasets.load(config.data, config.evaluation.holdout)
    run = Trainer(config, splits, LocalRuntime(config.run_dir, torch.device(device)), journal.Journal(config.run_dir))
    run.parallel.train()
    return run


def losses(run, steps):
    """Of the first steps, one dict each."""
    found = []
    for images, ctx in islice(run.batches(0), steps):
        logs = run.step(images, ctx)
        found.append({key: float(value) for key, value in logs.items() if key.startswith("loss/")})
    return found


@pytest.fixture
def watched():
    """Within the body anything that makes the host wait for the GPU is an error."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode(before)


def assert_no_wait(run, watched):
    batches = run.batches(0)
    for images, ctx in islice(batches, 3):  # the first ones make buffers, choose kernels, write a picture
        run.step(images, ctx)
    watched()
    logs = [run.step(images, ctx) for images, ctx in islice(batches, 3)]
    torch.cuda.set_sync_debug_mode("default")
    for each in logs:
        for key, value in each.items():
            assert math.isfinite(float(value)) or (run.guarded and float(each["optim/skipped_steps"]) == 1), key


@pytest.mark.parametrize("task", ["in place", "fewer", "extra"])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_waits_inside_a_step(tmp_path, watched, method, task):
    run = engine(make_config(tmp_path, method, **TASKS[task]), "cuda")
    assert run.precision == "bf16" or not torch.cuda.is_bf16_supported()
    assert_no_wait(run, watched)


@pytest.mark.parametrize("fields", [{"train.precision": "fp16"}, {"train.on_nan": "skip"}], ids=["fp16", "on_nan"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_waits_inside_a_step_that_may_be_left_out(tmp_path, watched, name, fields):
    fields = {"optim.name": name, "optim.lr": 0.01, **fields}
    assert_no_wait(engine(make_config(tmp_path, "mocov2", **fields), "cuda"), watched)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fp16_finds_its_scale_and_trains(tmp_path, name):
    config = make_config(tmp_path, "byol", **{"train.precision": "fp16", "optim.name": name, "optim.lr": 0.01})
    run = engine(config, "cuda")
    before = [p.detach().clone() for p in run.model.encoder.parameters()]
    run.run()
    points = journal.read(config.run_dir)
    assert list(points) == [1, 2, 3, 4] and points[4]["optim/skipped_steps"] < 0.5
    assert all(math.isfinite(value) for point in points.values() for value in point.values())
    assert not any(torch.equal(old, new) for old, new in zip(before, run.model.encoder.parameters(), strict=True))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_the_losses_of_three_steps_are_those_of_a_cpu(tmp_path, monkeypatch, method, task):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    local = {"views.local_count": 2} if METHODS[method].multi_crop and task == "extra" else {}
    # Small steps: a ReLU that flips by rounding would move the next one.
    fields = {**FP32, **TASKS[task], **local, "optim.name": "sgd", "optim.lr": 1e-3, "optim.warmup_epochs": 0}
    on_cpu, on_gpu = (
        losses(engine(make_config(tmp_path / device, method, **fields), device), 3) for device in ("cpu", "cuda")
    )
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        assert ours == pytest.approx(theirs, rel=5e-3)


@pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("clang")), reason="no C compiler")
def test_compiled_networks_compute_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    fields = {**FP32, "optim.name": "sgd", "optim.lr": 1e-3, "optim.warmup_epochs": 0}
    eager, compiled = (
        losses(engine(make_config(tmp_path / str(asked), "byol", **fields, **{"train.compile": asked}), "cuda"), 3)
        for asked in (False, True)
    )
    for ours, theirs in zip(compiled, eager, strict=True):
        assert ours == pytest.approx(theirs, rel=5e-3)


@pytest.mark.parametrize("method", METHODS)
def test_deterministic_steps_are_bit_identical(tmp_path, method):
    found = []
    try:
        for i in range(2):
            run = engine(make_config(tmp_path / str(i), method, **{"train.deterministic": True}), "cuda")
            losses(run, 3)
            found.append({**run.model.state_dict(), **{key: torch.tensor(x) for key, x in run.evaluate(3).items()}})
            assert {"knn/top1", "linear/top1"} <= found[-1].keys()
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@pytest.fixture
def group(tmp_path):
    """A process group of NCCL with this process alone."""
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1, device_id=device)
    yield
    dist.destroy_process_group()


def test_ddp_on_nccl_takes_the_same_steps(tmp_path, monkeypatch, group):
    fields = {**FP32, "optim.name": "sgd", "optim.lr": 1e-2}
    alone = engine(make_config(tmp_path / "alone", "mocov2", **fields), "cuda")
    wrapped = engine(make_config(tmp_path / "wrapped", "mocov2", **fields), "cuda")
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "world_size", lambda: 2)  # one worker is not wrapped
        wrapped.parallel = distributed.data_parallel(wrapped.model, wrapped.runtime.device)
    wrapped.parallel.train()
    assert isinstance(wrapped.parallel, torch.nn.parallel.DistributedDataParallel)
    for ours, theirs in zip(losses(wrapped, 3), losses(alone, 3), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    rows = torch.arange(6.0, device="cuda").view(3, 2)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "world_size", lambda: 2)
        assert torch.equal(distributed.gather(rows), rows) and torch.equal(distributed.mean(rows), rows / 2)
        assert distributed.first_nonempty("why", rows.device) == "why"


def test_synchronised_statistics_on_nccl_are_those_of_the_batch(tmp_path, monkeypatch, group):
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "world_size", lambda: 2)  # one worker has nothing to synchronise
        layer = norm.convert_norm(torch.nn.BatchNorm2d(8), "sync", torch.device("cuda", 0)).cuda()
    assert isinstance(layer, torch.nn.SyncBatchNorm)
    x = torch.randn(16, 8, 5, 5, device="cuda").contiguous(memory_format=torch.channels_last).requires_grad_()
    apply = torch.nn.modules._functions.SyncBatchNorm.apply  # the layer itself takes a short cut where it is alone
    out = apply(x, layer.weight, layer.bias, layer.running_mean, layer.running_var, 1e-5, 0.1, dist.group.WORLD, 1)
    expected = torch.nn.functional.batch_norm(x, None, None, layer.weight, layer.bias, True)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (out, expected))
    torch.testing.assert_close(ours, theirs)


def test_an_encoder_is_worth_what_it_is_on_a_cpu(tmp_path):
    config = make_config(tmp_path, "byol", **{"data.limit": 64, **FP32})
    engine(config, "cuda").run()
    state = next(checkpoint.latest(config.run_dir))
    on_cpu = engine(cfg.replace(config, {"tracking.run_name": "cpu"}), "cpu")
    on_cpu.restore(state)
    point, found = journal.read(config.run_dir)[4], on_cpu.evaluate(3)
    assert point["knn/top1"] == pytest.approx(found["knn/top1"], abs=0.02)
    assert point["linear/top1"] == pytest.approx(found["linear/top1"], abs=0.02)
    assert point["feature/effective_rank"] == pytest.approx(found["feature/effective_rank"], rel=0.01)


@pytest.fixture
def little_memory():
    """Two gigabytes of the GPU's."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2e9 / torch.cuda.get_device_properties(0).total_memory)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_what_does_not_fit_is_told_in_a_line(tmp_path, little_memory):
    large = {"encoder.name": "resnet50", "encoder.stem": "cifar", "data.image_size": 64, "train.batch_size": 512}
    config = make_config(tmp_path, "simclr", **large)
    speed = timing.time_steps(config)
    assert speed.too_many is not None and speed.each > 0
    with pytest.raises(ConfigError, match=r"^train\.batch_size: got 512, but a step of \d+ images does not fit"):
        estimate.estimate_runs([config], [512], 1, True)
    with pytest.raises(RunFailed, match=r"^train\.batch_size: got 512, for which there is not enough memory"):
        engine(config, "cuda").run()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("first", "second"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_goes_on_on_the_other_kind_of_device(tmp_path, name, first, second):
    fields = {"data.limit": 64, "train.epochs": 2, "optim.name": name, "optim.lr": 0.01, **FP32}
    engine(make_config(tmp_path, "byol", **fields, **{"train.stop_after": 1}), first).run()
    run = engine(make_config(tmp_path, "byol", **fields), second)
    run.run()
    points = journal.read(run.config.run_dir)
    assert list(points) == [1, 2] and all(math.isfinite(point["loss/total"]) for point in points.values())
    assert next(checkpoint.latest(run.config.run_dir))["epoch"] == 2
    assert ("memory/device_peak_bytes" in points[1], "memory/device_peak_bytes" in points[2]) == (
        first == "cuda",
        second == "cuda",
    )
