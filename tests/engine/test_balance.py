"""The weight that follows from the gradients' norms."""

import pytest
import torch

from rotssl.engine.pretrainer import build_pretrainer
from tests.small_runs import CPU, PAPER, batch, make_config, trainer

SHARE = {"rotation.share": 0.3}
FORMS = [
    {},
    PAPER,
    {"rotation.head_on": "projector"},
    {"rotation.head_on": "stage"},
    {"rotation.head_on": "stem"},
    {**PAPER, "rotation.head_on": "stage1"},
    {"views.split": 2},
    {"views.split": 2, "rotation.head_on": "stage"},
    {"rotation.weight": 0, "equivariance.weight": 1.0, "train.batch_size": 32, "views.local_count": 1},
]


def prepared(tmp_path, method="simclr", **fields):
    config = make_config(tmp_path, method, **fields)
    model = build_pretrainer(config, CPU)
    return model, *batch(config, model)


@pytest.mark.parametrize("form", FORMS)
def test_shares_are_those_of_the_gradients_at_the_branch(tmp_path, form):
    model, views, ctx = prepared(tmp_path, **{"rotation.weight": 0.7, "rotation.fraction": 0.5, **form})
    ((name, own),) = model.named_tasks()
    first, block, _ = model.encoder.blocks
    places = {"encoder": model.encoder, "projector": model.method.projector, "stage": block, "map": block}
    places |= {"stem": model.encoder.stem, "stage1": first}
    seen = []
    places[own.reads].register_forward_hook(lambda module, args, out: seen.append(out), prepend=True)
    out = model(views, ctx)

    def norm(part):
        found = torch.autograd.grad(out.parts[part], seen, retain_graph=True, allow_unused=True)
        return torch.cat([grad.flatten() for grad in found if grad is not None]).norm()

    with model.balance.pause():
        ssl, task = norm("ssl"), norm(name)
    out.loss.backward()
    logs = model.balance.update()
    torch.testing.assert_close(logs[f"{name}/grad_share"], task / (task + ssl))
    assert model.balance.update() == {}  # those of a step count once


def test_the_scale_of_a_loss_drops_out(tmp_path):
    weights, shares = [], []
    for scale in (1.0, 1000.0):
        model, views, ctx = prepared(tmp_path, **SHARE)
        task, loss = model.tasks["rotation"], model.tasks["rotation"].loss

        def scaled(*args, loss=loss, scale=scale):
            out = loss(*args)
            return type(out)(out.loss * scale, out.logs)

        task.loss = scaled
        model.balance.accuracy.fill_(1.0)  # the gate is open
        for _ in range(2):  # the same batch twice: the averages are exact after the first
            model(views, ctx).loss.backward()
            shares.append(model.balance.update()["rotation/grad_share"])
        weights.append(model.balance.weight("rotation", 0.0))
    torch.testing.assert_close(weights[0], 1000 * weights[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(shares[1], torch.tensor(0.3), rtol=1e-3, atol=0)
    torch.testing.assert_close(shares[3], torch.tensor(0.3), rtol=1e-3, atol=0)


def encoder_and_head(model, views, ctx):
    """Gradients of the step at the encoder and the task's head, and the step's logs."""
    model.zero_grad()
    model(views, ctx).loss.backward()
    parts = model.encoder, model.tasks["rotation"]
    found = [torch.cat([p.grad.flatten() for p in part.parameters()]) for part in parts]
    return *found, model.balance.update()


@pytest.mark.parametrize("form", [{}, PAPER, {"rotation.head_on": "stage"}, {"rotation.head_on": "projector"}])
def test_the_encoder_gets_as_much_of_a_task_as_its_accuracy_is_above_chance(tmp_path, form):
    found = {}
    for accuracy in (0.2, 0.25, 0.275, 0.3, 1.0):
        model, views, ctx = prepared(tmp_path, **form, **SHARE)
        model.balance.accuracy.fill_(accuracy)
        found[accuracy] = encoder_and_head(model, views, ctx)
    shut, half, whole = (found[accuracy][0] for accuracy in (0.25, 0.275, 0.3))
    assert not torch.equal(shut, whole)
    torch.testing.assert_close(half, (shut + whole) / 2)
    assert torch.equal(found[0.2][0], shut) and torch.equal(found[1.0][0], whole)
    for _, head, logs in found.values():
        assert torch.equal(head, found[1.0][1])  # learns at full strength
        assert logs["rotation/weight"] == pytest.approx(0.3 / 0.7)  # both norms count as equal
    shares = [float(logs["rotation/grad_share"]) for *_, logs in found.values()]
    assert shares[:2] == [0, 0] and 0 < shares[2] < shares[3] == shares[4]
    assert shares[2] / (1 - shares[2]) == pytest.approx(shares[3] / (1 - shares[3]) / 2)
    # Without the task the encoder would get the same as behind a shut gate.
    model, views, ctx = prepared(tmp_path, **form, **SHARE)
    ssl = torch.autograd.grad(model(views, ctx).parts["ssl"], list(model.encoder.parameters()))
    torch.testing.assert_close(torch.cat([grad.flatten() for grad in ssl]), shut)


def test_the_gate_follows_the_accuracy_of_the_steps(tmp_path):
    model, views, ctx = prepared(tmp_path, **SHARE)
    with torch.no_grad():
        for p in model.tasks["rotation"].parameters():  # from zeros, a head answers a quarter right
            p.normal_(generator=torch.Generator().manual_seed(0))
    recent, gates = 0.25, []
    for skipped in (False, True, False):
        out = model(views, ctx)
        out.loss.backward()
        gates.append(float(model.balance.update(torch.tensor(skipped))["rotation/gate"]))
        assert gates[-1] == pytest.approx(min(1, max(0, (recent / 0.25 - 1) / 0.2)), abs=1e-5)
        if not skipped:
            recent += 0.02 * (float(out.logs["rotation/accuracy"]) - recent)
    assert model.balance.accuracy.tolist() == pytest.approx([recent]) and recent != 0.25


def test_a_share_falls_with_its_schedule(tmp_path):
    model, *_ = prepared(tmp_path, **SHARE, **{"rotation.schedule": "linear"})
    assert [float(model.balance.weight("rotation", p)) for p in (0.0, 0.5, 1.0)] == pytest.approx(
        [0.3 / 0.7, 0.15 / 0.85, 0.0]
    )


def test_a_skipped_step_leaves_the_averages(tmp_path):
    model, views, ctx = prepared(tmp_path, **SHARE)
    model(views, ctx).loss.backward()
    model.balance.update(torch.tensor(True))
    assert model.balance.norms.tolist() == [[0.0, 0.0]]
    model(views, ctx).loss.backward()
    model.balance.update(torch.tensor(False))
    assert (model.balance.norms > 0).all()


def test_a_resumed_run_keeps_the_averages(tmp_path):
    run = trainer(make_config(tmp_path, "byol", **SHARE))
    run.step(*next(iter(run.batches(0))))
    again = trainer(make_config(tmp_path, "byol", **SHARE))
    again.restore(run.state(1))
    assert torch.equal(again.model.balance.norms, run.model.balance.norms)
    assert torch.equal(again.model.balance.accuracy, run.model.balance.accuracy)
    ungated = run.state(1) | {"balance": {"rotation": run.state(1)["balance"]["rotation"][:2]}}
    again.restore(ungated)  # of a version without gates
    assert again.model.balance.accuracy == 1
    old = {key: value for key, value in run.state(1).items() if key not in ("balance", "guard")}
    trainer(make_config(tmp_path, "byol", **SHARE)).restore(old)  # of a version that had none
