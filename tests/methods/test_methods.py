"""What the methods do beyond their losses: queues, prototypes, centres, schedules, who is compared with whom."""

import math
from collections import deque
from itertools import islice

import numpy as np
import pytest
import torch
from lightly.loss import SwaVLoss
from torch.nn import functional as F

from rotssl import config as cfg
from rotssl.base.step import StepContext
from rotssl.config.methods import METHODS
from rotssl.engine.pretrainer import build_pretrainer
from rotssl.engine.trainer import emulates_bf16
from rotssl.methods.base import Pending, other_views
from rotssl.methods.losses import byol_regression, dino_cross_entropy, info_nce, negative_cosine, nt_xent
from rotssl.runs import journal
from tests.runs import CPU, batch, make_config, trainer

DIM = 6


def context(step=0, epoch=0, size=4, **fields):
    return StepContext(0, epoch, step, 0.0, np.arange(size), 0, size, **fields)


def make(name, **fields):
    torch.manual_seed(0)
    spec = METHODS[name]
    return spec.load()(spec.config(out_dim=DIM, hidden_dim=8, **fields), 8)


def random_views(count, size=4, seed=0, dim=DIM):
    return list(torch.randn(count, size, dim, generator=torch.Generator().manual_seed(seed)))


def steps(run, count):
    """Take the first steps of a run, and yield their contexts after each."""
    batches = (item for epoch in range(run.config.train.epochs) for item in run.batches(epoch))
    for images, ctx in islice(batches, count):
        run.step(images, ctx)
        yield ctx


# --- which views are compared ------------------------------------------------------------------------------------------


def test_other_views_are_all_pairs_with_a_target_but_itself():
    assert sorted(other_views(2, 2)) == [(0, 1), (1, 0)]
    assert sorted(other_views(4, 2)) == [(0, 1), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1)]


PAIRS = [(1, 0), (2, 0), (3, 0), (0, 1), (2, 1), (3, 1)]


def simclr_term(method, z, i, j):
    a, b = F.normalize(z[i], dim=1), F.normalize(z[j], dim=1)
    return nt_xent(a, b, a, b, 0, method.temperature)


TERMS = {
    "simclr": ([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)], simclr_term),  # no pair of two local views
    "byol": (PAIRS, lambda method, z, i, j: byol_regression(method.predictor(z[i]), z[j] + 1)),
    "simsiam": (PAIRS, lambda method, z, i, j: negative_cosine(method.predictor(z[i]), z[j])),
    "dino": (PAIRS, lambda method, z, i, j: dino_cross_entropy(z[i], z[j] + 1, method.center, 0.1, 0.04)),
}


@pytest.mark.parametrize("name", TERMS)
def test_a_loss_is_the_mean_over_the_pairs_of_views(name):
    pairs, term = TERMS[name]
    method, z = make(name), random_views(4)
    teacher = [view + 1 for view in z[:2]] if method.uses_teacher else None
    expected = sum(term(method, z, i, j) for i, j in pairs) / len(pairs)
    torch.testing.assert_close(method.loss(z, teacher, context()).loss, expected)


@pytest.mark.parametrize("name", ["barlow", "vicreg"])
def test_three_global_views_make_three_pairs(name):
    method, z = make(name), random_views(3)
    terms = [method.loss([z[i], z[j]], None, context()).loss for i, j in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(method.loss(z, None, context(global_views=3)).loss, sum(terms) / 3)


def test_moco_s_query_is_the_first_view_and_its_key_the_second(tmp_path):
    config = make_config(tmp_path, "mocov2", **{"rotation.weight": 0})
    model = build_pretrainer(config, CPU)
    views, ctx = batch(config, model)
    seen = {"query": [], "key": []}
    for who, encoder in (("query", model.encoder), ("key", model.teacher[0])):
        encoder.register_forward_pre_hook(lambda _, args, who=who: seen[who].append(args[0]))
    model(views, ctx)
    assert [len(passes) for passes in seen.values()] == [1, 1]
    assert torch.equal(seen["query"][0], views.full[0])
    assert torch.equal(seen["key"][0], views.full[1])


# --- what is kept from step to step ------------------------------------------------------------------------------------


def test_pending_keeps_the_passes_of_one_step_and_drops_those_of_a_skipped_one():
    pending, leaf = Pending(), torch.ones(2, requires_grad=True)
    pending.add(leaf * 1, context(step=0))  # a step that is not taken
    pending.add(leaf * 2, context(step=1))
    pending.add(leaf * 3, context(step=1))
    kept = pending.take()
    assert [part[0].item() for part in kept] == [2, 3]
    assert not any(part.requires_grad for part in kept)
    assert pending.take() == []


@pytest.mark.parametrize("size", [4, 8, 10])
def test_moco_s_queue_is_first_in_first_out(size):
    method, line = make("mocov2", queue_size=size), deque(maxlen=size)
    line.extend(method.queue.clone())
    for step in range(7):
        query, key = random_views(2, seed=step)
        before, ctx = method.queue.clone(), context(step)
        loss = method.loss([query], [7 * key], ctx).loss
        unit = F.normalize(key, dim=1)
        torch.testing.assert_close(loss, info_nce(F.normalize(query, dim=1), unit, before, 0.2))
        assert torch.equal(method.queue, before)
        method.after_step(ctx)
        places = [(4 * step + i) % size for i in range(4)]
        torch.testing.assert_close(method.queue[places], unit)
        line.extend(unit)
        torch.testing.assert_close(
            torch.stack(sorted(method.queue, key=lambda row: row[0])), torch.stack(sorted(line, key=lambda row: row[0]))
        )
    torch.testing.assert_close(method.queue.norm(dim=1), torch.ones(size))


@pytest.mark.parametrize("name", ["mocov2", "swav"])
def test_a_skipped_step_leaves_a_hole_in_the_queue(tmp_path, name):
    run = trainer(make_config(tmp_path, name, **{"train.on_nan": "skip", "data.limit": 64}))
    queue, normalize = run.model.method.queue, run.augment.normalize
    list(steps(run, 1))
    once, batches = queue.clone(), list(run.batches(0))
    run.augment.normalize = lambda images: normalize(images) * math.nan
    run.step(*batches[1])
    run.augment.normalize = normalize
    run.step(*batches[2])
    for places in (queue != once).any(-1).view(-1, 40):  # 16 places moved, after a hole of 16
        assert places.nonzero().flatten().tolist() == [*range(8), *range(32, 40)]


# --- SwAV ----------------------------------------------------------------------------------------------------------------


def test_swav_s_prototypes_are_frozen_at_first_and_always_of_length_one(tmp_path):
    run = trainer(make_config(tmp_path, "swav", **{"method.freeze_steps": 3, "data.limit": 96, "optim.lr": 1.0}))
    weight = run.model.method.prototypes.weight
    start = weight.detach().clone()
    for ctx in steps(run, 5):
        torch.testing.assert_close(weight.detach().norm(dim=1), torch.ones(12))
        moved = (weight.detach() - start).abs().max()
        assert moved < 1e-6 if ctx.step < 3 else moved > 1e-3, ctx.step


def test_swav_s_queue_takes_part_once_it_is_full_and_its_epoch_has_come():
    method, plain = make("swav", prototypes=5, queue_size=10, queue_after=2), make("swav", prototypes=5)
    with torch.no_grad():
        plain.prototypes.weight.copy_(method.prototypes.weight)
    weight = method.prototypes.weight.detach()
    for step, epoch in ((0, 0), (1, 1), (2, 2), (3, 2), (4, 3)):
        ctx = context(step, epoch)
        z = random_views(2, seed=step)
        without = plain.loss(z, None, ctx).loss
        scores = [F.normalize(view, dim=1) @ weight.T for view in z]
        (theirs,) = SwaVLoss()(scores, [], [queue @ weight.T for queue in method.queue])
        takes_part = epoch >= 2 and 4 * step >= 10
        torch.testing.assert_close(method.loss(z, None, ctx).loss, theirs if takes_part else without)
        assert abs(theirs - without) > 1e-3
        method.after_step(ctx)
        assert torch.equal(method.prototypes.weight, weight)
        for row, view in zip(method.queue, z, strict=True):
            torch.testing.assert_close(row[[(4 * step + i) % 10 for i in range(4)]], F.normalize(view, dim=1))


def test_swav_starts_close_to_ln_k():
    method = METHODS["swav"].load()(METHODS["swav"].config(out_dim=512, prototypes=64), 8)
    loss = method.loss(random_views(2, 256, dim=512), None, context(size=256)).loss
    assert loss.item() == pytest.approx(math.log(64), rel=0.05)


# --- SimSiam -------------------------------------------------------------------------------------------------------------


def test_simsiam_s_targets_get_no_gradient():
    method, z = make("simsiam", predictor_dim=4), [view.requires_grad_() for view in random_views(2)]
    method.loss(z, None, context()).loss.backward()
    first, second = (view.detach().clone().requires_grad_() for view in z)
    (-F.cosine_similarity(method.predictor(first), z[1].detach()).mean() / 2).backward()
    (-F.cosine_similarity(method.predictor(second), z[0].detach()).mean() / 2).backward()
    torch.testing.assert_close([view.grad for view in z], [first.grad, second.grad])


@pytest.mark.parametrize("kind", ["constant", "scheduled"])
def test_simsiam_s_predictor_keeps_its_rate_while_the_others_decay(tmp_path, kind):
    fields = {"method.predictor_lr": kind, "optim.lr": 0.4, "optim.warmup_epochs": 1, "data.limit": 64}
    run = trainer(make_config(tmp_path, "simsiam", **fields))
    predictor = {id(p) for p in run.model.method.predictor.parameters()}
    rates = {True: [], False: []}
    for epoch in range(4):
        for _, ctx in run.batches(epoch):
            run._schedule(ctx)
            for whose in rates:
                found = {
                    group["lr"]
                    for group in run.optimizer.param_groups
                    for p in group["params"]
                    if (id(p) in predictor) == whose
                }
                assert len(found) == 1
                rates[whose] += found
    warmup, decay = [0.1, 0.2, 0.3, 0.4], [0.2 * (1 + math.cos(math.pi * i / 12)) for i in range(12)]
    assert rates[False] == pytest.approx(warmup + decay)
    assert rates[True] == pytest.approx(warmup + [0.4] * 12 if kind == "constant" else rates[False])


# --- teachers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "start", "end"), [("byol", 0.996, 1.0), ("dino", 0.996, 1.0), ("mocov2", 0.99, 0.9)])
def test_momentum_follows_the_published_cosine(name, start, end):
    method, total = make(name, momentum=start, momentum_end=end), 50
    # DINO's utils.cosine_scheduler; with an end of 1 it is BYOL's 1 - (1 - tau) (cos(pi k / K) + 1) / 2.
    k = np.arange(total)
    theirs = end + 0.5 * (start - end) * (1 + np.cos(np.pi * k / total))
    assert [method.teacher_momentum(step / total) for step in k] == pytest.approx(list(theirs))
    assert method.teacher_momentum(1.0) == pytest.approx(end)


@pytest.mark.parametrize(
    "name", [name for name, spec in METHODS.items() if "momentum" in spec.config.__dataclass_fields__]
)
def test_the_teacher_is_the_moving_average_of_the_student(tmp_path, name):
    run = trainer(make_config(tmp_path, name, **{"method.momentum": 0.7, "data.limit": 64, "optim.lr": 0.1}))

    def both():
        ours = [*run.model.encoder.parameters(), *run.model.method.projector.parameters()]
        return [[p.detach().clone() for p in params] for params in (ours, run.model.teacher.parameters())]

    start, teacher = both()
    assert all(torch.equal(a, b) for a, b in zip(start, teacher, strict=True))
    for ctx in steps(run, 2):
        before, (student, teacher) = teacher, both()
        m = run.model.method.teacher_momentum(ctx.progress)
        for old, new, own in zip(before, teacher, student, strict=True):
            torch.testing.assert_close(new, m * old + (1 - m) * own)
    assert max((a - b).abs().max() for a, b in zip(start, teacher, strict=True)) > 1e-3


# --- DINO ----------------------------------------------------------------------------------------------------------------


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


@pytest.mark.contract
def test_swav_leaves_the_uniform_prediction_within_two_epochs_of_the_sample_in_half_precision(tmp_path):
    asked = cfg.build(
        {
            "method.name": "swav",
            "rotation.weight": 0,
            "train.stop_after": 2,
            "train.precision": "fp32" if emulates_bf16() else "bf16",  # which there takes minutes
            "evaluation.knn_every": 0,
            "storage.path": str(tmp_path),
            "tracking.run_name": "run",
        }
    )
    run = trainer(cfg.resolve(asked, 28, 5000))
    run.run()
    first, second = journal.read(run.config.run_dir).values()
    uniform = math.log(asked.method.prototypes)
    assert first["loss/ssl"] < uniform + 0.2  # the prototypes are random at first
    assert second["loss/ssl"] < uniform - 0.15
    assert second["feature/std"] > 0.3
