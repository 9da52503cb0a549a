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
    block = model.encoder.blocks[1]
    places = {"encoder": model.encoder, "projector": model.method.projector, "stage": block, "map": block}
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
        for _ in range(2):  # the same batch twice: the averages are exact after the first
            model(views, ctx).loss.backward()
            shares.append(model.balance.update()["rotation/grad_share"])
        weights.append(model.balance.weight("rotation", 0.0))
    torch.testing.assert_close(weights[0], 1000 * weights[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(shares[1], torch.tensor(0.3), rtol=1e-3, atol=0)
    torch.testing.assert_close(shares[3], torch.tensor(0.3), rtol=1e-3, atol=0)


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
    old = {key: value for key, value in run.state(1).items() if key not in ("balance", "guard")}
    trainer(make_config(tmp_path, "byol", **SHARE)).restore(old)  # of a version that had none
