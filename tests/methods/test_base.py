"""What methods share: which views are compared, what is kept from step to step, and teachers."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rotssl.config.methods import METHODS
from rotssl.methods.base import Pending, other_views
from rotssl.methods.losses import byol_regression, dino_cross_entropy, negative_cosine, nt_xent
from tests.methods.small import context, make, random_views, steps
from tests.small_runs import make_config, trainer


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


def test_pending_keeps_the_passes_of_one_step_and_drops_those_of_a_skipped_one():
    pending, leaf = Pending(), torch.ones(2, requires_grad=True)
    pending.add(leaf * 1, context(step=0))  # a step that is not taken
    pending.add(leaf * 2, context(step=1))
    pending.add(leaf * 3, context(step=1))
    kept = pending.take()
    assert [part[0].item() for part in kept] == [2, 3]
    assert not any(part.requires_grad for part in kept)
    assert pending.take() == []
    pending.add(leaf * 4, context(step=2))
    pending.add(leaf * 5, context(step=2, repeat=True))
    assert [part[0].item() for part in pending.take()] == [4]


@pytest.mark.parametrize("name", ["mocov2", "swav"])
def test_a_skipped_step_adds_nothing_to_the_queue(tmp_path, name):
    run = trainer(make_config(tmp_path, name, **{"train.on_nan": "skip", "data.limit": 64}))
    queue, normalize = run.model.method.queue, run.augment.normalize
    list(steps(run, 1))
    once, batches = queue.clone(), list(run.batches(0))
    run.augment.normalize = lambda images: normalize(images) * math.nan
    run.step(*batches[1])
    run.augment.normalize = normalize
    run.step(*batches[2])
    kept, added = queue.view(-1, 40, queue.shape[-1]).split([24, 16], 1)
    assert torch.equal(kept, once.view(-1, 40, queue.shape[-1])[:, 16:]) and added.abs().sum(-1).all()


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
