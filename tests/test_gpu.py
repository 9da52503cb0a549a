"""What only a GPU shows: no waiting inside a step, the numbers of a CPU, and a run that changes between the two."""

import math
from itertools import islice

import pytest
import torch

from rotssl import checkpoint, journal
from rotssl.data import datasets
from rotssl.engine import Trainer
from rotssl.methods import METHODS
from rotssl.runtime import LocalRuntime
from tests.runs import PAPER, make_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
FP32 = {"train.precision": "fp32"}


def engine(config, device):
    splits = datasets.load(config.data, config.evaluation.holdout)
    return Trainer(config, splits, LocalRuntime(config.run_dir, torch.device(device)), journal.Journal(config.run_dir))


@pytest.fixture
def watched():
    """Within the body anything that makes the host wait for the GPU is an error."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()

    def start():
        torch.cuda.set_sync_debug_mode("error")

    yield start
    torch.cuda.set_sync_debug_mode(before)


# As in batches of the default size: a share of the images turns, which falls from step to step.
FEWER = {"rotation.fraction": 0.75, "rotation.fraction_end": 0.25}


@pytest.mark.parametrize("task", [{}, FEWER, PAPER], ids=["in place", "fewer", "extra"])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_waits_inside_a_step(tmp_path, watched, method, task):
    run = engine(make_config(tmp_path, method, **task), "cuda")
    assert run.precision == "bf16" or not torch.cuda.is_bf16_supported()
    run.parallel.train()
    batches = run.batches(0)
    for images, ctx in islice(batches, 3):  # the first ones make buffers, choose kernels, write a picture
        run.step(images, ctx)
    watched()
    logs = [run.step(images, ctx) for images, ctx in islice(batches, 3)]
    torch.cuda.set_sync_debug_mode("default")
    assert all(math.isfinite(float(value)) for each in logs for value in each.values())


@pytest.mark.parametrize("task", [{}, FEWER, PAPER], ids=["in place", "fewer", "extra"])
@pytest.mark.parametrize("method", METHODS)
def test_first_losses_are_those_of_a_cpu(tmp_path, monkeypatch, method, task):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    logs = []
    for device in ("cpu", "cuda"):
        run = engine(make_config(tmp_path / device, method, **FP32, **task), device)
        run.parallel.train()
        images, ctx = next(run.batches(0))
        logs.append({key: float(value) for key, value in run.step(images, ctx).items() if key.startswith("loss/")})
    assert logs[1] == pytest.approx(logs[0], rel=2e-3)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
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
