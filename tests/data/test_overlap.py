"""The overlap of two crops of an image, and a bound on it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rotssl import config as cfg
from rotssl.base import rng
from rotssl.config.views import ViewsConfig
from rotssl.data.augment import Augment
from rotssl.data.crops import REDRAWS, Crops, draw_best, draw_crops, overlap, rows_of
from tests.data.views import pictures, step_at

SIDE, COUNT = 100, 500


def boxes(*rows):
    return Crops(*np.array(rows, np.int64).T)


def test_the_overlap_of_hand_made_boxes():
    # top, left, height, width
    whole, half = (0, 0, 10, 10), (0, 0, 5, 10)
    cases = [(whole, whole, 1), (whole, half, 0.5), (half, (5, 0, 5, 10), 0), (half, (20, 20, 3, 3), 0)]
    cases += [((0, 0, 4, 4), (2, 2, 4, 4), 4 / 28), ((3, 1, 2, 6), (0, 3, 9, 2), 4 / (12 + 18 - 4))]
    ours, others, expected = zip(*cases, strict=True)
    np.testing.assert_allclose(overlap(boxes(*ours), boxes(*others)), expected)
    np.testing.assert_allclose(overlap(boxes(*others), boxes(*ours)), expected)


def draws(least, positions, scale=(0.08, 1.0)):
    name, first = (0, 0, "view", 1, "crop"), draw_crops(rng.key("first"), positions, SIDE, SIDE, scale)

    def score(boxes, rows):
        return overlap(boxes, rows_of(first, rows))

    return first, draw_best(name, positions, SIDE, SIDE, scale, score, least)


def overlaps(crops):
    return np.stack([overlap(crops[0], other) for other in crops[1:]])


def array(crops):
    return np.stack([crops.top, crops.left, crops.height, crops.width], 1)


@pytest.mark.parametrize("least", [0.1, 0.3, 0.5])
def test_a_bound_redraws_what_overlaps_too_little_and_nothing_else(least):
    positions = np.arange(COUNT)
    first, plain = draws(0.0, positions)
    unbound = draw_crops(rng.key(0, 0, "view", 1, "crop"), positions, SIDE, SIDE, (0.08, 1.0))
    np.testing.assert_array_equal(array(plain), array(unbound))
    _, found = draws(least, positions)
    before, after = overlap(plain, first), overlap(found, first)
    kept = before >= least
    assert 0.1 < kept.mean() < 0.95
    np.testing.assert_array_equal(array(found)[kept], array(plain)[kept])
    assert (after >= before).all() and (after >= least).mean() > 0.8
    assert ((array(found)[:, :2] + array(found)[:, 2:]) <= SIDE).all()


def test_the_first_draw_that_fits_is_taken_else_the_one_that_overlaps_most():
    positions, scale = np.arange(COUNT), (0.08, 1.0)
    first, found = draws(0.6, positions)
    streams = [(0, 0, "view", 1, "crop"), *((0, 0, "view", 1, "crop", "again", i) for i in range(1, REDRAWS + 1))]
    tries = [draw_crops(rng.key(*stream), positions, SIDE, SIDE, scale) for stream in streams]
    shares = np.stack([overlap(crops, first) for crops in tries])
    fits = shares >= 0.6
    taken = np.where(fits.any(0), fits.argmax(0), shares.argmax(0))
    assert 0 < (~fits.any(0)).sum() < COUNT and set(taken) > {0, 1, 2}
    expected = np.stack([array(crops) for crops in tries])[taken, positions]
    np.testing.assert_array_equal(array(found), expected)


def test_a_box_is_a_function_of_seed_and_position():
    positions = np.arange(COUNT)
    whole = array(draws(0.5, positions)[1])
    np.testing.assert_array_equal(array(draws(0.5, positions[123:200])[1]), whole[123:200])


def test_views_have_the_bound_and_without_it_nothing_changes():
    plain, images, ctx = ViewsConfig(global_count=3, local_count=1, local_size=12), pictures(), step_at()
    bound = replace(plain, min_overlap=0.5)
    off, on = (Augment(views, 28, (0.0,), (1.0,), 0) for views in (plain, bound))
    one, two = off(images, ctx), on(images, ctx)
    assert torch.equal(one.full[0], two.full[0]) and torch.equal(one.local[0], two.local[0])
    assert not torch.equal(one.full[1], two.full[1])
    before, after = (overlaps(made.boxes(ctx, 28, 28)) for made in (off, on))
    assert before.shape == (2, len(images)) and after.mean() > before.mean()
    cuts = on.cuts(ctx, np.full(len(images), 28), np.full(len(images), 28))
    np.testing.assert_allclose(overlaps([cut.boxes for cut in cuts[:3]]), after)


def test_the_bound_is_a_share_that_can_be_reached():
    with pytest.raises(
        cfg.ConfigError, match=r"^views\.min_overlap: got 1, expected a number at least 0 and less than 1"
    ):
        cfg.build({"views.min_overlap": 1})
    assert "views.min_overlap" not in cfg.identity_of(cfg.build({}))
