"""What the cells of benchmarks/gpu.py compute from what they see, and that a training goes on where it was cut."""

import itertools
import json
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from torch.autograd import DeviceType

from rotssl import config as cfg
from rotssl.config import recipes
from rotssl.config.fields import ConfigError
from rotssl.runs import journal


@pytest.fixture
def scripts(monkeypatch):
    """The folder of the benchmarks, from which they can be imported; takes patches."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return monkeypatch


def test_gaps_and_busy_time_are_those_of_overlapping_kernels(scripts):
    import gpu_trace

    def event(kind, name, start, end):
        spent = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(name=name, device_type=kind, time_range=spent, cpu_parent=None, is_user_annotation=False)

    conv = "void elementwise_kernel<copy::{lambda(float)#1}>"  # as names of kernels go
    kernels = [(conv, 0, 40), (conv, 30, 50), ("add", 80, 100)]
    events = [event(DeviceType.CUDA, *each) for each in kernels]
    events += [event(DeviceType.CPU, "cudaLaunchKernel", at, at + 1) for at in (0, 10, 40)]
    events += [event(DeviceType.CPU, "draw", 45, 70), event(DeviceType.CUDA, "Optimizer.step#SGD.step", 0, 100)]
    rows, found = gpu_trace.summary(events, 2, cuda=True)
    assert [(row["kernel"], row["us a step"], row["a step"]) for row in rows] == [
        (conv, 30.0, 1.0),
        ("add", 10.0, 0.5),
    ]
    assert found["busy share"] == pytest.approx(0.7) and found["launches a step"] == 1.5
    assert found["us between launches"] == 20
    assert found["longest gaps"] == [{"us": 30, "host did": "draw 20 us, no operation 10 us"}]


def test_a_contender_that_fails_costs_the_others_nothing(scripts):
    import gpu_speed

    clock = itertools.count()  # a second from look to look
    scripts.setattr(gpu_speed.time, "perf_counter", lambda: next(clock))
    told = []
    cell = SimpleNamespace(tell=lambda **found: told.append(found), finish=lambda: None)
    ran = []

    def bad(steps):
        if "bad" in ran:
            raise ValueError("no memory left\nsomewhere")
        ran.append("bad")

    made = {"good": lambda steps: ran.append("good"), "bad": bad}
    gpu_speed.in_turn(cell, "contenders", made, 8, 2, 3, gpu_speed.Rate(32.0, {"good": 0.5}))
    assert ran == ["good", "bad", "good", "good"]
    assert [len(found["contenders"]) for found in told] == [2, 2, 2]  # after each round
    assert told[-1]["contenders"] == [
        {"contender": "good", "images/s": 16, "from": 16, "to": 16, "share of matmul rate": 0.25},
        {"contender": "bad", "failed": "ValueError: no memory left"},
    ]


def test_an_arm_has_as_many_epochs_as_fill_its_minutes_with_one_evaluation(scripts):
    import gpu_train

    now = [0.0]
    scripts.setattr(gpu_train.time, "perf_counter", lambda: now[0])

    def takes(seconds):
        def do(*_):
            now[0] += seconds
            return {}

        return do

    train = SimpleNamespace(epochs=1000)
    trainer = SimpleNamespace(steps_per_epoch=50, batches=lambda epoch: iter([((), ())] * 50), step=takes(0.1))
    trainer.parallel, trainer.state, trainer.evaluate = SimpleNamespace(train=takes(0)), takes(1.0), takes(7.0)
    cell = SimpleNamespace(args={"fields": {}, "arms": {"plain": {}}, "warmup_share": 0.1}, finish=lambda: None)
    cell.config, cell.trainer = lambda *_: SimpleNamespace(train=train), lambda *_: trainer
    # An epoch takes 50 steps of 0.1 s and a second for its checkpoint's copy; the evaluation 7 s, once.
    assert gpu_train._epochs_in(cell, "plain", SimpleNamespace(train=[]), 67) == 10


@pytest.mark.parametrize("smoke", [False, True])
def test_the_queue_s_trainings_are_configurations(scripts, smoke):
    import gpu_queue

    folder = Path(gpu_queue.__file__).parent
    cells = [each for each in gpu_queue.read_queue(folder / "gpu_queue.yaml", smoke) if each.kind == "train"]
    configs = []
    for each in cells:
        recipe = recipes.load_recipe(folder.parent / each.args["recipe"])
        config = cfg.resolve(cfg.build({"data.root": "here", **recipe, **each.args.get("fields", {})}), 32, 50_000)
        turns = {"plain": config.rotation.weight == 0}
        turns |= {mode: config.rotation.weight > 0 and config.rotation.mode == mode for mode in ("extra", "in_place")}
        if not smoke:
            assert turns[{"paper": "extra", "in-place": "in_place"}.get(each.name.partition("-")[2], "plain")], (
                each.name
            )
            assert config.train.epochs == 200 and config.evaluation.holdout == 0
        configs.append(config)
    assert len(cells) == 12 and {config.method.name for config in configs} == {"byol", "simsiam", "simclr", "swav"}


@pytest.fixture
def archive(tmp_path):
    """A small CIFAR-10 as JPEG files."""
    pictures = tmp_path / "pictures"
    for part, count in (("train", 8), ("test", 2)):
        for label in range(10):
            folder = pictures / part / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (25 * label, 20 * i, 90)).save(folder / f"{i}.jpg")
    with tarfile.open(tmp_path / "cifar10-jpeg.tar.gz", "w:gz") as file:
        for part in ("train", "test"):
            file.add(pictures / part, part)
    return tmp_path / "cifar10-jpeg.tar.gz"


@pytest.mark.contract
def test_a_training_that_is_cut_goes_on_later_and_only_under_the_same_configuration(scripts, tmp_path, archive):
    import gpu_cell
    import gpu_train

    fields = {"encoder.name": "small", "encoder.stem": "auto", "train.epochs": 4, "train.batch_size": 20}
    args = {"recipe": "jobs/recipes/paper/byol_cifar10.yaml", "fields": {**fields, "optim.warmup_epochs": 1}}
    spec = {"name": "byol", "kind": "train", "args": args, "device": "cpu", "smoke": False, "needs": []}
    spec |= {"scratch": str(tmp_path), "output": str(tmp_path), "archive": str(archive)}

    def call(seconds, **more):
        cell = gpu_cell.Cell({**spec, "ends": time.time() + seconds, **more}, tmp_path / "told.json")
        gpu_train.train(cell)

    told = tmp_path / "told.json"
    with pytest.raises(gpu_cell.TimeUp, match="another call goes on"):
        call(gpu_train.WRAP_UP_S / 2)  # less than a cell keeps for its end
    first = json.loads(told.read_text())["result"]
    assert first["epochs"] == 1 and first["measured"] == {} and first["starts"] == 1
    other = {"args": {**args, "fields": {**args["fields"], "optim.lr": 0.1}}}
    with pytest.raises(ConfigError, match=r"^optim\.lr: got 0\.1, but run 'run' was started with 0\.4"):
        call(600, **other)
    call(600)
    whole = json.loads(told.read_text())["result"]
    assert (whole["epochs"], whole["of"], whole["starts"]) == (4, 4, 2)
    assert set(whole["measured"]) == {"test/knn/top1", "test/linear/top1"} and whole["evaluation, s"] > 0
    assert whole["all, s"] > first["all, s"] and [row["epoch"] for row in whole["curve"]] == [1, 2, 3, 4]
    run = tmp_path / "runs" / "byol" / "run"
    trained = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "cost/epochs" in line]
    assert len(trained) == len(journal.read(run)) == 4
