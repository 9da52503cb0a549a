"""Rotated views: their angles, resolution and share."""

import numpy as np
import pytest
import torch

from rotssl.base.step import StepContext
from rotssl.engine.pretrainer import build_pretrainer
from rotssl.tasks.rotation import rotate
from tests.small_runs import CPU, PAPER, make_config


def context(size, progress=0.0):
    return StepContext(0, 0, 0, progress, np.arange(size), 0, size)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_each_image_turns_by_its_own_angle(layout):
    images, turns = torch.randn(8, 3, 5, 5).contiguous(memory_format=layout), torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    expected = torch.stack([torch.rot90(image, k, (1, 2)) for image, k in zip(images, turns.tolist(), strict=True)])
    assert torch.equal(rotate(images, turns), expected)


def test_extra_views_are_the_method_s_at_a_lower_resolution(tmp_path):
    model = build_pretrainer(make_config(tmp_path, "byol", **PAPER, **{"rotation.resolution": 0.5}), CPU)
    ramp = torch.arange(16.0).expand(16, 3, 16, 16)  # brighter to the right
    (small, _), targets = model.tasks["rotation"].transform([ramp, ramp], context(16))
    assert small.shape == (16, 3, 8, 8)
    upright = small[targets.labels[0] == 0]
    torch.testing.assert_close(upright[0, 0, 3, 1:-1], torch.arange(2.5, 14, 2))
    turned = small[targets.labels[0] == 2]
    torch.testing.assert_close(turned[0].flip(1, 2), upright[0])


def test_the_share_of_rotated_images_changes_over_the_run(tmp_path):
    fields = {"rotation.fraction": 1.0, "rotation.fraction_end": 0.25}
    task = build_pretrainer(make_config(tmp_path, "byol", **fields), CPU).tasks["rotation"]
    views = [torch.randn(16, 3, 16, 16)] * 2
    counts = [task.transform(views, context(16, progress))[1].count for progress in (0.0, 0.5, 1.0)]
    assert counts == [16, 10, 4]  # 0.625 of 16 in the middle
    made, targets = task.transform(views, context(16, 1.0))
    same = [i for i in range(16) if torch.equal(made[0][i], views[0][i])]
    assert set(range(16)) - set(targets.rows.tolist()) <= set(same)
