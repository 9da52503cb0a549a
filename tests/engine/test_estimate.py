"""What a run is predicted to take on any number of workers."""

import dataclasses
import math
import re
import tempfile

import pytest
import torch

from rotssl import config as cfg
from rotssl.base import distributed
from rotssl.config.fields import ConfigError
from rotssl.config.sweep import expand, parse
from rotssl.engine import estimate, flops, timing
from rotssl.engine import trainer as engine
from rotssl.engine.estimate import duration, epoch_seconds
from rotssl.engine.pretrainer import build_pretrainer
from rotssl.engine.timing import Speed, fit_line
from tests.devices import SmallMemory
from tests.programs import SMALL

pytestmark = pytest.mark.contract


def resolved(**fields):
    return cfg.resolve(cfg.build({**SMALL, "data.limit": 512, "scaling.num_workers": 0, **fields}), 16, 512)


SPEED = Speed("cpu", 1, "fp32", fixed=0.1, each=0.01, encode=0.001, matmul=1e9, flops=5e6, gradient=0.8e9, exchanges=0)


def test_an_epoch_is_its_steps_the_gradients_and_the_encoding():
    config = resolved(**{"train.batch_size": 32, "evaluation.holdout": 0.2})
    training, evaluation = epoch_seconds(config, SPEED, 520, 1)  # 16 steps; the rest fills no batch
    assert training == pytest.approx(16 * (0.1 + 32 * 0.01)) and evaluation == pytest.approx(650 * 0.001)
    # Four workers: a quarter of each batch, a quarter of the images to encode, and 2 x 3/4 of the gradients each second.
    training, evaluation = epoch_seconds(config, SPEED, 520, 4)
    assert training == pytest.approx(16 * (0.1 + 8 * 0.01 + 1.5)) and evaluation == pytest.approx(650 * 0.001 / 4)
    every = resolved(**{"evaluation.knn_every": 2, "evaluation.holdout": 0.2})
    assert epoch_seconds(every, SPEED, 520, 1)[1] == pytest.approx(650 * 0.001 / 2)
    # The first epoch, the first and the last, a twentieth of the training.
    for epochs, expected in ((1, 0.65), (3, 2 * 0.65 / 3), (100, 0.05 * 16 * (0.1 + 32 * 0.01))):
        auto = resolved(**{"evaluation.knn_every": "auto", "evaluation.holdout": 0.2, "train.epochs": epochs})
        assert epoch_seconds(auto, SPEED, 520, 1)[1] == pytest.approx(expected)
    assert epoch_seconds(config, SPEED, 520, 1, labelled=False)[1] == 0
    once = resolved(**{"evaluation.holdout": 0, "train.epochs": 5})  # at the end
    assert epoch_seconds(once, SPEED, 520, 1)[1] == pytest.approx(520 * 0.001 / 5)
    assert epoch_seconds(resolved(**{"evaluation.knn_every": 0}), SPEED, 520, 1)[1] == 0
    few = resolved(**{"evaluation.holdout": 0.2, "evaluation.bank": 200})
    assert epoch_seconds(few, SPEED, 520, 1)[1] == pytest.approx((200 + 130) * 0.001)
    # Pictures that are decoded: on the same cores, or beside a GPU's work.
    for device, step, measured in (("cpu", 0.42 + 32 * 0.02, 650 * 0.021), ("cuda", 32 * 0.02, 650 * 0.02)):
        speed = dataclasses.replace(SPEED, device=device, decode=0.02)
        assert epoch_seconds(config, speed, 520, 1) == pytest.approx((16 * step, measured))


def test_utilization_is_counted_work_over_time_and_rate():
    assert SPEED.utilization(40) == pytest.approx(40 * 5e6 / 0.5 / 1e9)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({8: 9.0, 16: 0.26, 32: 0.42}, (0.1, 0.01)),  # the largest two decide
        ({32: 0.32}, (0.0, 0.01)),
        ({16: 0.1, 32: 0.32}, (0.0, 0.01)),  # dearer by the image than in the mean: nothing is fixed
        ({16: 0.5, 32: 0.32}, (0.0, 0.01)),  # noise: a larger step took less
    ],
)
def test_the_line_through_two_sizes_is_never_negative(times, expected):
    assert fit_line(times) == pytest.approx(expected)


def test_what_is_measured_is_what_steps_take_and_nothing_is_left_on_disk(tmp_path, monkeypatch):
    def slow(trainer, images, ctx):
        sizes.append(len(images))
        assert ctx.progress == 0.5  # where a share that changes along a cosine has its mean
        now[0] += 0.01 + 0.001 * len(images)

    def encode(encoder, part, *_):
        now[0] += 0.002 * len(part)

    sizes, now, paper = [], [0.0], {"rotation.mode": "extra"}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing, "encode_share", encode)
    monkeypatch.setattr(timing.Trainer, "step", slow)
    monkeypatch.setattr(timing, "matmul_rate", lambda device, kind: 1e9)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    threads = torch.get_num_threads()
    speed = timing.time_steps(resolved(**{**paper, "train.batch_size": 64, "scaling.num_workers": 2}))
    assert (speed.fixed, speed.each, speed.encode) == pytest.approx((0.01, 0.001, 0.002))
    assert sorted(set(sizes)) == [4, 8, 16, 32, 64] and (speed.threads, torch.get_num_threads()) == (1, threads)
    sizes.clear()
    monkeypatch.setattr(timing, "ENOUGH_S", 0.015)
    timing.time_steps(resolved(**{**paper, "train.batch_size": 64}))
    assert sorted(set(sizes)) == [4, 8]  # larger ones would take too long
    assert list(tmp_path.iterdir()) == []


def test_times_are_means_over_the_phases_and_the_period_of_a_run(monkeypatch):
    def slow(trainer, images, ctx):
        assert ctx.step > 0  # which writes a picture
        each = 0.001 if ctx.progress < 0.6 else 0.004
        now[0] += 0.01 + each * len(images) + (0.08 if ctx.step % 4 == 0 else 0)

    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.Trainer, "step", slow)
    monkeypatch.setattr(timing, "matmul_rate", lambda device, kind: 1e9)
    speed = timing.time_steps(resolved(**{"views.size_start": 8, "views.size_until": 0.6, "rotation.every": 4}))
    assert (speed.fixed, speed.each) == pytest.approx((0.01 + 0.08 / 4, 0.6 * 0.001 + 0.4 * 0.004))


@pytest.mark.parametrize(
    "method", ["swav", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("mocov2", "dino"))]
)
def test_methods_with_a_memory_and_accumulation_are_measured_too(method, monkeypatch):
    monkeypatch.setattr(timing, "matmul_rate", lambda device, kind: 1e9)
    monkeypatch.setattr(timing, "TIMED", 1)
    sizes, step = [], timing.Trainer.step
    monkeypatch.setattr(
        timing.Trainer, "step", lambda run, images, ctx: sizes.append(len(images)) or step(run, images, ctx)
    )
    passes = 2 if method == "dino" else 1
    config = resolved(**{"method.name": method, "train.accumulate": passes})
    speed = timing.time_steps(config)
    model = build_pretrainer(config, torch.device("cpu"))
    assert speed.gradient == 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert speed.flops == flops.count_step(config, 0.5) / 32
    assert max(sizes) == 32 and all(size % passes == 0 for size in sizes)
    assert 0 < speed.step(8) < speed.step(32) < 60 and math.isfinite(speed.encode)


@pytest.mark.parametrize(
    ("norm", "method"), [("sync", "byol"), ("sync", "simclr"), ("batch", "byol"), ("group", "byol")]
)
@pytest.mark.parametrize("share", [{}, {"rotation.share": 0.2}])
def test_exchanges_are_those_that_a_step_makes(monkeypatch, norm, method, share):
    seen = []
    monkeypatch.setattr(distributed, "all_reduce", lambda sums: seen.append(len(sums)) or sums)
    monkeypatch.setattr(timing, "matmul_rate", lambda device, kind: 1e9)
    monkeypatch.setattr(timing, "TIMED", 1)
    monkeypatch.setattr(timing, "ENOUGH_S", 0)
    speed = timing.time_steps(
        resolved(**{"model.norm": norm, "method.name": method, **share})
    )  # two steps of the least size
    assert 2 * speed.exchanges == len(seen) and (speed.exchanges > 10) == (norm == "sync")
    with_wait = dataclasses.replace(SPEED, exchanges=10)
    assert with_wait.communication(1) == SPEED.communication(1) == 0
    assert with_wait.communication(2) - SPEED.communication(2) == pytest.approx(10 * timing.WAIT["cpu"])


def test_the_report_shows_the_workers_that_were_asked_for(monkeypatch):
    monkeypatch.setattr(estimate, "time_steps", lambda config, workers: dataclasses.replace(SPEED, gradient=0.0))
    config = resolved(**{"train.batch_size": 12, "train.epochs": 100, "scaling.num_workers": 3})
    lines = estimate.report(config, 120, True).splitlines()
    assert all(text.startswith("# ") and len(text) <= 130 for text in lines)
    rows = {text.split()[1]: text.split()[2:] for text in lines[3:-4]}
    assert list(rows) == ["1", "2", "3", "4"]  # of 8 workers each would have one image
    # 10 steps of 0.1 + 4 x 0.01 s, and 133 images to encode between three; 100 epochs of them on 3 devices.
    assert rows["3"] == ["1.4", "s", "0.0444", "s", "2.41", "min", "0.12", "(requested)"]


def test_durations_are_short():
    assert [duration(s) for s in (0.5, 119, 120, 7199, 7200, 1e6)] == [
        "0.5 s",
        "119 s",
        "2 min",
        "120 min",
        "2 h",
        "278 h",
    ]


def test_the_rate_of_matrix_products_is_counted_in_flops(monkeypatch):
    monkeypatch.setattr(timing, "_seconds", lambda call, device, count: [9.0, 9.0, 0.5, 0.25, 1.0, 0.5, 0.5])
    assert timing.matmul_rate(torch.device("cpu"), torch.float32) == pytest.approx(2 * 1024**3 / 0.5)


def test_no_timed_step_writes_a_picture_or_compares_gradients(monkeypatch):
    written = []
    monkeypatch.setattr(engine, "save_views", lambda *args: written.append("views.png"))
    monkeypatch.setattr(engine, "encoder_gradients", lambda *args: written.append("gradients") or {})
    monkeypatch.setattr(timing, "matmul_rate", lambda device, kind: 1e9)
    monkeypatch.setattr(timing, "TIMED", 1)
    timing.time_steps(resolved(**{"tasks.log_gradients_every": 50}))
    assert written == []


@pytest.mark.parametrize("fields", [{"rotation.fraction": 0.25}, {"rotation.fraction_end": 0.1}])
def test_each_timed_step_has_two_rotated_images_or_more(fields, monkeypatch):
    monkeypatch.setattr(timing, "matmul_rate", lambda device, kind: 1e9)
    monkeypatch.setattr(timing, "TIMED", 1)
    sizes = []
    monkeypatch.setattr(timing.Trainer, "step", lambda run, images, ctx: sizes.append(len(images)))
    timing.time_steps(resolved(**{"train.batch_size": 64, "model.norm": "batch", **fields}))
    share = min(fields.values())
    assert share * (min(sizes) - 1) < 2 <= share * min(sizes) and max(sizes) == 64


def test_runs_of_one_kind_cost_in_proportion_to_their_length(monkeypatch):
    asked, paper = [], {"rotation.mode": "extra"}
    speeds = {0.0: SPEED, 1.0: dataclasses.replace(SPEED, each=0.02)}
    monkeypatch.setattr(
        estimate, "time_steps", lambda config, workers: asked.append(config) or speeds[config.rotation.weight]
    )
    configs = [
        resolved(**{"train.epochs": epochs, "train.seed": seed, "optim.lr": lr, "rotation.weight": weight, **paper})
        for epochs, seed, lr, weight in ((2, 0, 0.1, 1.0), (6, 1, 1e9, 0.3), (4, 0, 0.1, 0.0))
    ]
    short, long, plain = estimate.estimate_runs(configs, [512] * 3, 2, False)
    each = [sum(epoch_seconds(configs[0], speeds[weight], 512, 2)) for weight in (1.0, 0.0)]
    assert (short, long, plain) == pytest.approx((2 * each[0], 6 * each[0], 4 * each[1]))
    assert len(asked) == 2 and not any(config.scaling.use_gpu for config in asked)  # one of each kind
    between = resolved(**{"rotation.weight": 1.0, "rotation.views": 1, **paper})
    low, middle, high = estimate.estimate_runs([configs[2], between, configs[0]], [512] * 3, 2, False)
    assert low / 4 < middle / between.train.epochs < high / 2


def test_worker_counts_that_cannot_share_the_batch_are_left_out(monkeypatch):
    monkeypatch.setattr(estimate, "time_steps", lambda config, workers: SPEED)
    text = estimate.report(resolved(**{"train.batch_size": 36}), 520, True)
    assert re.findall(r"^# +(\d+) +\S+ s ", text, re.MULTILINE) == ["1", "2", "4"]


def roomy(monkeypatch):
    monkeypatch.setattr(timing, "matmul_rate", lambda device, kind: 1e9)
    monkeypatch.setattr(timing, "TIMED", 1)
    monkeypatch.setattr(timing, "ENOUGH_S", 1e9)  # memory alone ends it


def test_only_a_workers_share_of_the_batch_is_timed(monkeypatch):
    sizes = []
    monkeypatch.setattr(timing.Trainer, "step", lambda trainer, images, ctx: sizes.append(len(images)))
    roomy(monkeypatch)
    for workers, fields, most in ((1, {}, 64), (4, {}, 16), (4, {"train.accumulate": 2}, 16)):
        sizes.clear()
        timing.time_steps(resolved(**{"train.batch_size": 64, "method.name": "dino", **fields}), workers)
        assert max(sizes) == most


@pytest.mark.exhaustive
def test_steps_that_do_not_fit_into_memory_end_the_measurement_and_are_told(monkeypatch):
    roomy(monkeypatch)
    monkeypatch.setattr(timing, "_sizes", lambda config, workers: [16, 32, 64][: 3 - (workers > 1)])
    config = resolved(**{"train.batch_size": 64, "model.norm": "batch"})
    with SmallMemory(1e12) as whole:
        assert timing.time_steps(config).too_many is None
    with SmallMemory(whole.peak * 0.6):
        speed = timing.time_steps(config)
        text = estimate.report(config, 512, True)
    assert speed.too_many == 64 and speed.each > 0 and speed.step(64) > speed.step(32)
    rows = re.findall(r"^# +(\d+) +(.*)$", text, re.MULTILINE)
    assert rows[0] == ("1", "out of memory: steps of 64 images did not fit here") and "out of" not in rows[1][1]
    with SmallMemory(whole.peak * 0.6), pytest.raises(ConfigError) as caught:
        estimate.estimate_runs([config], [512], 1, False)
    words = "train.batch_size: got 64, but a step of 64 images does not fit into the memory of a worker's cpu"
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)
    with SmallMemory(whole.peak * 0.6):
        assert estimate.estimate_runs([config], [512], 2, False)[0] > 0  # two workers have 32 each


@pytest.mark.exhaustive
def test_the_imagenet_sweep_on_a_device_of_a_gigabyte_is_refused_in_a_line():
    flags = ["--data.root", "/images", "--train.precision", "fp32"]  # fp16 takes minutes on a CPU
    sweep = parse(["--config", "jobs/sweeps/weight_budget_imagenet.yaml", *flags], "", "").sweep
    configs = [cfg.resolve(cell.config, 224, 1_281_167) for cell in expand(sweep)]
    with SmallMemory(1e9), pytest.raises(ConfigError) as caught:
        estimate.estimate_runs(configs, [1_281_167] * len(configs), 8, False)
    text = str(caught.value)
    assert re.match(r"train\.batch_size: got \d+, but a step of \d+ images does not fit into the memory", text)
    assert "\n" not in text


def test_a_device_with_little_room_multiplies_smaller_matrices(monkeypatch):
    sides = []

    def product(call, device, count):
        sides.append(len(call.args[0]))
        if sides[-1] > 2048:
            raise torch.OutOfMemoryError("out of memory")
        return [1.0] * count

    monkeypatch.setattr(timing, "_seconds", product)
    monkeypatch.setattr(torch, "randn", lambda *shape, device: torch.empty(*shape, device="meta"))
    assert timing.matmul_rate(torch.device("cuda", 0), torch.bfloat16) == 2 * 2048**3
    assert sides == [8192, 4096, 2048] and torch.get_float32_matmul_precision() == "highest"
