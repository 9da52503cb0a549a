"""Views that are small at the start of a run."""

from dataclasses import replace

import numpy as np
import torch

from rotssl.config.views import ViewsConfig
from rotssl.data import augment
from rotssl.data.augment import Augment, Crop
from tests.data.views import pictures, step_at

GROWS = ViewsConfig(
    jitter_p=1.0, blur=(1.0, 0.5), solarize=(0.3, 0.0), local_count=2, local_size=12, size_start=16, size_until=0.6
)


def test_views_have_the_small_side_up_to_the_switch_and_the_full_one_from_then_on(monkeypatch):
    boxes, draw = [], augment.draw_crops
    monkeypatch.setattr(augment, "draw_crops", lambda *given: boxes.append(draw(*given)) or boxes[-1])
    images, own = pictures(), {"puzzle": Crop(20, (0.4, 0.5))}
    grows = Augment(GROWS, 28, (0.4,), (0.5,), 0, own)

    def sides(progress):
        made = grows(images, step_at(progress))
        return [[view.shape[2] for view in kind] for kind in (made.full, made.local, made.own["puzzle"])]

    assert sides(0.0) == sides(0.599) == [[16, 16], [7, 7], [11]]  # 12 and 20 by 16/28
    assert sides(0.6) == sides(1.0) == [[28, 28], [12, 12], [20]]
    small, large = boxes[5:10], boxes[10:15]
    for one, other in zip(small, large, strict=True):
        for side in ("top", "left", "height", "width"):
            np.testing.assert_array_equal(getattr(one, side), getattr(other, side))
    assert grows.evaluation(images).shape[2:] == (28, 28)


def test_small_views_are_those_of_a_run_on_small_ones_and_full_views_those_of_a_run_without_a_switch():
    images, same = pictures(), replace(GROWS, size_start=None)
    for progress, size in ((0.5, 16), (0.7, 28)):
        one = Augment(GROWS, 28, (0.4,), (0.5,), 0)(images, step_at(progress))
        other = Augment(replace(same, local_size=12 if size == 28 else 7), size, (0.4,), (0.5,), 0)(images, step_at())
        for ours, theirs in zip([*one.full, *one.local], [*other.full, *other.local], strict=True):
            assert torch.equal(ours, theirs)
    tiny = replace(GROWS, size_start=8, local_size=5)
    assert Augment(tiny, 28, (0.0,), (1.0,), 0)(images, step_at()).local[0].shape[2] == 4
