"""Views that are cut into tiles, whose features are combined in pairs (Fast-MoCo, arXiv 2207.08220)."""

import pytest
import torch
from torch.nn import functional as F

from rotssl.data.turning import rotate
from rotssl.engine.pretrainer import build_pretrainer
from rotssl.engine.split import Split
from tests.small_runs import CPU, PAPER, arithmetic, batch, make_config, trainer

SPLIT = {"views.split": 2, "model.norm": "group"}  # without batch statistics each image can be encoded by itself
OFF = {"rotation.weight": 0}
PAIRS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def prepared(tmp_path, method, **fields):
    config = make_config(tmp_path, method, **fields)
    model = build_pretrainer(config, CPU)
    views, ctx = batch(config, model)
    return model, views.map(lambda view: view.to(torch.get_default_dtype())), ctx


def quarters(view):
    return [view[:, :, :8, :8], view[:, :, :8, 8:], view[:, :, 8:, :8], view[:, :, 8:, 8:]]


def watch(module):
    """What goes into a module and what comes out, of each pass."""
    passes = []
    module.register_forward_hook(lambda module, args, out: passes.append((args[0], out)))
    return passes


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_tiles_are_the_quarters_and_combinations_the_means_of_two(layout):
    view = torch.randn(3, 5, 16, 16).contiguous(memory_format=layout)
    split = Split(2)
    tiles = split.cut(view)
    assert torch.equal(tiles, torch.cat(quarters(view))) and tiles.is_contiguous(memory_format=layout)
    features, local = torch.randn(2, 4, 3, 7), torch.randn(3, 7)
    *found, last = split.combine([*features.flatten(1, 2), local], 2)
    assert last is local
    expected = [(tiles[i] + tiles[j]) / 2 for tiles in features for i, j in PAIRS]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(split.mean(features[0].flatten(0, 1)), features[0].mean(0))


def test_whole_views_pass_unchanged():
    view, split = torch.randn(3, 5, 15, 15), Split(1)
    assert split.cut(view) is view and split.mean(view) is view and split.combine([view], 1) == [view]


@pytest.mark.parametrize("method", ["simclr", "mocov2", "byol", "swav", "barlow", "dino"])
def test_the_loss_is_the_mean_over_combinations_that_meet_whole_views_of_the_teacher(tmp_path, method):
    few = {} if method in ("mocov2", "barlow") else {"views.local_count": 2}
    with arithmetic(torch.float64):
        model, views, ctx = prepared(tmp_path, method, **SPLIT, **OFF, **few)
        found = model(views, ctx)
        encode, project = model.encoder, model.method.projector
        students, targets = (views.full[:1], views.full[1:]) if method == "mocov2" else (views.full, views.full)
        taught = None
        if model.teacher is not None:
            taught = [model.teacher[1](model.teacher[0](view)) for view in targets]
        local, losses = [project(encode(view)) for view in views.local], []
        for i, j in PAIRS:
            parts = [[encode(tile) for tile in quarters(view)] for view in students]
            z = [project((tiles[i] + tiles[j]) / 2) for tiles in parts]
            losses.append(model.method.loss(z + local, taught, ctx).loss)
        torch.testing.assert_close(found.parts["ssl"], torch.stack(losses).mean(), rtol=1e-9, atol=0)
        assert torch.stack(losses).std() > 1e-6


@pytest.mark.parametrize("joint", [False, True])
def test_combinations_share_passes_as_views_do(tmp_path, joint):
    fields = {**SPLIT, "model.norm": "batch", "model.joint_views": joint, "views.local_count": 1}
    model, views, ctx = prepared(tmp_path, "byol", **fields, **OFF)
    student, heads, teacher = watch(model.encoder), watch(model.method.projector), watch(model.teacher[0])
    model(views, ctx)
    assert [tuple(x.shape) for x, _ in student] == [(128, 3, 8, 8), (16, 3, 7, 7)]
    assert [len(x) for x, _ in heads] == [12 * 16 + 16]
    assert torch.equal(torch.cat([x for x, _ in teacher]), torch.cat(views.full))


@pytest.mark.parametrize(("method", "memory"), [("mocov2", "keys"), ("swav", "recent"), ("dino", "means")])
def test_a_step_is_remembered_once(tmp_path, method, memory):
    run = trainer(make_config(tmp_path, method, **SPLIT, **{"data.limit": 64}))
    pending, heads = getattr(run.model.method, memory), watch(run.model.method.projector)
    kept, take = [], pending.take
    pending.take = lambda: kept.append(take()) or kept[-1]
    before = run.model.method.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    run.step(*next(iter(run.batches(0))))
    ((part,),) = kept
    if method == "swav":  # of the first combination of each view
        z = torch.cat([out for _, out in heads]).view(12, 16, -1)
        torch.testing.assert_close(part, F.normalize(z[[0, 6]], dim=-1))
    if method != "dino":
        queue = run.model.method.queue
        assert torch.equal(queue[..., -16:, :], part) and torch.equal(queue[..., :-16, :], before["queue"][..., 16:, :])


@pytest.mark.parametrize("head_on", ["encoder", "stage"])
@pytest.mark.parametrize("angles", ["shared", "independent"])
def test_in_place_views_turn_before_they_are_cut_and_the_head_reads_the_mean_of_the_tiles(tmp_path, angles, head_on):
    fields = {"rotation.angles": angles, "rotation.head_on": head_on, "rotation.fraction_end": "none"}
    model, views, ctx = prepared(tmp_path, "byol", **SPLIT, **fields)
    student, teacher = watch(model.encoder), watch(model.teacher[0])
    stages, read = watch(model.encoder.blocks[1]), watch(model.tasks["rotation"].head)
    model(views, ctx)
    turns = [torch.as_tensor(model.tasks["rotation"].labels(v, ctx)) for v in range(2)]
    turned = [rotate(view, each) for view, each in zip(views.full, turns, strict=True)]
    assert torch.equal(torch.cat([x for x, _ in student]), torch.cat([torch.cat(quarters(view)) for view in turned]))
    source = torch.cat(
        [out if head_on == "encoder" else out.mean((2, 3)) for _, out in (student if head_on == "encoder" else stages)]
    )
    means = source.unflatten(0, (2, 4, 16)).mean(1)  # of two views of four tiles
    torch.testing.assert_close(torch.cat([x for x, _ in read]).unflatten(0, (2, 16)), means)
    taught = turned if angles == "shared" else views.full
    assert torch.equal(torch.cat([x for x, _ in teacher]), torch.cat(taught))


def test_extra_tasks_see_whole_views_and_leave_the_method_alone(tmp_path):
    tasks = {**PAPER, "jigsaw.weight": 1.0, "jigsaw.grid": 2, "jigsaw.permutations": 10}
    logs = {}
    for name, fields in {"both": SPLIT | tasks, "split": SPLIT | OFF, "tasks": {"model.norm": "group"} | tasks}.items():
        model, views, ctx = prepared(tmp_path, "byol", **fields)
        logs[name] = model(views, ctx).logs
    assert torch.equal(logs["both"]["loss/ssl"], logs["split"]["loss/ssl"])
    for task in ("rotation", "jigsaw"):
        torch.testing.assert_close(logs["both"][f"loss/{task}"], logs["tasks"][f"loss/{task}"])


@pytest.mark.contract
@pytest.mark.parametrize("head_on", ["encoder", "stage"])
def test_a_vision_transformer_takes_tiles_that_are_no_multiple_of_its_patch(tmp_path, head_on):
    fields = {"encoder.name": "timm/vit_tiny_patch16_224", "encoder.patch_size": 3, "rotation.head_on": head_on}
    model, views, ctx = prepared(tmp_path, "dino", **SPLIT, **fields)
    student = watch(model.encoder)
    out = model(views, ctx)
    out.loss.backward()
    assert {x.shape[-1] for x, _ in student} == {8} and torch.isfinite(out.loss)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.contract
def test_a_run_splits_its_small_views_too(tmp_path):
    fields = {"views.size_start": 12, "views.size_until": 0.5, "data.limit": 32, "evaluation.knn_every": 0}
    run = trainer(make_config(tmp_path, "byol", **SPLIT, **fields))
    passes = watch(run.model.encoder)
    run.run()
    assert [x.shape[-1] for x, _ in passes if x.requires_grad or len(x) == 128] == [6] * 4 + [8] * 4
