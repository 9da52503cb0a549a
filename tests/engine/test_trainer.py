"""What the training loop does around the steps: states, faults, costs."""

import copy
import math
from itertools import islice
from pathlib import Path

import pytest
import torch

from rotssl import config as cfg
from rotssl.base import distributed
from rotssl.engine import breakdown, midway
from rotssl.engine.hardware import weight_layout
from rotssl.engine.runtime import RunFailed
from rotssl.runs import checkpoint, journal
from tests.devices import SmallMemory
from tests.small_runs import CPU, make_config, run_to, trainer

pytestmark = pytest.mark.contract


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_a_state_of_another_kind_of_device_is_taken_up(tmp_path, name):
    # Weights, and so their moments, lie otherwise on GPUs than on some CPUs; a checkpoint keeps how, which fused kernels rely on.
    fields = {"optim.name": name, "optim.lr": 0.1, "model.norm": "group"}
    whole, second = (trainer(make_config(tmp_path / part, "simclr", **fields)) for part in ("whole", "second"))
    batches = list(islice(whole.batches(0), 3))
    whole.step(*batches[0])
    whole.step(*batches[1])
    state = copy.deepcopy(whole.state(1))
    turned = 0
    for kept in state["optimizer"]["state"].values():
        for key, value in kept.items():
            if torch.is_tensor(value) and value.dim() == 4:
                as_images = value.is_contiguous(memory_format=torch.channels_last)
                other = torch.contiguous_format if as_images else torch.channels_last
                kept[key] = value.contiguous(memory_format=other)
                turned += kept[key].stride() != value.stride()
    assert turned
    second.restore(state)
    for run in (whole, second):
        run.step(*batches[2])
    for (key, ours), other in zip(second.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(ours, other), key


@pytest.mark.parametrize("task", [{}, {"rotation.mode": "extra"}], ids=["in place", "extra"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_steps_take_the_fast_ways(tmp_path, monkeypatch, name, task):
    run = trainer(make_config(tmp_path, "byol", **{"optim.name": name, "optim.lr": 0.01, **task}))
    assert all(group["fused"] for group in run.optimizer.param_groups)
    views, teachers, lerp = [], [], torch._foreach_lerp_
    for encoder in (run.model.encoder, run.model.teacher[0]):
        encoder.register_forward_pre_hook(lambda module, inputs: views.append(inputs[0]))
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *given: teachers.append(len(given[0])) or lerp(*given))
    run.step(*next(run.batches(0)))
    assert len(views) >= 2
    for view in views:
        assert view.is_contiguous(memory_format=torch.channels_last) and not view.is_contiguous()
    assert teachers == [len([*run.model.teacher.parameters()])]  # all weights of the teacher at once


def exchanges(overrides):
    """Whether buffers are broadcast before a forward, the bytes of gradients exchanged at once, and whether they are copied."""
    run = trainer(make_config(**overrides))
    for batch in islice(run.batches(0), 3):
        run.step(*batch)  # after the first one gradients are grouped anew, in the order in which they come
    ddp = run.parallel
    return (
        ddp.will_sync_module_buffers(),
        ddp._get_ddp_logging_data()["rebuilt_bucket_sizes"],
        ddp.gradient_as_bucket_view,
    )


def test_cpu_workers_exchange_all_gradients_at_once_and_no_buffers(tmp_path, pool):
    wide = {"method.hidden_dim": 4096, "method.out_dim": 2048}  # more than the 25 MB that DDP exchanges at once
    overrides = {"folder": tmp_path, "method": "mocov2", **wide}
    weights = sum(p.numel() for p in trainer(make_config(**overrides)).model.parameters() if p.requires_grad)
    for broadcast, buckets, views in pool.run(exchanges, overrides):
        assert not broadcast and views and buckets == str(4 * weights)


def layout_of_weights(capabilities):
    """Of this rank, whose processor is said to have the capability at its place."""
    before = torch.backends.cpu.get_cpu_capability
    torch.backends.cpu.get_cpu_capability = lambda: capabilities[distributed.rank()]
    try:
        return str(weight_layout(CPU, torch.channels_last))
    finally:
        torch.backends.cpu.get_cpu_capability = before


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        (("AVX2", "AVX2"), "torch.channels_last"),
        (("AVX512", "AVX512"), "torch.contiguous_format"),
        (("AVX2", "AVX512"), "torch.contiguous_format"),
    ],
)
def test_workers_agree_on_the_layout_of_their_weights(pool, capabilities, expected):
    assert pool.run(layout_of_weights, capabilities) == [expected, expected]


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
    config = make_config(tmp_path, "byol", **{"optim.lr": 1e12, "optim.warmup_epochs": 1, "data.limit": 256})
    with pytest.raises(RunFailed, match=r"optim\.lr 1e\+12"):
        trainer(config).run()
    assert not list(Path(config.run_dir).glob("epoch_*/checkpoint.pt"))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
def test_no_weight_moves_from_the_step_that_breaks_down_on(tmp_path, monkeypatch, optimizer):
    assert midway.LOOK == 50  # as docs/reliability.md says
    monkeypatch.setattr(midway, "LOOK", 4)
    fields = {"data.limit": 160, "optim.name": optimizer, "optim.lr": 1e-3, "evaluation.knn_every": 0}
    run = trainer(make_config(tmp_path, "simclr", **fields))
    step, weights = run.step, []

    def watched(images, ctx):
        weights.append({name: p.detach().clone() for name, p in run.model.named_parameters()})
        return step(images, ctx)

    def breaks(ctx):
        if ctx.step in (5, 6):
            next(run.model.encoder.parameters()).grad[0] = math.nan

    run.step, run.model.method.after_backward = watched, breaks
    with pytest.raises(
        RunFailed, match=r"^optim/grad_norm became nan in epoch 1 .*; jobs/replay\.py takes step 5 apart$"
    ):
        run.run()
    assert len(weights) == 8  # of ten steps: the host looks after each fourth
    before, last = weights[5], dict(run.model.named_parameters())
    assert all(torch.equal(before[name], last[name]) for name in before)
    assert not all(torch.equal(weights[4][name], before[name]) for name in before)
    assert breakdown.recorded(run.journal.folder)["step"] == 5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_in_the_last_step_fails(tmp_path, precision):
    fields = {"data.limit": 64, "train.epochs": 1, "optim.warmup_epochs": 0, "evaluation.knn_every": 0}
    run = trainer(make_config(tmp_path, "simclr", **fields, **{"train.precision": precision}))

    def breaks(ctx):
        if ctx.step == run.total_steps - 1:
            next(run.model.encoder.parameters()).grad.fill_(math.inf)

    run.model.method.after_backward = breaks
    with pytest.raises(RunFailed, match=r"^optim/grad_norm became inf in epoch 1"):
        run.run()
    assert not (run.journal.folder / "encoder.safetensors").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"encoder.name": "resnet18", "train.precision": "bf16"}, "train.precision: got bf16, expected fp32"),
        ({"train.compile": True}, "train.compile: got true, but no C++ compiler was found (/no/such/compiler"),
    ],
)
def test_what_torch_cannot_do_on_a_cpu_is_one_line(tmp_path, monkeypatch, fields, words):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    # Views of 16 pixels come to 1 before the last stage of a ResNet with the stem for ImageNet.
    config = make_config(tmp_path, "simclr", **{"data.limit": 64, "encoder.stem": "imagenet", **fields})
    with pytest.raises(RunFailed) as caught:
        trainer(config).run()
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("found", "precision", "told"),
    [
        ({"architecture": "x86_64", "avx2": True}, "bf16", True),
        ({"architecture": "x86_64", "avx2": True}, "fp32", False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True}, "bf16", False),
        ({"architecture": "x86_64", "amx_bf16": True}, "bf16", False),
        ({"architecture": "aarch64"}, "bf16", False),
    ],
)
def test_bf16_on_a_processor_without_it_is_told_of(tmp_path, monkeypatch, found, precision, told):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    run = trainer(make_config(tmp_path, "simclr", **{"data.limit": 64, "train.precision": precision}))
    notes = []
    run.runtime.progress = lambda event: notes.append(getattr(event, "text", ""))
    run.run()
    assert told == any(note.startswith("train.precision bf16: this processor") for note in notes)


def test_device_seconds_add_up_over_numbers_of_workers(tmp_path, pool):
    overrides = {"folder": tmp_path, "method": "simclr", "data.limit": 64}
    pool.run(run_to, {**overrides, "train.stop_after": 2})
    run_to(overrides)  # goes on alone
    points = journal.read(make_config(**overrides).run_dir)
    two, whole = points[2], points[4]
    assert two["cost/device_seconds"] == pytest.approx(2 * two["cost/train_seconds"])
    alone = whole["cost/train_seconds"] - two["cost/train_seconds"]
    assert whole["cost/device_seconds"] == pytest.approx(two["cost/device_seconds"] + alone)


SHORT = {"data.limit": 64, "train.epochs": 3}


@pytest.mark.parametrize(
    ("method", "share", "advice"),
    [
        ("simclr", 0.8, "use train.batch_size 32, which fits, or more workers"),
        ("simclr", 0.35, "use train.batch_size 16, which fits, or more workers"),
        ("byol", 0.3, "steps of 16 images fit: use train.accumulate 4, or more workers"),
        ("byol", 0.8, "steps of 32 images fit: use train.accumulate 2, or more workers"),
        ("simclr", 0.001, "use a smaller encoder or smaller images: not even a step of 2 images fits"),
    ],
)
def test_a_batch_that_does_not_fit_into_memory_is_one_line_with_what_would(tmp_path, method, share, advice):
    fields = {"data.limit": 64, "train.epochs": 1, "train.batch_size": 64, "evaluation.knn_every": 0}
    fields |= {"evaluation.linear": False}
    with SmallMemory(1e12) as whole:
        trainer(make_config(tmp_path / "whole", method, **fields)).run()
    run = trainer(make_config(tmp_path / "small", method, **fields))
    with SmallMemory(share * whole.peak), pytest.raises(RunFailed) as caught:
        run.run()
    text = str(caught.value)
    assert text.startswith(f"train.batch_size: got 64, for which there is not enough memory; {advice} (")
    assert "\n" not in text


def without_room(overrides):
    """Why a worker has no room for a step, which it waits for nobody to find out."""
    run = trainer(make_config(**overrides))
    with SmallMemory(1e4), pytest.raises(RuntimeError) as caught:
        run.run()
    return str(caught.value)


def test_where_a_batch_does_not_fit_on_several_workers_each_raises_the_advice(tmp_path, pool):
    told = pool.run(without_room, {"folder": tmp_path, "method": "simclr", **SHORT})
    size = make_config(tmp_path, "simclr", **SHORT).train.batch_size
    for text in told:
        assert text.startswith(
            f"train.batch_size: got {size}, for which there is not enough memory; use a smaller batch, "
        )
        assert "\n" not in text


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
        ({"count": 65}, "64 images now, 65 then"),
        ({"classes": 1}, "the class names differ"),
        ({"labels": 1}, "the labels or their order differ"),
        ({"means": far}, "the pixels differ"),
    ):
        with pytest.raises(RunFailed, match=f"^data.root: the run was started with other images: {words}"):
            run.restore(state | {"images": known | change})
    for same in (known, known | {"means": near}, None):  # moved, decoded by another library, of version 0.1
        assert run.restore(state | {"images": same}) == 1


@pytest.mark.parametrize("recorded", [False, True])
def test_the_first_broken_step_is_known_to_the_number_also_late_in_a_run(recorded):
    seen, flags = breakdown.Breakdown(CPU), []
    for step, norm in ((9_999_998, 1.0), (9_999_999, math.inf), (10_000_000, math.nan), (10_000_001, 2.0)):
        seen.number = torch.tensor(step) if recorded else None
        assert seen.step is None or seen.step == 9_999_999
        flags.append(float(seen.see(step, torch.tensor(norm))))
    assert flags == [0, 1, 1, 1] and seen.step == 9_999_999
