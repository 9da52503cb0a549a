"""Optimizers, the groups of parameters, and the courses of rates and weights."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from rotssl.base.schedules import cosine, learning_rate, task_weight
from rotssl.config.sections import OptimConfig
from rotssl.engine.optim import LARS, build_optimizer
from tests.small_runs import make_config, trainer


def parameters(seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=gen, dtype=torch.float64)) for shape in ((4, 3), (2, 4), (4,))]


def lars(params, **options):
    groups = [{"params": params[:2], "weight_decay": 1e-2}, {"params": params[2:], "weight_decay": 0.0, "adapt": False}]
    return LARS(groups, lr=0.3, momentum=0.9, trust=0.02, **options)


def set_gradients(params, step):
    gen = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=gen, dtype=torch.float64)


def run(params, optimizer, steps):
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def test_lars_is_the_published_algorithm_over_twenty_steps():
    params = parameters()
    ours = lars(params)
    weights = [p.detach().flatten().tolist() for p in params]
    velocities = [[0.0] * len(w) for w in weights]
    for step in range(20):
        lr = ours.param_groups[0]["lr"] = ours.param_groups[1]["lr"] = 0.3 / (1 + step)
        set_gradients(params, step)
        # You et al., algorithm 1, one number after the other; the last parameter is of the group that is left out.
        for i, (w, v) in enumerate(zip(weights, velocities, strict=True)):
            decay, adapted = (1e-2, True) if i < 2 else (0.0, False)
            gradient = [g + decay * x for g, x in zip(params[i].grad.flatten().tolist(), w, strict=True)]
            local = 0.02 * math.hypot(*w) / math.hypot(*gradient) if adapted else 1.0
            v[:] = [0.9 * old + local * g for old, g in zip(v, gradient, strict=True)]
            w[:] = [x - lr * new for x, new in zip(w, v, strict=True)]
        ours.step()
        for p, w in zip(params, weights, strict=True):
            torch.testing.assert_close(
                p.detach().flatten(), torch.tensor(w, dtype=torch.float64), rtol=1e-12, atol=1e-12
            )


def test_lars_leaves_alone_what_has_no_gradient_and_survives_zero_norms():
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = lars(params)
    params[1].grad = torch.ones_like(params[1])
    with torch.no_grad():
        params[1].zero_()
    optimizer.step()
    assert torch.equal(params[0], before[0])
    assert torch.equal(params[2], before[2])
    # A weight of norm zero takes a plain step, as there is no ratio.
    torch.testing.assert_close(params[1].detach(), torch.full_like(params[1], -0.3))


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_a_restored_optimizer_goes_on_as_if_never_stopped(name, tmp_path):
    def fresh():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
        return model, build_optimizer(model, OptimConfig(name=name, lr=0.1))

    model, optimizer = fresh()
    run(list(model.parameters()), optimizer, range(10))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    run(list(model.parameters()), optimizer, range(10, 20))
    again, restored = fresh()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(state["model"])
    restored.load_state_dict(state["optimizer"])
    run(list(again.parameters()), restored, range(10, 20))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    # Without its momentum it would not have been the same.
    again.load_state_dict(state["model"])
    run(list(again.parameters()), build_optimizer(again, OptimConfig(name=name, lr=0.1)), range(10, 20))
    assert not torch.equal(next(model.parameters()), next(again.parameters()))


@pytest.mark.parametrize(("name", "cls"), [("lars", LARS), ("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_biases_and_norms_are_left_out_and_frozen_parameters_are_not_there(name, cls):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2), nn.Linear(2, 2))
    model[3].requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.2, weight_decay=0.01, momentum=0.8))
    assert type(optimizer) is cls
    decayed, others = optimizer.param_groups
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[2].weight)}
    assert {id(p) for p in others["params"]} == {
        id(p) for p in (model[0].bias, model[1].weight, model[1].bias, model[2].bias)
    }
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.01, 0.0)
    for group in (decayed, others):
        assert group["lr"] == 0.2
        assert (group["betas"][0] if name == "adamw" else group["momentum"]) == 0.8
    if name == "lars":
        assert (decayed["adapt"], others["adapt"]) == (True, False)
    every = build_optimizer(model, OptimConfig(name=name, lr=0.2, weight_decay=0.01, decay_norms=True)).param_groups
    assert sum(len(group["params"]) for group in every) == 6
    assert all(group["weight_decay"] == 0.01 and group.get("adapt", True) for group in every)


def test_cosine_runs_from_start_to_end():
    assert cosine(0.99, 1.0, 0.0) == pytest.approx(0.99)
    assert cosine(0.99, 1.0, 0.5) == pytest.approx(0.995)
    assert cosine(0.99, 1.0, 1.0) == pytest.approx(1.0)
    assert cosine(3.0, 1.0, 0.25) == pytest.approx(1 + 2 * (1 + math.sqrt(0.5)) / 2)


@pytest.mark.parametrize(
    ("step", "shape", "expected"),
    [
        (0, "cosine", 0.2),  # no step is wasted at a rate of 0
        (4, "cosine", 1.0),
        (9, "cosine", 2.0),
        (10, "cosine", 2.0),
        (60, "cosine", 1.0),
        (35, "cosine", 1 + math.sqrt(0.5)),
        (109, "cosine", 1 + math.cos(math.pi * 0.99)),
        (0, "constant", 0.2),
        (10, "constant", 2.0),
        (109, "constant", 2.0),
    ],
)
def test_the_rate_warms_up_to_its_peak_and_follows_its_course(step, shape, expected):
    assert learning_rate(2.0, step, 110, 10, shape) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.3 + 0.09),
        (4, 0.75),
        (9, 1.2),
        (10, 1.2),
        (60, 0.6006),
        (109, 0.0012 + 0.5994 * (1 + math.cos(0.99 * math.pi))),
    ],
)
def test_the_rate_starts_and_ends_where_it_is_told_to(step, expected):
    assert learning_rate(1.2, step, 110, 10, "cosine", start=0.3, final=0.0012) == pytest.approx(expected, rel=1e-12)


def test_the_rate_is_that_of_swav_s_official_code():
    # main_swav.py, with 100 epochs of 7 steps and 10 of warm-up. Its warm-up spends a step at the start's rate, ours doesn't.
    base, final, start, warmup, rest = 1.2, 0.0012, 0.3, 10 * 7, 90 * 7
    ours = [learning_rate(base, step, warmup + rest, warmup, "cosine", start, final) for step in range(warmup + rest)]
    cosine_part = [final + 0.5 * (base - final) * (1 + math.cos(math.pi * t / rest)) for t in range(rest)]
    assert ours[warmup:] == pytest.approx(cosine_part, rel=1e-12)
    assert ours[:warmup] == pytest.approx(list(np.linspace(start, base, warmup + 1)[1:]), rel=1e-12)
    assert learning_rate(base, warmup + rest, warmup + rest, warmup, "cosine", start, final) == pytest.approx(final)


def test_a_constant_rate_warms_up_from_its_start_and_ignores_the_final_one():
    rates = [learning_rate(1.2, step, 100, 3, "constant", start=0.3, final=0.1) for step in (0, 1, 2, 3, 99)]
    assert rates == pytest.approx([0.6, 0.9, 1.2, 1.2, 1.2])


def test_the_rate_without_warm_up_and_with_nothing_else():
    assert learning_rate(2.0, 0, 100, 0, "cosine") == 2.0
    assert [learning_rate(2.0, step, 4, 4, "cosine") for step in range(4)] == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize(
    ("shape", "first", "quarter", "middle", "last"),
    [("constant", 0.8, 0.8, 0.8, 0.8), ("linear", 0.8, 0.6, 0.4, 0), ("cosine", 0.8, 0.682842712, 0.4, 0)],
)
def test_the_weight_of_a_task_follows_its_course(shape, first, quarter, middle, last):
    got = [task_weight(0.8, progress, shape) for progress in (0.0, 0.25, 0.5, 1.0)]
    assert got == pytest.approx([first, quarter, middle, last])


@pytest.mark.parametrize("trust", [0.001, 0.02])
def test_lars_takes_its_trust_from_the_configuration(trust):
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    optimizer = build_optimizer(model, OptimConfig(name="lars", lr=0.3, trust=trust, weight_decay=0.0))
    set_gradients(list(model.parameters()), 0)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    slope, bias_slope = model.weight.grad, model.bias.grad
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), weight - 0.3 * trust * weight.norm() / slope.norm() * slope)
    torch.testing.assert_close(model.bias.detach(), bias - 0.3 * bias_slope)


def test_every_parameter_is_in_the_one_group_that_fits_it():
    model = nn.ModuleDict({"body": nn.Linear(3, 4), "predictor": nn.Linear(4, 2)})
    optimizer = build_optimizer(
        model, OptimConfig(name="sgd", lr=0.1, weight_decay=0.3), model["predictor"].parameters()
    )
    found = {
        id(p): (group["constant_lr"], group["decays"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found) == 4
    for name, constant in (("body", False), ("predictor", True)):
        assert found[id(model[name].weight)] == (constant, True, 0.3)
        assert found[id(model[name].bias)] == (constant, False, 0.0)


# --- through the engine -------------------------------------------------------------------------------------------------


def test_weight_decay_follows_its_cosine_where_there_is_decay(tmp_path):
    fields = {"optim.weight_decay": 0.04, "optim.weight_decay_end": 0.4, "data.limit": 64}
    run = trainer(make_config(tmp_path, "dino", **fields))
    for epoch in range(4):
        for _, ctx in run.batches(epoch):
            run.set_rates(ctx)
            # DINO's utils.cosine_scheduler.
            expected = 0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * ctx.step / 16))
            for group in run.optimizer.param_groups:
                assert group["weight_decay"] == (pytest.approx(expected) if group["decays"] else 0.0)
    assert {group["decays"] for group in run.optimizer.param_groups} == {True, False}
    fixed = trainer(make_config(tmp_path, "dino", **{**fields, "optim.weight_decay_end": None}))
    fixed.set_rates(ctx)
    assert {group["weight_decay"] for group in fixed.optimizer.param_groups} == {0.04, 0.0}


def first_update(tmp_path, **fields):
    """How each trained parameter moves in the first step of plain SGD, and the norm of its whole gradient."""
    plain = {"optim.lr": 0.1, "optim.warmup_epochs": 0, "optim.momentum": 0, "optim.weight_decay": 0, "data.limit": 64}
    run = trainer(make_config(tmp_path, "simclr", **plain, **fields))
    params = [p for p in run.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in params]
    logs = run.step(*next(iter(run.batches(0))))
    return torch.cat([(p.detach() - old).flatten() for p, old in zip(params, before, strict=True)]), logs[
        "optim/grad_norm"
    ]


@pytest.mark.contract
@pytest.mark.parametrize("share", [0.1, 0.5, 2.0])
def test_a_gradient_longer_than_clip_norm_is_scaled_to_it(tmp_path, share):
    free, norm = first_update(tmp_path)
    torch.testing.assert_close(free.norm(), 0.1 * norm, rtol=1e-3, atol=0)
    clipped, logged = first_update(tmp_path, **{"optim.clip_norm": share * float(norm)})
    assert logged == norm  # as it was before
    torch.testing.assert_close(clipped, min(1.0, share) * free, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_optimizers_take_what_has_no_gradient_at_first(name):
    gen = torch.Generator().manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.1, weight_decay=0.0))
    for step in range(3):
        before = model.bias.detach().clone()
        model.weight.grad = torch.randn(2, 3, generator=gen)
        model.bias.grad = None if step == 0 else torch.ones(2)
        optimizer.step()
        assert torch.equal(before, model.bias) == (step == 0)
