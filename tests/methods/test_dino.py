"""DINO's centre, temperatures and last layer."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.methods.small import DIM, context, make, random_views, steps
from tests.small_runs import make_config, trainer


def dino_target(method, teacher, epoch=0):
    """The distribution that the student is asked for: the gradient at equal logits is (1/K - target) / (temperature B)."""
    student = torch.zeros_like(teacher).requires_grad_()
    method.loss(
        [student, torch.zeros_like(teacher)], [torch.zeros_like(teacher), teacher], context(epoch=epoch)
    ).loss.backward()
    size, outputs = teacher.shape
    return 1 / outputs - 2 * student.grad * method.config.temperature * size  # half of the loss is the other pair


@pytest.mark.parametrize("passes", [1, 2])
def test_dino_s_centre_follows_eq_4_over_all_views_and_passes(passes):
    method, expected = make("dino", center_momentum=0.8), torch.zeros(DIM)
    for step in range(4):
        ctx = context(step, passes=passes)
        parts = [random_views(2, seed=10 * step + i) for i in range(passes)]
        for part in parts:
            method.loss(random_views(2), part, ctx)
        torch.testing.assert_close(method.center, expected)  # a step uses the centre of the steps before
        method.after_step(ctx)
        rows = [row for part in parts for view in part for row in view]
        expected = 0.8 * expected + 0.2 * sum(rows) / len(rows)
        torch.testing.assert_close(method.center, expected)


def test_dino_computes_each_view_s_distribution_once(monkeypatch):
    counts = {F.softmax: 0, F.log_softmax: 0}

    def counted(real):
        def call(*args, **options):
            counts[real] += 1
            return real(*args, **options)

        return call

    softmax, log_softmax = counts
    monkeypatch.setattr(F, "softmax", counted(softmax))
    monkeypatch.setattr(F, "log_softmax", counted(log_softmax))
    make("dino").loss(random_views(5), random_views(2, seed=1), context())
    assert list(counts.values()) == [2, 5]


def entropy(distribution):
    return -(distribution * distribution.clamp_min(1e-12).log()).sum(1).mean().item()


def test_dino_s_centring_flattens_and_its_temperature_sharpens():
    teacher = random_views(1)[0].mean(0).expand(4, -1)  # the same output for all images: collapse
    flat = math.log(DIM)
    by_temperature = [entropy(dino_target(make("dino", teacher_temperature=t), teacher)) for t in (10.0, 1.0, 0.1)]
    assert flat - 0.01 < by_temperature[0] < flat + 1e-4
    assert by_temperature[0] > by_temperature[1] + 0.01 > by_temperature[2] + 0.1
    method = make("dino", teacher_temperature=0.1, center_momentum=0.5)
    for step in range(30):
        ctx = context(step)
        method.loss([teacher, teacher], [teacher, teacher], ctx)
        method.after_step(ctx)
    assert entropy(dino_target(method, teacher)) == pytest.approx(flat, abs=1e-4)


@pytest.mark.parametrize("warmup", [0, 1, 2, 30])
def test_dino_s_teacher_temperature_is_that_of_the_official_code(warmup):
    method = make("dino", teacher_temperature_start=0.03, teacher_temperature=0.07, teacher_warmup_epochs=warmup)
    theirs = np.concatenate([np.linspace(0.03, 0.07, warmup), np.ones(40 - warmup) * 0.07])
    assert [method.teacher_temperature(epoch) for epoch in range(40)] == pytest.approx(list(theirs))
    # The loss asks for it by the epoch.
    teacher, last = random_views(1)[0], make("dino", teacher_temperature=0.07)
    torch.testing.assert_close(dino_target(method, teacher, epoch=35), dino_target(last, teacher))
    if warmup > 1:
        assert entropy(dino_target(method, teacher)) < entropy(dino_target(last, teacher)) - 1e-3


def test_dino_s_last_layer_is_frozen_at_first(tmp_path):
    run = trainer(make_config(tmp_path, "dino", **{"method.freeze_steps": 2, "data.limit": 64, "optim.lr": 0.01}))
    head = run.model.method.projector
    for ctx in steps(run, 4):
        if ctx.step == 0:
            start, first = head.last.weight.detach().clone(), head.layers[0].weight.detach().clone()
        assert torch.equal(head.last.weight, start) == (ctx.step < 2), ctx.step
        assert torch.equal(head.layers[0].weight, first) == (ctx.step == 0)


def test_dino_s_outputs_are_cosines():
    head = make("dino", bottleneck_dim=4).projector
    x = torch.randn(5, 8)
    expected = F.cosine_similarity(head.layers(x)[:, None], head.last.weight[None], dim=2)
    torch.testing.assert_close(head(x), expected)
