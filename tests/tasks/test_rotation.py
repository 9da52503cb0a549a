"""Rotated views: their angles, resolution and share."""

import itertools
import math

import numpy as np
import pytest
import torch

from rotssl.base.step import StepContext
from rotssl.data.augment import Views
from rotssl.data.turning import rotate, tilt
from rotssl.engine.gradients import encoder_gradients
from rotssl.engine.pretrainer import build_pretrainer
from tests.small_runs import CPU, PAPER, batch, make_config, trainer

DISJOINT = {"rotation.mode": "disjoint", "train.batch_size": 32}


def context(size, progress=0.0, step=0):
    return StepContext(0, 0, step, progress, np.arange(size), 0, size)


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


def test_two_angles_are_told_apart(tmp_path):
    model = build_pretrainer(make_config(tmp_path, "byol", **{"rotation.degrees": (0, 180)}), CPU)
    views, ctx = [torch.randn(16, 3, 8, 8)] * 2, context(16)
    (made, _), targets = model.tasks["rotation"].transform(views, ctx)
    assert set(targets.labels[0].tolist()) == {0, 1}
    for image, turned, label in zip(views[0], made, targets.labels[0], strict=True):
        assert torch.equal(turned, torch.rot90(image, 2 * int(label), (1, 2)))


def test_a_tilt_is_a_rotation_about_the_centre_and_what_comes_from_outside_is_0():
    x = torch.rand(3, 2, 8, 8, dtype=torch.float64)
    made = tilt(x, torch.tensor([0.0, math.pi / 2, math.pi / 4], dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tilt(x, torch.tensor([0.0, math.pi / 2, math.pi / 4], dtype=torch.float64)), made)
    assert torch.equal(made[0], x[0])
    torch.testing.assert_close(made[1], torch.rot90(x[1], 1, (1, 2)))  # which has no pixel to interpolate
    assert not made[2][:, [0, 0, -1, -1], [0, -1, 0, -1]].any()  # corners come from outside
    # A pixel to the right of the centre goes up and to the left, halfway to the top.
    dot = torch.zeros(1, 1, 9, 9)
    dot[0, 0, 4, 7] = 1
    found = tilt(dot, torch.tensor([math.pi / 4]))[0, 0]
    rows, columns = (found.sum(axis) @ torch.arange(9.0) / found.sum() for axis in (1, 0))
    assert float(rows) == pytest.approx(4 - 3 / math.sqrt(2), abs=0.1)
    assert float(columns) == pytest.approx(4 + 3 / math.sqrt(2), abs=0.1)


def test_quarter_turns_stay_exact_beside_other_angles(tmp_path):
    degrees = (0, 45, 90, 180, 200, 270)
    model = build_pretrainer(make_config(tmp_path, "byol", **PAPER, **{"rotation.degrees": degrees}), CPU)
    views, ctx = [torch.randn(64, 3, 16, 16)] * 2, context(64)
    (made, _), targets = model.tasks["rotation"].transform(views, ctx)
    assert set(targets.labels[0].tolist()) == set(range(6)) and model.tasks["rotation"].chance == 1 / 6
    for image, turned, label in zip(views[0], made, targets.labels[0], strict=True):
        quarters, rest = divmod(degrees[int(label)], 90)
        upright = torch.rot90(image, quarters, (1, 2))
        expected = tilt(upright[None], torch.tensor([math.radians(rest)]))[0] if rest else upright
        assert torch.equal(turned, expected) if not rest else torch.allclose(turned, expected, atol=1e-4)


def test_a_disjoint_share_is_in_whole_sixteenths(tmp_path):
    task = make_config(tmp_path, "byol", **DISJOINT).rotation
    shares = [task.share_at(progress) for progress in np.linspace(0, 0.999, 50)]
    assert {16 * share for share in shares} == {4.0, 3.0, 2.0, 1.0} and sorted(shares, reverse=True) == shares


@pytest.mark.parametrize("method", ["simclr", "mocov2", "byol", "swav"])
@pytest.mark.parametrize("head", ["encoder", "projector"])
def test_disjoint_rows_are_the_task_s_alone(tmp_path, method, head):
    fields = {**DISJOINT, "rotation.head_on": head}
    fields |= {"views.local_count": 1} if method in ("simclr", "byol", "swav") else {}
    config = make_config(tmp_path, method, **fields)
    model = build_pretrainer(config, CPU)
    views, ctx = batch(config, model)
    (made, _), targets = model.tasks["rotation"].transform(views.full, ctx)
    assert sorted([*targets.rows.tolist(), *targets.rest.tolist()]) == list(range(32)) and len(targets.rows) == 8
    assert torch.equal(made[targets.rest], views.full[0][targets.rest])
    assert not torch.equal(*targets.labels)  # each view by its own angle
    given = {}

    def loss(z, z_teacher, ctx, own=model.method.loss):
        given.update(z=z, teacher=z_teacher)
        return own(z, z_teacher, ctx)

    model.method.loss = loss
    leaves = [view.requires_grad_() for view in (*views.full, *views.local)]
    out = model(views, ctx)
    assert {len(z) for z in (*given["z"], *(given["teacher"] or []))} == {24}
    out.loss.backward()
    student = leaves[:1] if model.method.asymmetric else leaves[:2]
    assert all(leaf.grad.flatten(1).norm(dim=1).gt(0).all() for leaf in student)  # all rows are trained on
    for local in leaves[2:]:
        assert set(local.grad.flatten(1).norm(dim=1).nonzero().flatten().tolist()) == set(targets.rest.tolist())
    model.after_step(ctx)
    if method == "mocov2":  # keys of the others only
        assert torch.allclose(model.method.queue[-24:], torch.nn.functional.normalize(given["teacher"][0], dim=1))


def test_local_views_turn_with_their_image(tmp_path):
    config = make_config(tmp_path, "byol", **{"views.local_count": 2, "rotation.fraction": 0.5})
    model = build_pretrainer(config, CPU)
    views, ctx = batch(config, model)
    _, targets = model.tasks["rotation"].transform(views.full, ctx)
    turns = torch.zeros(16, dtype=torch.int64).index_put((targets.rows,), targets.labels[0])
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    shown = model(views, ctx).new_views["rotation, local"]
    for local, encoded, drawn in zip(views.local, seen[1].chunk(2), shown, strict=True):
        assert torch.equal(encoded, rotate(local, turns)) and torch.equal(drawn, encoded) and turns.any()


@pytest.mark.parametrize("method", ["byol", "mocov2"])
def test_as_an_augmentation_it_is_the_plain_method_on_turned_views(tmp_path, method):
    fields = {"views.local_count": 1} if method == "byol" else {}
    on = make_config(tmp_path, method, **fields, **{"rotation.mode": "augment", "tasks.log_gradients_every": 1})
    model, plain = (
        build_pretrainer(config, CPU)
        for config in (on, make_config(tmp_path, method, **fields, **{"rotation.weight": 0}))
    )
    views, ctx = batch(on, model)
    task = model.tasks["rotation"]
    turns = [torch.from_numpy(task.labels(v, ctx)) for v in range(3)]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(turns, 2))
    each = zip([*views.full, *views.local], turns, strict=False)  # two global views, and one local one
    first, second, *local = [rotate(view, turn) for view, turn in each]
    out, expected = model(views, ctx), plain(Views([first, second], local, {}), ctx)
    assert torch.equal(out.parts["ssl"], expected.loss) and 0 <= out.logs["rotation/accuracy"] <= 1
    found = encoder_gradients(out.parts, model.encoder)
    assert torch.equal(found["ssl"], encoder_gradients(expected.parts, plain.encoder)["ssl"])
    assert not found["rotation"].any()
    out.loss.backward()
    assert all(p.grad.any() for p in task.parameters()) and model.balance.update() == {}
    assert task.chance == 0  # so that the guard lets it be


def test_the_projector_is_told_the_angle(tmp_path):
    for angles, teacher_too in (("shared", True), ("independent", False)):
        model_config = make_config(tmp_path, "byol", **{"rotation.conditioned": True, "rotation.angles": angles})
        model = build_pretrainer(model_config, CPU)
        views, ctx = batch(model_config, model)
        _, targets = model.tasks["rotation"].transform(views.full, ctx)
        seen, taught = [], []
        model.method.projector.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][:, -4:]))
        model.teacher[1].register_forward_pre_hook(lambda _, args, taught=taught: taught.append(args[0][:, -4:]))
        model(views, ctx)
        labels = torch.cat(targets.labels)
        assert torch.equal(torch.cat(seen).argmax(1), labels) and (torch.cat(seen).sum(1) == 1).all()
        assert torch.equal(torch.cat(taught).argmax(1), labels if teacher_too else torch.zeros_like(labels))


@pytest.mark.parametrize(
    ("fields", "step", "progress"),
    [({"rotation.every": 3}, 1, 0.1), ({"rotation.until": 0.5}, 0, 0.5), ({"rotation.fraction_end": 0.0}, 0, 1.0)],
)
@pytest.mark.parametrize("form", [{}, PAPER, DISJOINT])
def test_where_the_task_sits_out_the_method_is_alone(tmp_path, form, fields, step, progress):
    size = form.get("train.batch_size", 32)
    form = {**form, "train.batch_size": size}
    ctx = context(size, progress, step)
    on = make_config(tmp_path, "byol", **form, **fields)
    off = make_config(tmp_path, "byol", **{"rotation.weight": 0, "train.batch_size": size})
    models = [build_pretrainer(config, CPU) for config in (on, off)]
    views, _ = batch(off, models[1])
    outs = [model(views, ctx) for model in models]
    assert torch.equal(outs[0].loss, outs[1].loss) and set(outs[0].logs) == set(outs[1].logs)
    for out in outs:
        out.loss.backward()
    for (name, ours), (_, theirs) in zip(
        models[0].encoder.named_parameters(), models[1].encoder.named_parameters(), strict=True
    ):
        assert torch.equal(ours.grad, theirs.grad), name
    # Distributed training wants a gradient of every parameter.
    assert all(p.grad is not None and not p.grad.any() for p in models[0].tasks.parameters())


def test_the_last_part_of_a_run_is_upright(tmp_path):
    fields = {"rotation.until": 0.5, "rotation.fraction_end": 0.0, "tasks.guard": 0, "evaluation.knn_every": 0}
    run = trainer(make_config(tmp_path, "byol", **fields, **{"data.limit": 512, "train.batch_size": 32}))
    shares = [run.config.rotation.share_at(progress) for progress in np.linspace(0, 0.5, 101)]
    assert min(share for share in shares if share) >= 1 / 16 and shares[-1] == 0  # the head needs two images
    run.run()
    accuracy = [run.journal.point(epoch).get("rotation/accuracy") for epoch in (1, 2, 3, 4)]
    assert None not in accuracy[:2] and accuracy[2:] == [None, None]
