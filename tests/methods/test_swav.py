"""SwAV's prototypes and queue, and that it learns."""

import math

import pytest
import torch
from lightly.loss import SwaVLoss
from torch.nn import functional as F

from rotssl import config as cfg
from rotssl.config.methods import METHODS
from rotssl.engine.hardware import emulates_bf16
from rotssl.runs import journal
from tests.methods.small import context, make, random_views, steps
from tests.small_runs import make_config, trainer


def test_swav_s_prototypes_are_frozen_at_first_and_always_of_length_one(tmp_path):
    run = trainer(make_config(tmp_path, "swav", **{"method.freeze_steps": 3, "data.limit": 96, "optim.lr": 1.0}))
    weight = run.model.method.prototypes.weight
    start = weight.detach().clone()
    for ctx in steps(run, 5):
        torch.testing.assert_close(weight.detach().norm(dim=1), torch.ones(12))
        moved = (weight.detach() - start).abs().max()
        assert moved < 1e-6 if ctx.step < 3 else moved > 1e-3, ctx.step


def test_swav_s_queue_takes_part_once_it_is_full_and_its_epoch_has_come():
    method, plain = make("swav", prototypes=5, queue_size=10, queue_after=2), make("swav", prototypes=5)
    with torch.no_grad():
        plain.prototypes.weight.copy_(method.prototypes.weight)
    weight = method.prototypes.weight.detach()
    for step, epoch in ((0, 0), (1, 1), (2, 2), (3, 2), (4, 3)):
        ctx = context(step, epoch)
        z = random_views(2, seed=step)
        without = plain.loss(z, None, ctx).loss
        scores = [F.normalize(view, dim=1) @ weight.T for view in z]
        (theirs,) = SwaVLoss()(scores, [], [queue @ weight.T for queue in method.queue])
        takes_part = epoch >= 2 and 4 * step >= 10
        torch.testing.assert_close(method.loss(z, None, ctx).loss, theirs if takes_part else without)
        assert abs(theirs - without) > 1e-3
        method.after_step(ctx)
        assert torch.equal(method.prototypes.weight, weight)
        for row, view in zip(method.queue, z, strict=True):
            torch.testing.assert_close(row[-4:], F.normalize(view, dim=1))


def test_swav_starts_close_to_ln_k():
    method = METHODS["swav"].load()(METHODS["swav"].config(out_dim=512, prototypes=64), 8)
    loss = method.loss(random_views(2, 256, dim=512), None, context(size=256)).loss
    assert loss.item() == pytest.approx(math.log(64), rel=0.05)


@pytest.mark.contract
def test_swav_leaves_the_uniform_prediction_within_two_epochs_of_the_sample_in_half_precision(tmp_path):
    asked = cfg.build(
        {
            "method.name": "swav",
            "rotation.weight": 0,
            "train.stop_after": 2,
            "train.precision": "fp32" if emulates_bf16() else "bf16",  # which there takes minutes
            "evaluation.knn_every": 0,
            "storage.path": str(tmp_path),
            "tracking.run_name": "run",
        }
    )
    run = trainer(cfg.resolve(asked, 28, 5000))
    run.run()
    first, second = journal.read(run.config.run_dir).values()
    uniform = math.log(asked.method.prototypes)
    assert first["loss/ssl"] < uniform + 0.2  # the prototypes are random at first
    assert second["loss/ssl"] < uniform - 0.15
    assert second["feature/std"] > 0.3
