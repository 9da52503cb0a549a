"""Pairs of images and their turned copies, and the maps that shall turn with them."""

import numpy as np
import pytest
import torch
from torch import nn

from rotssl import config as cfg
from rotssl.base.step import StepContext
from rotssl.config.fields import ConfigError
from rotssl.config.tasks import EquivarianceConfig
from rotssl.data.turning import rotate
from rotssl.engine.flops import count_step
from rotssl.engine.pretrainer import build_pretrainer
from rotssl.models.encoders import build_encoder
from rotssl.models.tap import Tap, map_stage, stage
from rotssl.tasks.equivariance import EMPTY, Equivariance
from tests.config.command_lines import refused
from tests.small_runs import CPU, batch, make_config, trainer

ALONE = {"rotation.weight": 0, "equivariance.weight": 1.0, "train.batch_size": 32}


def context(positions, progress=0.0, size=None, epoch=0):
    positions = np.asarray(positions)
    return StepContext(0, epoch, 0, progress, positions, 0, size or len(positions))


def task(**fields):
    return Equivariance(EquivarianceConfig(**{"weight": 1.0, **fields}), 8)


def noise(count, side=8, channels=3, seed=0):
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


def prepared(tmp_path, method="byol", **fields):
    config = make_config(tmp_path, method, **ALONE, **fields)
    model = build_pretrainer(config, CPU)
    return model, *batch(config, model)


# --- pairs ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_copies_are_their_sources_turned(layout):
    views = [noise(32, seed=seed).contiguous(memory_format=layout) for seed in (0, 1)]
    before = [view.clone() for view in views]
    made, targets = task().transform(views, context(range(32)))
    sources, copies = targets.rows[::2].tolist(), targets.rows[1::2].tolist()
    assert (sources, copies) == ([3, 11, 19, 27], [7, 15, 23, 31]) and targets.count == 8
    for old, view, new, turns in zip(before, views, made, targets.labels, strict=True):
        assert torch.equal(old, view)  # the teacher's
        assert torch.equal(new[targets.rest], old[targets.rest]) and torch.equal(new[sources], old[sources])
        assert not turns[::2].any() and turns[1::2].min() >= 1 and turns.max() <= 3
        for source, copy, k in zip(sources, copies, turns[1::2].tolist(), strict=True):
            assert torch.equal(new[copy], torch.rot90(old[source], k, (1, 2)))
    assert sorted([*targets.rows.tolist(), *targets.rest.tolist()]) == list(range(32))


def test_turns_are_uniform_and_differ_between_views_and_epochs():
    drawn = [task().turns(view, np.arange(3000), context([0], epoch=epoch)) for view, epoch in ((0, 0), (1, 0), (0, 1))]
    for turns in drawn:
        assert np.bincount(turns, minlength=4)[0] == 0
        assert np.bincount(turns)[1:] == pytest.approx(1000, abs=100)
    assert abs(np.mean(drawn[0] == drawn[1]) - 1 / 3) < 0.04 and abs(np.mean(drawn[0] == drawn[2]) - 1 / 3) < 0.04


def test_each_sixteen_images_hold_the_pairs_that_they_hold_in_the_whole_batch():
    views = noise(64)
    for share in (1, 2, 3, 7):
        one = task(fraction=share / 8, fraction_end=None)
        (whole,), targets = one.transform([views], context(range(64)))
        assert targets.count == len(targets.rows) == 8 * share
        for first in range(0, 64, 16):
            part = slice(first, first + 16)
            (made,), own = one.transform([views[part]], context(np.arange(64)[part], size=64))
            assert own.count == targets.count and len(own.rows) == 2 * share
            assert torch.equal(made, whole[part])
            assert torch.equal(own.rows + first, targets.rows[(targets.rows >= first) & (targets.rows < first + 16)])


def test_a_row_without_a_partner_is_the_method_s():
    (made,), targets = task(fraction_end=None, fraction=0.125).transform([noise(24)], context(range(24)))
    assert targets.rows.tolist() == [7, 15] and targets.count == 2 and 23 in targets.rest
    assert len(made) == 24


def test_the_share_is_in_eighths_and_falls():
    shares = [task(fraction=0.5).config.share_at(progress) for progress in np.linspace(0, 1, 50)]
    assert {8 * share for share in shares} == {4, 3, 2, 1} and sorted(shares, reverse=True) == shares
    assert task(fraction=0.3, fraction_end=None).config.share_at(0.9) == 0.25
    assert not task(fraction_end=0.0).config.active(0, 1.0)


@pytest.mark.parametrize("method", ["simclr", "mocov2", "byol", "swav"])
def test_the_method_uses_only_the_other_rows(tmp_path, method):
    local = {"views.local_count": 1} if method != "mocov2" else {}
    model, views, ctx = prepared(tmp_path, method, **local)
    _, targets = model.tasks["equivariance"].transform(views.full, ctx)
    given, taught, maps, own = {}, [], [], model.method.loss
    own_maps = model.tasks["equivariance"].loss

    def loss(z, z_teacher, ctx):
        given.update(z=z, teacher=z_teacher)
        return own(z, z_teacher, ctx)

    def judge(features, targets):
        maps.extend(features)
        return own_maps(features, targets)

    model.method.loss, model.tasks["equivariance"].loss = loss, judge
    if model.teacher is not None:
        model.teacher[0].register_forward_pre_hook(lambda _, args: taught.append(args[0]))
    leaves = [view.requires_grad_() for view in (*views.full, *views.local)]
    model(views, ctx).loss.backward()
    assert {len(z) for z in (*given["z"], *(given["teacher"] or []))} == {24}
    students = 1 if method == "mocov2" else 2
    assert [view.shape for view in maps] == [(32, 48, 4, 4)] * students
    if taught:
        known = torch.cat([view[targets.rest] for view in (views.full[1:2] if method == "mocov2" else views.full)])
        assert torch.equal(torch.cat(taught), known)
    replaced = set(targets.rows[1::2].tolist())  # their own images are not seen at all
    for leaf in leaves[:students]:
        assert set(leaf.grad.flatten(1).norm(dim=1).nonzero().flatten().tolist()) == set(range(32)) - replaced
    for leaf in leaves[2:]:
        assert set(leaf.grad.flatten(1).norm(dim=1).nonzero().flatten().tolist()) == set(targets.rest.tolist())


# --- loss ----------------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A convolution, whose map is the stage, and the features after it."""

    def __init__(self, kernel):
        super().__init__()
        self.stage = nn.Conv2d(3, 8, kernel, padding=kernel // 2)
        self.last = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        return self.last(self.stage(x)).mean((2, 3))


def judged(kernel, sees=2):
    torch.manual_seed(0)
    net = Net(kernel)
    tap = Tap(net, net.stage, 8, lambda x: (x, x), whole=True)
    one = task()
    made, targets = one.transform([noise(32), noise(32, seed=1)], context(range(32)))
    cut = [tap.split(tap(view)) for view in made[:sees]]
    for view, (features, found) in zip(made, cut, strict=False):
        assert torch.equal(features, net(view)) and torch.equal(found, net.stage(view))
    return one.loss([found for _, found in cut], targets)


@pytest.mark.parametrize("sees", [1, 2])
def test_an_equivariant_encoder_has_no_loss_and_another_has(sees):
    exact, broken = judged(1, sees), judged(3, sees)
    torch.testing.assert_close(exact.loss, torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(exact.logs["similarity"], torch.tensor(1.0), atol=1e-5, rtol=0)
    assert broken.loss > 0.2
    torch.testing.assert_close(broken.logs["similarity"], 1 - broken.loss.detach())
    broken.loss.backward()


def test_the_loss_is_the_mean_over_places_pairs_and_views_of_one_minus_the_cosine():
    one = task()
    _, targets = one.transform([noise(32), noise(32)], context(range(32)))
    maps = [noise(32, 4, 8, seed=seed) for seed in (2, 3)]
    values = []
    for view, turns in zip(maps, targets.labels, strict=True):
        for source, copy, k in zip(targets.rows[::2], targets.rows[1::2], turns[1::2], strict=True):
            a, b = view[copy], torch.rot90(view[source], int(k), (1, 2))
            for i in range(4):
                for j in range(4):
                    values.append(1 - a[:, i, j] @ b[:, i, j] / (a[:, i, j].norm() * b[:, i, j].norm()))
    torch.testing.assert_close(one.loss(maps, targets).loss, torch.stack(values).mean())


def test_an_empty_place_does_not_blow_up_the_gradient():
    one = task()
    _, targets = one.transform([noise(32)], context(range(32)))
    leaf = noise(32, 4, 8).abs()
    leaf[7] = 0.0  # a copy
    leaf.requires_grad_()
    one.loss([leaf], targets).loss.backward()
    assert 0 < leaf.grad[7].norm(dim=0).max() <= 1.01 / EMPTY / (4 * 16)


def test_a_run_learns_it_and_the_guard_leaves_it(tmp_path):
    fields = {"tasks.guard": 1, "evaluation.knn_every": 0, "data.limit": 256, "train.epochs": 6, "optim.lr": 0.1}
    run = trainer(make_config(tmp_path, "simclr", **ALONE, **fields, **{"equivariance.until": 0.9}))
    run.run()
    cosines = [run.journal.point(epoch)["equivariance/similarity"] for epoch in (1, 6)]
    assert not run.guard.off and cosines[1] > cosines[0]


@pytest.mark.parametrize(
    ("fields", "step", "progress"),
    [({"every": 3}, 1, 0.1), ({"until": 0.5}, 0, 0.5), ({"fraction_end": 0.0}, 0, 1.0)],
)
def test_where_the_task_sits_out_the_method_is_alone(tmp_path, fields, step, progress):
    given = {f"equivariance.{key}": value for key, value in fields.items()}
    on, off = (make_config(tmp_path, "byol", **{**ALONE, **extra}) for extra in (given, {"equivariance.weight": 0}))
    models = [build_pretrainer(config, CPU) for config in (on, off)]
    views, _ = batch(off, models[1])
    ctx = StepContext(0, 0, step, progress, np.arange(32), 0, 32)
    outs = [model(views, ctx) for model in models]
    assert torch.equal(outs[0].loss, outs[1].loss) and set(outs[0].logs) == set(outs[1].logs)


# --- cost and refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["simclr", "byol", "mocov2"])
def test_a_step_costs_no_more_than_plain_s(tmp_path, method):
    plain, on = (make_config(tmp_path, method, **{**ALONE, "equivariance.weight": weight}) for weight in (0, 1.0))
    more = cfg.replace(on, {"equivariance.fraction": 0.5})
    assert count_step(more) < count_step(on) < count_step(on, 0.99) < count_step(plain)
    rare = cfg.replace(on, {"equivariance.every": 2})
    assert count_step(rare, step=1) == count_step(plain)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", ["rotation.mode: got in_place, expected extra or four_way", "rotation.weight 0"]),
        ("--rotation.mode disjoint", ["rotation.mode: got disjoint", "rotation.weight 0"]),
        ("--rotation.mode extra --rotation.head_on stage", ["rotation.head_on: got stage, expected encoder or proj"]),
        ("--rotation.weight 0 --train.batch_size 24", ["got 24 images per worker and pass, expected a multiple of 16"]),
        ("--rotation.weight 0 --equivariance.fraction 1", ["equivariance.fraction: got '1'"]),
    ],
)
def test_what_does_not_go_together_is_refused(flags, words):
    line = ["--equivariance.weight", "1", "--scaling.num_workers", "1", *flags.split()]
    assert "\n" not in refused(line, *words)


@pytest.mark.parametrize(
    ("name", "side", "why"),
    [
        ("timm/vit_tiny_patch16_224", 32, r"timm/vit_tiny_patch16_224 has no maps \(B, C, h, w\)"),
        ("timm/mixer_s32_224", 224, r"timm/mixer_s32_224"),
        ("resnet18", 16, "views of 16 pixels leave resnet18 a map of one place, which cannot turn"),
    ],
)
def test_encoders_without_maps_are_refused(tmp_path, name, side, why):
    fields = {"encoder.name": name, "data.image_size": side, "encoder.stem": "imagenet"}
    config = make_config(tmp_path, "byol", **ALONE, **fields)
    with pytest.raises(ConfigError, match=f"^equivariance.weight: expected 0: {why}") as error:
        build_pretrainer(config, torch.device("meta"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["small", "resnet18", "timm/resnet18", "timm/convnext_atto"])
def test_encoders_with_maps_are_taken_and_left_as_they_were(name):
    encoder, _ = build_encoder(name, "imagenet", 64)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    layer, channels = map_stage(encoder, name, 64)
    assert layer is stage(encoder, name)[0] and all(module.training for module in encoder.modules())
    assert not layer._forward_hooks
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, before[key]), key
    tap = Tap(encoder, layer, channels, lambda x: (x, x), whole=True)
    _, found = tap.split(tap(noise(2, 64)))
    assert found.shape[1] == channels and found.shape[2] == found.shape[3] > 1
    quarter = torch.tensor([1, 1])
    assert torch.equal(rotate(found, quarter), torch.rot90(found, 1, (2, 3)))
