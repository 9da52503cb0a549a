"""Losses that compare turned views, the contrastive one against a plain double loop; an accuracy that chance cannot raise."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rotssl.base.step import StepContext
from rotssl.engine.pretrainer import build_pretrainer
from rotssl.tasks.contrastive import nearest_mean, supervised_contrastive, with_positives
from tests.small_runs import CPU, PAPER, make_config

DOUBLE = torch.float64


def rows(*shape, seed=0):
    return F.normalize(torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)), dim=-1)


def by_hand(z, labels, temperature):
    """Khosla et al. 2020, eq. 2, as it is written: the sum over anchors that have a positive."""
    z, total = z.numpy(), 0.0
    for i in range(len(z)):
        positives = [p for p in range(len(z)) if p != i and labels[p] == labels[i]]
        below = sum(math.exp(z[i] @ z[a] / temperature) for a in range(len(z)) if a != i)
        each = [-math.log(math.exp(z[i] @ z[p] / temperature) / below) for p in positives]
        total += sum(each) / len(positives) if positives else 0.0
    return total


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_the_loss_is_that_of_the_paper_for_any_part_of_the_anchors_and_with_rows_of_no_image(temperature):
    labels = [0, 1, 0, 2, 1, 0, 3]  # of the last class and of one more there is a single row
    z = rows(len(labels), 5)
    expected = by_hand(z, labels, temperature)
    whole = torch.tensor(labels)
    found = supervised_contrastive(z, whole, z, whole, 0, temperature)
    assert float(found) == pytest.approx(expected) and int(with_positives(whole, 4)) == 5
    # Three workers of three rows, of which the last has two rows too few.
    padded, known = torch.cat([z, torch.zeros(2, 5, dtype=DOUBLE)]), torch.cat([whole, torch.tensor([-1, -1])])
    starts = range(0, 9, 3)
    parts = [supervised_contrastive(padded[i : i + 3], known[i : i + 3], padded, known, i, temperature) for i in starts]
    assert float(sum(parts)) == pytest.approx(expected) and int(with_positives(known, 4)) == 5


@pytest.mark.parametrize("form", [{}, PAPER, {"rotation.mode": "four_way"}], ids=["in place", "extra", "four ways"])
def test_the_task_compares_the_outputs_of_all_its_views(tmp_path, form):
    fields = {"rotation.loss": "contrastive", "rotation.temperature": 0.5, "rotation.fraction": 0.5, **form}
    task = build_pretrainer(make_config(tmp_path, "byol", **fields), CPU).tasks["rotation"].double().eval()
    ctx = StepContext(0, 0, 0, 0.0, np.arange(16), 0, 16)
    views = [torch.zeros(16, 3, 8, 8)] * (1 if task.crop else 2)
    made, targets = task.transform(views, ctx)
    features = [rows(len(view), 96, seed=v) for v, view in enumerate(made)]
    out = task.loss(features, targets)
    judged = [view[targets.rows] if task.in_place else view for view in features]
    z, labels = F.normalize(task.head(torch.cat(judged)), dim=1), torch.cat(targets.labels).tolist()
    anchors = sum(labels.count(label) > 1 for label in labels)
    assert len(z) == (32 if task.crop else 16) and z.shape[1] == task.config.hidden_dim
    assert float(out.loss.detach()) == pytest.approx(by_hand(z.detach(), labels, 0.5) / anchors)


def test_the_cosine_loss_is_the_mean_over_images_of_that_of_their_two_copies_which_turn_by_different_angles(tmp_path):
    fields = {**PAPER, "rotation.loss": "cosine", "rotation.fraction": 0.5}
    task = build_pretrainer(make_config(tmp_path, "byol", **fields), CPU).tasks["rotation"].double().eval()
    made, targets = task.transform([torch.zeros(16, 3, 8, 8)] * 2, StepContext(0, 0, 0, 0.0, np.arange(16), 0, 16))
    features = [rows(len(view), 96, seed=v) for v, view in enumerate(made)]
    out = task.loss(features, targets)
    first, second = (task.head(torch.cat(features)).detach().numpy()[part] for part in (slice(8), slice(8, 16)))
    by_hand = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(first, second, strict=True)]
    assert len(first) == 8 and float(out.loss.detach()) == pytest.approx(np.mean(by_hand))
    assert task.chance == 0  # it never tells which angle, so it is not judged by an accuracy

    ctx = StepContext(0, 0, 0, 0.0, np.arange(4096), 0, 4096)
    apart = (task.labels(1, ctx) - task.labels(0, ctx)) % 4
    counts = np.bincount(apart, minlength=4)
    assert counts[0] == 0 and all(abs(count - 4096 / 3) < 4 * math.sqrt(4096 * 2 / 9) for count in counts[1:])
    np.testing.assert_array_equal(
        targets.labels[1], task.labels(1, StepContext(0, 0, 0, 0.0, np.arange(16), 0, 16))[1::2]
    )


def test_the_nearest_mean_of_the_others_is_the_answer():
    close = F.normalize(torch.ones(4) + 0.01 * torch.eye(4), dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest_mean(close[torch.arange(4).repeat(2, 2)], torch.arange(4).repeat(2, 2), 4) == 16
    corners = F.normalize(torch.eye(4, dtype=DOUBLE) + 0.1, dim=1)
    labels = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3], [1, 1, 2, 2, 0, 3, 3, 0]])
    assert nearest_mean(corners[labels], labels, 4) == 16
    assert nearest_mean(corners[(labels + 1) % 4], labels, 4) == 16  # whatever the outputs of a class are
    wrong = corners[labels].clone()
    wrong[0, :2] = corners[3]
    assert nearest_mean(wrong, labels, 4) == 14


@pytest.mark.parametrize("form", ["own angles", "one angle", "every angle"])
def test_outputs_that_know_nothing_are_right_as_often_as_chance(form):
    right, count, gen = 0, 0, torch.Generator().manual_seed(1)
    for seed in range(150):
        views = 4 if form == "every angle" else 2
        z = rows(12, 16, seed=seed).expand(views, -1, -1)  # the views of an image are alike, whatever its angle
        labels = torch.randint(4, (views, 12), generator=gen)
        if form == "one angle":
            labels = labels[:1].expand(2, -1)
        elif form == "every angle":
            labels = torch.arange(4)[:, None].expand(-1, 12)
        right, count = right + int(nearest_mean(z, labels, 4)), count + labels.numel()
    spread = math.sqrt(0.25 * 0.75 / (150 * 12))  # an image counts once
    assert abs(right / count - 0.25) < 4 * spread
