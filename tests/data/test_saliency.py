"""Crops that saliency chooses: pictures whose objects are known, how many, which ones, and that without it nothing changes."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from rotssl import config as cfg
from rotssl.base import distributed, rng
from rotssl.base.step import StepContext
from rotssl.config.rules import check_saliency
from rotssl.config.views import ViewsConfig
from rotssl.data.augment import Augment
from rotssl.data.crops import REDRAWS, Crops, draw_crops
from rotssl.data.saliency import Judge, saliency
from tests.data.views import pictures, step_at
from tests.devices import Waits
from tests.small_runs import arithmetic, make_config, trainer

SIDE, COUNT = 28, 200
WIDE = ViewsConfig(local_count=1, local_size=12, global_scale=(0.08, 1.0))
RULES = {"mean": 0.0, "half": 0.5}


def squares(count=COUNT, side=10):
    """Dark pictures with a bright square in one of the corners, which are known."""
    images = np.full((count, 1, SIDE, SIDE), 7, np.uint8)
    for i, image in enumerate(images[:, 0]):
        rows, columns = (slice(0, side) if i >> k & 1 else slice(-side, None) for k in (0, 1))
        image[rows, columns] = 200
    return images


def step(count=COUNT, first=0, epoch=0, seed=0):
    return StepContext(seed, epoch, 0, 0.0, np.arange(first, first + count), first, count)


def boxes_of(images, ctx, **fields):
    """The crops of the two global views, each (B, 4): top, left, height, width."""
    views = replace(WIDE, **fields)
    judge = Judge.of(images, ctx, views.good_crops, views.good_mass) if views.good_crops else None
    made = Augment(views, SIDE, (0.0,), (1.0,), ctx.seed).boxes(ctx, SIDE, SIDE, judge)
    return [np.stack([box.top, box.left, box.height, box.width], 1) for box in made]


def shown(image, box):
    """By counting: the pixels of the square in a box, as a share of those of the square and of those of the box."""
    top, left, height, width = (int(side) for side in box)
    seen = sum(image[0, y, left : left + width].tolist().count(200) for y in range(top, top + height))
    return seen / int((image == 200).sum()), seen / (height * width)


def test_saliency_and_its_mass_in_boxes_are_those_of_a_plain_loop():
    for channels in (1, 3):
        images = pictures(6, channels, 9, 13).numpy()
        found = saliency(images)
        ctx, (top, left) = step(6), np.divmod(np.arange(6), 3)
        boxes = Crops(top, left, np.array([1, 2, 3, 5, 7, 8]), np.array([10, 1, 4, 9, 12, 2]))
        masses = Judge.of(images, ctx, 0.0, 0.0).mass(boxes, np.arange(6))
        for image, ours, mass, box in zip(images, found, masses, zip(*vars(boxes).values(), strict=True), strict=True):
            edge = [(y, x) for y in range(9) for x in range(13) if y in (0, 8) or x in (0, 12)]
            usual = [sorted(int(colour[y, x]) for y, x in edge)[(len(edge) - 1) // 2] for colour in image]
            plain = [
                [sum((int(image[c, y, x]) - usual[c]) ** 2 for c in range(channels)) for x in range(13)]
                for y in range(9)
            ]
            np.testing.assert_array_equal(ours, plain)
            y, x, height, width = box
            inside = sum(sum(row[x : x + width]) for row in plain[y : y + height])
            assert mass == pytest.approx(inside / sum(map(sum, plain)), rel=1e-12)


def test_a_picture_of_one_colour_is_equally_salient_everywhere_and_an_object_at_the_border_is_one():
    assert (saliency(np.full((2, 3, 5, 6), 255, np.uint8)) == 1).all()
    images = squares(4)
    np.testing.assert_array_equal(saliency(images) > 0, images[:, 0] == 200)
    flat = np.full((4, 3, SIDE, SIDE), 9, np.uint8)  # no draw is better than the first one
    for before, after in zip(boxes_of(flat, step(4)), boxes_of(flat, step(4), good_crops=1.0), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("rule", RULES)
def test_chosen_crops_are_the_first_draws_that_show_enough_of_the_square_else_those_that_show_most(rule):
    images, ctx, least = squares(), step(), RULES[rule]
    before, after = boxes_of(images, ctx), boxes_of(images, ctx, good_crops=1.0, good_mass=least)
    average = 100 / SIDE**2
    for v in (0, 1):
        names = [(0, 0, "view", v, "crop"), *((0, 0, "view", v, "crop", "again", k) for k in range(1, REDRAWS + 1))]
        drawn = [draw_crops(rng.key(*name), ctx.positions, SIDE, SIDE, WIDE.global_scale) for name in names]
        tries = np.stack([np.stack([*vars(box).values()], 1) for box in drawn])
        good, changed = 0, 0
        for i, image in enumerate(images):
            scores = [shown(image, box)[0 if least else 1] for box in tries[:, i]]
            fits = [score >= least if least else score > average for score in scores]
            taken = fits.index(True) if any(fits) else int(np.argmax(scores))
            np.testing.assert_array_equal(after[v][i], tries[taken, i])
            good, changed = good + any(fits), changed + (taken > 0)
        assert good > 0.99 * COUNT and 0.2 * COUNT < changed < 0.8 * COUNT
        if least:
            mostly = [shown(image, box)[0] for image, box in zip(images, after[v], strict=True)]
            assert np.mean(np.array(mostly) >= 0.5) > 0.99
        np.testing.assert_array_equal(tries[0], before[v])


@pytest.mark.parametrize("share", [0.033, 0.25, 0.55, 1.0])
def test_exactly_the_set_share_of_each_batch_is_chosen_by_seed_epoch_and_position(share):
    images, seen = squares(), []
    for first in (0, COUNT):
        ctx = step(first=first)
        judge = Judge.of(images, ctx, share, 0.5)
        assert judge.chosen.sum() == round(share * COUNT)
        seen.append(judge.chosen)
        for begin in (0, 50, 150):  # workers and passes have parts of the batch
            part = Judge.of(images[begin : begin + 50], ctx.part(begin, begin + 50), share, 0.5)
            np.testing.assert_array_equal(part.chosen, judge.chosen[begin : begin + 50])
    seen += [Judge.of(images, other, share, 0.5).chosen for other in (step(seed=1), step(epoch=1))]
    assert share == 1 or all((seen[0] != other).any() for other in seen[1:])


def test_the_crops_of_images_that_were_not_chosen_stay_and_those_of_a_part_are_those_of_the_whole():
    images, ctx = squares(), step()
    fields = {"good_crops": 0.5, "good_mass": 0.5}
    plain, some, every = (boxes_of(images, ctx, **{**fields, "good_crops": share}) for share in (0.0, 0.5, 1.0))
    chosen = Judge.of(images, ctx, 0.5, 0.5).chosen
    for v in (0, 1):
        np.testing.assert_array_equal(some[v], np.where(chosen[:, None], every[v], plain[v]))
        part = boxes_of(images[40:90], ctx.part(40, 90), **fields)[v]
        np.testing.assert_array_equal(part, some[v][40:90])


def test_views_have_the_crops_and_counting_changes_no_bit():
    images, ctx = pictures(), step_at()
    fields = ({}, {"log_saliency": True}, {"good_crops": 1.0, "good_mass": 0.6})
    made = [Augment(replace(WIDE, **given), SIDE, (0.0,), (1.0,), 0) for given in fields]
    plain, counted, chosen = (augment(images, ctx) for augment in made)
    assert all(torch.equal(one, two) for one, two in zip(plain.full, counted.full, strict=True))
    assert all(torch.equal(plain.local[0], other.local[0]) for other in (counted, chosen))
    assert not torch.equal(plain.full[0], chosen.full[0])
    drawn = [augment.draw(ctx, images) for augment in made]
    assert torch.equal(drawn[0].numbers, drawn[1].numbers[:-2])
    judge = Judge.of(images.numpy(), ctx, 1.0, 0.6)
    rows, crops = np.arange(len(images)), made[2].boxes(ctx, SIDE, SIDE, judge)
    mass, good = (np.mean([kind(box, rows) for box in crops]) for kind in (judge.mass, judge.good))
    assert plain.logs == {} and chosen.logs == {"views/mass": np.float32(mass), "views/good": np.float32(good)}
    assert chosen.logs["views/mass"] > counted.logs["views/mass"]


# --- in training --------------------------------------------------------------------------------------------------------

SMALL = {"data.limit": 64, "train.batch_size": 16, "rotation.weight": 0, "model.norm": "group"}
CHOSEN = {"views.good_crops": 0.5, "views.global_scale": (0.08, 1.0)}


def logs_of(overrides, steps=6):
    """The logs of the first steps, means over workers, and the last state."""
    with arithmetic(torch.float64):
        run = trainer(make_config(method="byol", **overrides))
        batches = islice((item for epoch in range(4) for item in run.batches(epoch)), steps)
        logs = [run.step(images, ctx) for images, ctx in batches]
        seen = [{key: float(distributed.mean(log[key].double())) for key in sorted(log)} for log in logs]
        return seen, {name: value.numpy().copy() for name, value in run.model.state_dict().items()}


@pytest.mark.contract
def test_counting_changes_no_training_and_good_crops_do(tmp_path):
    known = {"folder": tmp_path, **SMALL, "views.global_scale": (0.08, 1.0)}
    plain, weights = logs_of(known)
    counted, same = logs_of(known | {"views.log_saliency": True})
    chosen, _ = logs_of(known | CHOSEN)
    for name, value in weights.items():
        np.testing.assert_array_equal(value, same[name], err_msg=name)
    for off, counting, on in zip(plain, counted, chosen, strict=True):
        assert off.keys() | {"views/mass", "views/good"} == counting.keys() == on.keys()
        assert 0 < counting["views/mass"] < 1 and counting["views/good"] < on["views/good"] <= 1


@pytest.mark.contract
def test_two_workers_have_the_crops_of_one_and_so_have_passes_and_batches_made_ahead(tmp_path, pool):
    overrides = {"folder": tmp_path, **SMALL, **CHOSEN, "train.batch_size": 32}
    alone, _ = logs_of(overrides)
    (first, _), (second, _) = pool.run(logs_of, overrides)
    split, _ = logs_of(overrides | {"train.accumulate": 2})
    assert first == second
    for others in (first, split):
        for ours, theirs in zip(others, alone, strict=True):
            for key in ("loss/ssl", "views/mass", "views/good"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-6), key
    run = trainer(make_config(method="byol", **overrides, **{"train.accumulate": 2}))
    images, ctx = next(run.batches(0))
    run.loader.ahead = 2
    ahead = run.loader.prepare(ctx, images)
    for first in (0, 16):
        part = images[first : first + 16]
        ours, late = (run.augment(part, other.part(first, first + 16)) for other in (ahead, ctx))
        assert ahead.draws[first // 16].are_for(ctx.part(first, first + 16)) and not ctx.draws
        assert all(torch.equal(*both) for both in zip(ours.full, late.full, strict=True)) and ours.logs == late.logs


@pytest.mark.contract
def test_the_host_waits_for_no_value(tmp_path):
    run = trainer(make_config(tmp_path, "byol", **SMALL, **CHOSEN))
    run.loader.ahead = 2
    batches = list(run.batches(0))
    run.step(*batches[0])
    with Waits() as waits:
        run.step(*batches[1])
    assert waits.found == []


# --- refused, left out of an identity -----------------------------------------------------------------------------------


def test_what_cannot_be_had_is_refused_and_runs_recorded_before_keep_their_identity():
    with pytest.raises(cfg.ConfigError, match=r"^views\.min_overlap: got 0\.2, expected 0 with views\.good_crops"):
        cfg.build({"views.min_overlap": 0.2, "views.good_crops": 0.5})
    with pytest.raises(cfg.ConfigError, match=r"^views\.good_crops: got 2, expected a number at least 0 and at most 1"):
        cfg.build({"views.good_crops": 2})
    packed = {"data.name": "packed", "data.root": "somewhere", "data.store": "disk"}
    for given, said in (
        ({"views.good_crops": 0.5}, "good_crops: got 0.5, expected 0: "),
        ({"views.log_saliency": True}, "log_saliency: got true, expected false: "),
    ):
        with pytest.raises(cfg.ConfigError, match=rf"^views\.{said}pictures of a packed set of this size are decoded"):
            check_saliency(cfg.build(packed | given))
        check_saliency(cfg.build(packed | given | {"data.store": "memory"}))
    check_saliency(cfg.build(packed))
    assert not {"views.good_crops", "views.good_mass", "views.log_saliency"} & cfg.identity_of(cfg.build({})).keys()
