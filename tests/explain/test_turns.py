"""What the rotation head is asked, and what is counted: with heads whose answers are known."""

import pytest
import torch
from torch import nn

from rotssl.engine.pretrainer import build_pretrainer
from rotssl.explain.turns import Head
from tests.small_runs import CPU, make_config

FORMS = {
    "in place": {"rotation.weight": 1},
    "extra, smaller": {"rotation.mode": "extra", "rotation.weight": 1, "rotation.resolution": 0.5},
    "on the projector": {"rotation.mode": "extra", "rotation.weight": 1, "rotation.head_on": "projector"},
    "on a stage": {"rotation.weight": 1, "rotation.head_on": "stage"},
    "on the stem": {"rotation.weight": 1, "rotation.head_on": "stem"},
    "four ways": {"rotation.mode": "four_way", "rotation.weight": 1},
    "two angles": {"rotation.weight": 1, "rotation.degrees": "0,180"},
    "between": {"rotation.mode": "extra", "rotation.weight": 1, "rotation.degrees": "0,45,90"},
    "told": {"rotation.weight": 1, "rotation.conditioned": True},
    "tiles": {"rotation.weight": 1, "views.split": 2},
    "by share": {"rotation.share": 0.5},
}


def head_of(folder, **fields):
    model = build_pretrainer(make_config(folder, "byol", **fields), CPU)
    return Head(model.eval().requires_grad_(False))


class Corner(nn.Module):
    """Features of a picture: the means of its quadrants; with weights, so that it can stand for an encoder."""

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x[:, :1], 2).flatten(1)


class Answer(nn.Module):
    """Where the bright quadrant has gone: top left, then counter-clockwise bottom left, bottom right, top right."""

    def forward(self, x):
        return x[:, [0, 2, 3, 1]]


def bright(count=5):
    """Pictures whose top left quadrant is bright."""
    x = torch.zeros(count, 3, 16, 16)
    x[:, :, 2:6, 1:5] = torch.arange(1.0, count + 1)[:, None, None, None]
    return x


@pytest.fixture
def sure(tmp_path):
    """A head that knows the angle."""
    head = head_of(tmp_path, **{"rotation.weight": 1})
    head.model.encoder, head.task.head = Corner(), Answer()
    return head


def test_a_head_that_knows_the_angle_is_always_right(sure):
    found = sure.confusion(bright(), batch=2)
    assert torch.equal(found.counts, 5 * torch.eye(4, dtype=torch.int64))
    assert found.degrees == (0, 90, 180, 270) and found.accuracy == 1 and found.right.tolist() == [1.0] * 5


def test_rows_are_the_angles_and_columns_the_answers(sure):
    class Always(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot(torch.where(x.argmax(1) == 1, 3, 0), 4).float()

    sure.task.head = Always()  # a quarter turn clockwise for the features' second quadrant, else upright
    found = sure.confusion(bright(4))
    assert found.counts.tolist() == [[4, 0, 0, 0], [4, 0, 0, 0], [4, 0, 0, 0], [0, 0, 0, 4]]
    assert found.accuracy == 0.5 and found.right.tolist() == [0.5] * 4


def test_saliency_is_where_the_answer_is_and_nowhere_else(sure):
    maps = sure.saliency(bright(2))
    assert maps.shape == (2, 16, 16) and maps.max() == 1
    assert maps[:, 2:6, 1:5].min() > 0.3 and maps[:, 8:].max() == 0 and maps[:, :, 8:].max() == 0


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_the_task_can_be_asked(tmp_path, form):
    head = head_of(tmp_path, **FORMS[form])
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    angles = len(head.degrees)
    assert head.logits(images).shape == (3, angles)
    found = head.confusion(images)
    assert int(found.counts.sum()) == 3 * angles and found.counts.sum(1).tolist() == [3] * angles
    maps = head.saliency(images)
    assert maps.isfinite().all() and maps.min() >= 0 and (maps.flatten(1).amax(1) == 1).all()
