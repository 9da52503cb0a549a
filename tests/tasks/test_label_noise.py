"""Noise in the labels of rotations: how many, which ones, and that the images do not know of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from rotssl import config as cfg
from rotssl.base.step import StepContext
from rotssl.config.tasks import RotationConfig
from rotssl.tasks.rotation import Rotation
from tests.small_runs import make_config

SIZE = 400


def task(tmp_path, rate, **fields):
    rotation = {"rotation.label_noise": rate, **fields}
    return Rotation(make_config(tmp_path, "byol", **rotation).rotation, 8)


def context(epoch=0, step=0):
    return StepContext(0, epoch, step, 0.0, np.arange(step * SIZE, (step + 1) * SIZE), step * SIZE, SIZE)


def never_right(made, ctx, view=0):
    """Which labels were drawn anew: with a true label that is no angle, none can be right by chance."""
    return made.told(np.full(len(ctx.positions), -1), view, ctx) >= 0


@pytest.mark.parametrize("mode", ["in_place", "extra"])
@pytest.mark.parametrize("rate", [0.1, 0.3, 0.55, 1.0])
def test_exactly_the_set_share_of_each_batch_has_labels_drawn_anew(tmp_path, mode, rate):
    made = task(tmp_path, rate, **{"rotation.mode": mode})
    for step in range(3):
        ctx = context(step=step)
        assert never_right(made, ctx).sum() == round(rate * SIZE)
        known = made.labels(0, ctx)
        told = made.told(known, 0, ctx)
        assert 0 < (told != known).sum() < round(rate * SIZE)  # a quarter of them is right by chance
        assert (told == known).sum() >= SIZE - round(rate * SIZE)


def test_no_noise_gives_the_labels_themselves_and_all_of_it_labels_that_tell_nothing(tmp_path):
    contexts = [context(step=step) for step in range(50)]
    none, everything = task(tmp_path, 0.0), task(tmp_path, 1.0)
    known = np.concatenate([none.labels(0, ctx) for ctx in contexts])
    np.testing.assert_array_equal(known, np.concatenate([none.told(none.labels(0, c), 0, c) for c in contexts]))
    told = np.concatenate([everything.told(everything.labels(0, ctx), 0, ctx) for ctx in contexts])
    table = np.histogram2d(known, told, bins=4)[0]
    assert stats.chisquare(table.sum(0)).pvalue > 0.01  # uniform
    assert stats.chi2_contingency(table).pvalue > 0.01  # whatever the true angle
    assert abs((told == known).mean() - 0.25) < 0.01


def test_images_turn_by_their_true_angle_and_only_labels_are_wrong(tmp_path):
    clean, noisy = task(tmp_path, 0.0), task(tmp_path, 0.5)
    views = [torch.randn(SIZE, 3, 4, 4)] * 2
    (ours, theirs), ctx = (
        zip(clean.transform(views, context()), noisy.transform(views, context()), strict=True),
        context(),
    )
    assert all(torch.equal(one, two) for one, two in zip(*ours, strict=True))
    wrong = theirs[0].labels[0] != theirs[1].labels[0]
    assert torch.equal(theirs[1].labels[0], theirs[1].labels[1])  # the views of an image share angle and label
    np.testing.assert_array_equal(theirs[1].labels[0], noisy.told(noisy.labels(0, ctx), 0, ctx))
    assert 0.2 < wrong.double().mean() < 0.5


def test_the_noise_is_a_function_of_seed_epoch_position_and_view(tmp_path):
    made, ctx = task(tmp_path, 0.5, **{"rotation.mode": "extra"}), context(step=1)
    known = made.labels(0, ctx)
    whole = made.told(known, 0, ctx)
    for first in (0, 100, 300):  # workers and passes have parts of the batch
        part = ctx.part(first, first + 100)
        np.testing.assert_array_equal(made.told(known[first : first + 100], 0, part), whole[first : first + 100])
    others = [replace(ctx, seed=1), replace(ctx, epoch=1)]
    assert all((never_right(made, other) != never_right(made, ctx)).any() for other in others)
    assert (never_right(made, ctx, 1) != never_right(made, ctx, 0)).any()


def test_a_share_of_rotated_images_has_the_share_of_noise(tmp_path):
    made = task(tmp_path, 0.5, **{"rotation.fraction": 0.5, "rotation.fraction_end": None})
    views, counts = [torch.randn(SIZE, 3, 4, 4)] * 2, []
    for step in range(10):
        ctx = context(step=step)
        targets = made.transform(views, ctx)[1]
        counts.append(int(never_right(made, ctx)[targets.rows.numpy()].sum()))
        assert len(targets.rows) == SIZE // 2
    assert abs(np.mean(counts) - SIZE / 4) < 8  # half of the rotated half


def test_four_way_has_no_noise_and_the_rate_is_a_share():
    with pytest.raises(cfg.ConfigError, match=r"^rotation\.label_noise: got 0\.3, expected 0\.0 in mode four_way"):
        RotationConfig(mode="four_way", label_noise=0.3).check()
    with pytest.raises(cfg.ConfigError, match=r"^rotation\.label_noise: got 1\.5, expected a number at least 0 and at"):
        cfg.build({"rotation.label_noise": 1.5})
    assert "rotation.label_noise" not in cfg.identity_of(cfg.build({}))
