"""Views made without shapes that depend on draws."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from rotssl.config.views import ViewsConfig
from rotssl.data import augment
from rotssl.data.augment import Augment, Crop
from tests.data.views import pictures, step_at

PLAIN = ViewsConfig(global_scale=(1.0, 1.0), jitter_p=0.0, grayscale=0.0, blur=(0.0,), solarize=(0.0,), flip=0.0)
BUSY = ViewsConfig(jitter_p=0.8, grayscale=0.3, blur=(1.0, 0.5), solarize=(0.0, 0.5), local_count=1, local_size=12)


def both_ways(
    config,
    images,
    mean,
    own=None,
    change=lambda masked: setattr(masked, "masked", (augment.masked_view, augment.masked_cut)),
):
    """Views by sorted samples, and by masks."""
    masked = Augment(config, 28, mean, (0.2,) * len(mean), 0, own)
    change(masked)
    ctx = step_at(positions=np.arange(len(images)))
    made = (Augment(config, 28, mean, (0.2,) * len(mean), 0, own)(images, ctx), masked(images, ctx))
    return [[*each.full, *each.local, *each.own.get("puzzle", ())] for each in made]


@pytest.mark.parametrize("channels", [1, 3])
def test_masked_views_are_those_of_sorted_samples(channels):
    colourless = replace(BUSY, jitter=(0.0, 0.4, 0.0, 0.1))
    for config in (BUSY, PLAIN, colourless, replace(PLAIN, jitter=(0.0, 0.0, 0.0, 0.0))):
        sorted_, masked = both_ways(config, pictures(64, channels), (0.4,) * channels, {"puzzle": Crop(16, (0.4, 0.5))})
        assert len(sorted_) == 3 + config.local_count
        for ours, theirs in zip(masked, sorted_, strict=True):
            assert torch.equal(ours, theirs)


def test_views_of_many_sizes_may_be_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # no code is made
    images, ctx = pictures(4), step_at(positions=np.arange(4))
    for size in range(16, 25):  # one more than torch allows by default
        compiled = Augment(BUSY, size, (0.4,) * 3, (0.2,) * 3, 0)
        compiled.compile()
        assert [view.shape[2] for view in compiled(images, ctx).full] == [size, size]


@pytest.mark.exhaustive  # the compiler takes most of a minute
def test_compiled_views_are_those_of_sorted_samples_within_a_shade():
    sorted_, compiled = both_ways(BUSY, pictures(10_000), (0.4, 0.5, 0.6), change=Augment.compile)
    for ours, theirs in zip(compiled, sorted_, strict=True):
        torch.testing.assert_close(0.2 * ours, 0.2 * theirs, atol=1 / 255, rtol=0)
