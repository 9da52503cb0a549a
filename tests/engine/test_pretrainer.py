"""Which views share a pass, what a task's gradient is beside the method's, compiled networks, and the teacher's silence."""

import math

import pytest
import torch
from torch import nn

from rotssl.base import distributed
from rotssl.config import ConfigError
from rotssl.config.methods import METHODS
from rotssl.engine.gradients import compare_gradients, encoder_gradients
from rotssl.engine.pretrainer import _Inputs, build_pretrainer
from rotssl.models import norm as norms
from rotssl.models.halved import Halved
from tests.devices import Launches
from tests.small_runs import CPU, PAPER, arithmetic, batch, make_config, trainer

JOINT = {**PAPER, "rotation.joint": True}


def test_ratio_and_cosine_are_those_of_the_written_out_gradients():
    encoder = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1))
    with torch.no_grad():
        encoder[0].weight.copy_(torch.tensor([[1.0, -2.0]]))
        encoder[1].weight.fill_(3.0)
        encoder[1].bias.requires_grad_(False)  # not trained: not compared
    x, y = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 0.0]])
    # The output is v (w . x) + b: its gradient is (v x, w . x).
    parts = {"ssl": encoder(x).sum(), "rotation": 2 * encoder(y).sum(), "jigsaw": -0.5 * encoder(x).sum()}
    logs = compare_gradients(encoder_gradients(parts, encoder))
    ssl, rotation = torch.tensor([3.0, 3.0, -1.0]), 2 * torch.tensor([6.0, 0.0, 2.0])
    cosine = ssl @ rotation / (ssl.norm() * rotation.norm())
    expected = {
        "rotation/grad_ratio": rotation.norm() / ssl.norm(),
        "rotation/grad_cosine": cosine,
        "jigsaw/grad_ratio": torch.tensor(0.5),
        "jigsaw/grad_cosine": torch.tensor(-1.0),
    }
    torch.testing.assert_close(logs, expected)
    assert not any(value.requires_grad for value in logs.values())
    sum(parts.values()).backward()  # the graph is still there, and nothing has been added to the gradients
    torch.testing.assert_close(encoder[0].weight.grad[0], 0.5 * ssl[:2] + rotation[:2])


@pytest.mark.parametrize("odd", [math.nan, math.inf, 0.0])
def test_what_cannot_be_compared_is_left_out(odd):
    task, method = torch.tensor([1.0, 2.0]), torch.tensor([0.0, odd])
    assert compare_gradients({"ssl": method, "rotation": task}) == {}


@pytest.mark.contract
@pytest.mark.parametrize("method", ["simclr", pytest.param("barlow", marks=pytest.mark.exhaustive)])
def test_half_precision_that_overflows_at_first_does_not_end_a_run_that_compares(tmp_path, method):
    fields = {"train.precision": "fp16", "tasks.log_gradients_every": 1, "data.limit": 64, **JIGSAW}
    run = trainer(make_config(tmp_path, method, **fields))
    assert not math.isfinite(run.step(*next(run.batches(0)))["optim/grad_norm"])  # it does overflow
    run.run()
    assert all(math.isfinite(value) for value in run.journal.point(4).values())


def compared(overrides, every=2):
    """The comparisons that the engine logs in its first four steps, by step."""
    with arithmetic(torch.float64):
        run = trainer(make_config(**overrides, **{"tasks.log_gradients_every": every, "data.limit": 64}))
        return [
            {key: float(distributed.mean(value)) for key, value in run.step(images, ctx).items() if key in KEYS}
            for images, ctx in run.batches(0)
        ]


JIGSAW = {"jigsaw.weight": 0.5, "jigsaw.grid": 2, "jigsaw.permutations": 10}
KEYS = {"rotation/grad_ratio", "rotation/grad_cosine", "jigsaw/grad_ratio", "jigsaw/grad_cosine", "optim/grad_norm"}


@pytest.mark.contract
def test_every_so_many_steps_are_compared_with_the_weighted_losses(tmp_path):
    single, double = (
        compared({"folder": tmp_path, "method": "byol", **JIGSAW, "rotation.weight": weight}) for weight in (1.0, 2.0)
    )
    assert [set(step) for step in single] == [KEYS, {"optim/grad_norm"}, KEYS, {"optim/grad_norm"}]
    assert double[0]["rotation/grad_ratio"] == pytest.approx(2 * single[0]["rotation/grad_ratio"])
    for key in KEYS - {"rotation/grad_ratio", "optim/grad_norm"}:
        assert double[0][key] == pytest.approx(single[0][key])


def test_comparing_changes_nothing(tmp_path):
    weights = []
    for every in (0, 2):
        fields = {"tasks.log_gradients_every": every, "data.limit": 64, "rotation.share": 0.2}
        run = trainer(make_config(tmp_path, "byol", **fields))
        for images, ctx in run.batches(0):
            run.step(images, ctx)
        weights.append(run.model.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


@pytest.mark.parametrize("method", ["simclr", "byol", "barlow"])
def test_two_workers_compare_as_one_does(tmp_path, pool, method):
    overrides = {"folder": tmp_path, "method": method, "model.norm": "group", **JIGSAW}
    alone = compared(overrides)
    for rank in pool.run(compared, overrides):
        for ours, theirs in zip(rank, alone, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.contract
def test_the_teacher_s_targets_are_without_noise_and_the_student_s_features_with_it(tmp_path):
    fields = {"encoder.name": "timm/vit_tiny_patch16_224", "encoder.patch_size": 4, "encoder.drop_path": 0.5}
    model = build_pretrainer(make_config(tmp_path, "dino", **fields), CPU).train()
    images = torch.randn(8, 3, 16, 16)
    inputs = _Inputs([], [images], [])
    assert torch.equal(model._teach(inputs, None)[0], model._teach(inputs, None)[0])
    assert not torch.equal(model.encoder(images), model.encoder(images))


@pytest.mark.parametrize("method", ["byol", "mocov2", "dino"])
def test_a_teacher_whose_weights_are_cast_once_takes_the_same_steps_to_the_bit(tmp_path, method):
    fields = {"train.precision": "bf16", "data.limit": 64, "model.norm": "batch", "optim.warmup_epochs": 0}
    found, casts = [], []
    for once in (False, True):
        run = trainer(make_config(tmp_path / str(once), method, **fields))
        if once:
            run.model.halved = Halved(run.model.teacher, torch.bfloat16)
        *others, last = list(run.batches(0))[:3]
        for images, ctx in others:  # the first one shows which layers are called
            run.step(images, ctx)
        with Launches() as launches:
            run.step(*last)
        assert {p.dtype for p in run.model.teacher.parameters()} == {torch.float32}
        found.append(run.model.state_dict())
        casts.append(launches.found["_to_copy"])
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name
    assert casts[0] - casts[1] >= len(run.model.halved._slots) > 10


def test_what_an_encoder_drops_by_itself_is_a_function_of_seed_and_step(tmp_path):
    """timm's SE-ResNet has a dropout of 0.2 that no module shows."""
    states = []
    for name, ends in (("whole", (2,)), ("resumed", (1, 2))):
        fields = {"encoder.name": "timm/legacy_seresnet18", "data.limit": 32, "train.epochs": 2, "data.image_size": 32}
        for end in ends:
            run = trainer(
                make_config(tmp_path / name, "simclr", **fields | {"train.stop_after": end, "evaluation.knn_every": 0})
            )
            torch.manual_seed(len(states) + end)  # as another process has it
            run.run()
        states.append(run.model.encoder.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def passes(overrides):
    """The logs of a first step, and how many images each pass of the student's encoder had; weights of norms are at random."""
    with arithmetic(torch.float64):
        config = make_config(**overrides)
        model = build_pretrainer(config, CPU)
        views, ctx = batch(config, model)
        sizes = []
        model.encoder.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
        return model(views.map(lambda view: view.double()), ctx).logs, sizes


@pytest.mark.parametrize(
    "fields, apart, together",
    [
        ({"rotation.weight": 0}, [16, 16], [32]),
        ({}, [16, 16], [32]),
        (PAPER, [16, 16, 16, 16], [32, 16, 16]),
        (JOINT, [64], [64]),  # two owners whose views have one shape
        ({**JOINT, "rotation.fraction": 0.5}, [48], [48]),  # which is a pass for all by itself
        ({**JOINT, "rotation.resolution": 0.5}, [32, 32], [32, 32]),
        ({**JOINT, "rotation.views": 1, "views.local_count": 2}, [48, 32], [48, 32]),
    ],
)
def test_views_share_a_pass_where_asked_for_and_mean_the_same_without_batch_statistics(
    tmp_path, monkeypatch, fields, apart, together
):
    monkeypatch.setattr(norms, "keeps_views_apart", lambda network: False)
    given = {"folder": tmp_path, "method": "byol", "model.norm": "group", **fields}
    separate, sizes = passes(given)
    assert sizes == apart
    joint, sizes = passes({**given, "model.joint_views": True})
    assert sizes == together
    torch.testing.assert_close(joint, separate, rtol=1e-12, atol=1e-12)
    if fields.get("rotation.joint"):
        separate, _ = passes({**given, "rotation.joint": False})
    torch.testing.assert_close(joint, separate, rtol=1e-12, atol=1e-12)


@pytest.mark.contract
@pytest.mark.parametrize("method", ["byol", "simsiam", "swav"])
@pytest.mark.parametrize("norm", ["batch", "sync", "group"])
def test_views_in_one_pass_come_out_as_in_a_pass_each(tmp_path, monkeypatch, norm, method):
    exchanges = []
    monkeypatch.setattr(distributed, "all_reduce", lambda sums: exchanges.append(len(sums)) or sums)

    def step():
        with arithmetic(torch.float64):
            config = make_config(tmp_path, method, **PAPER, **{"model.norm": norm, "model.joint_views": False})
            model = build_pretrainer(config, CPU)
            views, ctx = batch(config, model)
            sizes = []
            model.encoder.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
            exchanges.clear()
            out = model(views.map(lambda view: view.double()), ctx)
            out.loss.backward()
            grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            return sizes, len(exchanges), out.logs | grads | dict(model.named_buffers())

    sizes, count, ours = step()
    monkeypatch.setattr(norms, "keeps_views_apart", lambda network: False)
    apart, count_apart, theirs = step()
    assert apart == [16, 16, 16, 16] and sizes == [32, 32]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert count_apart > 10 and count < 0.6 * count_apart if norm == "sync" else count == 0


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=[pytest.mark.exhaustive, pytest.mark.contract])])
def test_compiled_networks_compute_the_same(tmp_path, request, workers):
    overrides = {"method": "byol", "data.limit": 64, "train.epochs": 1, "optim.warmup_epochs": 0}

    def execute(**fields):
        if workers == 1:
            return trace({**overrides, **fields})
        return request.getfixturevalue("pool").run(trace, {**overrides, **fields})[0]

    plain, compiled = execute(folder=tmp_path / "a"), execute(folder=tmp_path / "b", **{"train.compile": True})
    assert plain.pop("graphs") == 0 < compiled.pop("graphs")
    assert compiled == pytest.approx(plain, rel=1e-9)


def trace(overrides):
    """Metrics of a run's last epoch, and how many graphs torch.compile took; no code is generated, which takes long."""
    compile_, graphs = nn.Module.compile, []

    def capture(graph, _):
        graphs.append(graph)
        return graph.forward

    nn.Module.compile = lambda module: compile_(module, backend=capture)
    try:
        with arithmetic(torch.float64):
            run = trainer(make_config(**overrides))
            run.run()
    finally:
        nn.Module.compile = compile_
    point = run.journal.point(1) or {}  # the second worker writes none
    kept = {key: value for key, value in point.items() if key.startswith(("loss/", "knn/", "rotation/"))}
    return {**kept, "graphs": len(graphs)}


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", METHODS)
def test_code_that_torch_compile_generates_takes_the_same_steps(tmp_path, method):
    fields = {"data.limit": 64, "train.epochs": 5, "model.norm": "batch", "rotation.share": 0.5}
    losses = []
    for compiled in (False, True):
        with arithmetic(torch.float64):
            run = trainer(make_config(tmp_path / str(compiled), method, **fields, **{"train.compile": compiled}))
            run.parallel.train()
            steps = [run.step(*step) for epoch in range(5) for step in run.batches(epoch)]
        losses.append([float(logs[key]) for logs in steps for key in ("loss/ssl", "loss/rotation")])
    assert len(losses[0]) == 2 * 20 and losses[1] == pytest.approx(losses[0], rel=1e-6)


FORMS = {"in place": {}, "extra": PAPER, "joint": JOINT, "four way": {"rotation.mode": "four_way"}}


@pytest.mark.parametrize("head_on", ["projector", "encoder"])
@pytest.mark.parametrize("task", FORMS.values(), ids=FORMS)
def test_the_head_sees_features_or_projections(tmp_path, task, head_on):
    config = make_config(tmp_path, "byol", **task, **{"rotation.head_on": head_on, "rotation.fraction_end": "none"})
    model = build_pretrainer(config, CPU)
    made, seen = [], []
    source = model.method.projector if head_on == "projector" else model.encoder
    source.register_forward_hook(lambda module, args, out: made.append(out))
    model.tasks["rotation"].head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    out = model(*batch(config, model))
    rows = torch.cat(made)
    assert seen and all(bool((rows == row).all(1).any()) for view in seen for row in view)
    weight = next(model.method.projector.parameters())
    (gradient,) = torch.autograd.grad(out.parts["rotation"], weight, allow_unused=True)
    assert (gradient is not None and bool(gradient.any())) == (head_on == "projector")


def test_a_forward_of_its_own_leaves_the_projectors_statistics_alone_where_asked(tmp_path):
    def statistics(**fields):
        config = make_config(tmp_path, "byol", **PAPER, **{"rotation.head_on": "projector", **fields})
        model = build_pretrainer(config, CPU)
        model(*batch(config, model))
        return {name: value for name, value in model.named_buffers() if name.endswith("running_mean")}

    plain, kept, moved = (
        statistics(**{"rotation.weight": 0.0}),
        statistics(**{"rotation.update_bn": False}),
        statistics(),
    )
    for part in ("encoder", "method.projector"):
        names = [name for name in plain if name.startswith(part)]
        assert names and all(torch.equal(kept[name], plain[name]) for name in names)
        assert not any(torch.equal(moved[name], plain[name]) for name in names)


def test_without_the_method_s_loss_the_task_alone_trains_the_encoder(tmp_path):
    with arithmetic(torch.float64):
        alone, both = (make_config(tmp_path, "byol", **{"tasks.method_weight": weight}) for weight in (0.0, 2.0))
        gradients = {}
        for name, config in (("alone", alone), ("both", both)):
            model = build_pretrainer(config, CPU)
            out = model(*batch(config, model))
            gradients[name] = encoder_gradients(out.parts, model.encoder)
            out.loss.backward()
            assert ("feature/std" in out.logs) == (name == "both")
            if name == "alone":
                assert all(p.grad is not None and not p.grad.any() for p in model.method.parameters())
                torch.testing.assert_close(out.loss, out.parts["rotation"])
    assert not gradients["alone"]["ssl"].any() and torch.equal(*(g["rotation"] for g in gradients.values()))
    for fields, reason in (
        ({"rotation.share": 0.2}, "1 with a share"),
        ({"rotation.weight": 0}, "more than 0 without"),
    ):
        with pytest.raises(ConfigError, match=rf"^tasks\.method_weight: got 0\.0, expected {reason}"):
            make_config(tmp_path, "byol", **{"tasks.method_weight": 0.0, **fields})
