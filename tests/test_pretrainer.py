"""What a task's gradient is beside the method's, and the teacher's silence."""

import math

import pytest
import torch
from torch import nn

from rotssl import distributed
from rotssl.pretrainer import build_pretrainer, compare_gradients, encoder_gradients
from tests.test_contract import CPU, arithmetic, make_config, trainer


def test_ratio_and_cosine_are_those_of_the_written_out_gradients():
    encoder = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1))
    with torch.no_grad():
        encoder[0].weight.copy_(torch.tensor([[1.0, -2.0]]))
        encoder[1].weight.fill_(3.0)
        encoder[1].bias.requires_grad_(False)  # not trained: not compared
    x, y = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 0.0]])
    # The output is v (w . x) + b: its gradient is (v x, w . x).
    parts = {"ssl": encoder(x).sum(), "rotation": 2 * encoder(y).sum(), "jigsaw": -0.5 * encoder(x).sum()}
    logs = compare_gradients(encoder_gradients(parts, encoder))
    ssl, rotation = torch.tensor([3.0, 3.0, -1.0]), 2 * torch.tensor([6.0, 0.0, 2.0])
    cosine = ssl @ rotation / (ssl.norm() * rotation.norm())
    expected = {
        "rotation/grad_ratio": rotation.norm() / ssl.norm(),
        "rotation/grad_cosine": cosine,
        "jigsaw/grad_ratio": torch.tensor(0.5),
        "jigsaw/grad_cosine": torch.tensor(-1.0),
    }
    torch.testing.assert_close(logs, expected)
    assert not any(value.requires_grad for value in logs.values())
    sum(parts.values()).backward()  # the graph is still there, and nothing has been added to the gradients
    torch.testing.assert_close(encoder[0].weight.grad[0], 0.5 * ssl[:2] + rotation[:2])


@pytest.mark.parametrize("odd", [math.nan, math.inf, 0.0])
def test_what_cannot_be_compared_is_left_out(odd):
    task, method = torch.tensor([1.0, 2.0]), torch.tensor([0.0, odd])
    assert compare_gradients({"ssl": method, "rotation": task}) == {}


@pytest.mark.jobs
@pytest.mark.parametrize("method", ["simclr", "barlow"])
def test_half_precision_that_overflows_at_first_does_not_end_a_run_that_compares(tmp_path, method):
    fields = {"train.precision": "fp16", "tasks.log_gradients_every": 1, "data.limit": 64, **JIGSAW}
    run = trainer(make_config(tmp_path, method, **fields))
    assert not math.isfinite(run.step(*next(run.batches(0)))["optim/grad_norm"])  # it does overflow
    run.run()
    assert all(math.isfinite(value) for value in run.journal.point(4).values())


def compared(overrides, every=2):
    """The comparisons that the engine logs in its first four steps, by step."""
    with arithmetic(torch.float64):
        run = trainer(make_config(**overrides, **{"tasks.log_gradients_every": every, "data.limit": 64}))
        return [
            {key: float(distributed.mean(value)) for key, value in run.step(images, ctx).items() if "/grad_" in key}
            for images, ctx in run.batches(0)
        ]


JIGSAW = {"jigsaw.weight": 0.5, "jigsaw.grid": 2, "jigsaw.permutations": 10}
KEYS = {"rotation/grad_ratio", "rotation/grad_cosine", "jigsaw/grad_ratio", "jigsaw/grad_cosine", "optim/grad_norm"}


def test_every_so_many_steps_are_compared_with_the_weighted_losses(tmp_path):
    single, double = (
        compared({"folder": tmp_path, "method": "byol", **JIGSAW, "rotation.weight": weight}) for weight in (1.0, 2.0)
    )
    assert [set(step) for step in single] == [KEYS, {"optim/grad_norm"}, KEYS, {"optim/grad_norm"}]
    assert double[0]["rotation/grad_ratio"] == pytest.approx(2 * single[0]["rotation/grad_ratio"])
    for key in KEYS - {"rotation/grad_ratio", "optim/grad_norm"}:
        assert double[0][key] == pytest.approx(single[0][key])


def test_comparing_changes_nothing(tmp_path):
    weights = []
    for every in (0, 1):
        run = trainer(make_config(tmp_path, "byol", **{"tasks.log_gradients_every": every, "data.limit": 64}))
        for images, ctx in run.batches(0):
            run.step(images, ctx)
        weights.append(run.model.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


@pytest.mark.ddp
@pytest.mark.parametrize("method", ["simclr", "byol", "barlow"])
def test_two_workers_compare_as_one_does(tmp_path, pool, method):
    overrides = {"folder": tmp_path, "method": method, "model.norm": "group", **JIGSAW}
    alone = compared(overrides)
    for rank in pool.run(compared, overrides):
        for ours, theirs in zip(rank, alone, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)


def test_the_teacher_s_targets_are_without_noise_and_the_student_s_features_with_it(tmp_path):
    fields = {"encoder.name": "timm/vit_tiny_patch16_224", "encoder.patch_size": 4, "encoder.drop_path": 0.5}
    model = build_pretrainer(make_config(tmp_path, "dino", **fields), CPU).train()
    images = torch.randn(8, 3, 16, 16)
    assert torch.equal(model._teach([images])[0], model._teach([images])[0])
    assert not torch.equal(model.encoder(images), model.encoder(images))
