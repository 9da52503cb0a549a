"""SimSiam's targets and its predictor's rate."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests.methods.small import context, make, random_views
from tests.small_runs import make_config, trainer


def test_simsiam_s_targets_get_no_gradient():
    method, z = make("simsiam", predictor_dim=4), [view.requires_grad_() for view in random_views(2)]
    method.loss(z, None, context()).loss.backward()
    first, second = (view.detach().clone().requires_grad_() for view in z)
    (-F.cosine_similarity(method.predictor(first), z[1].detach()).mean() / 2).backward()
    (-F.cosine_similarity(method.predictor(second), z[0].detach()).mean() / 2).backward()
    torch.testing.assert_close([view.grad for view in z], [first.grad, second.grad])


@pytest.mark.parametrize("kind", ["constant", "scheduled"])
def test_simsiam_s_predictor_keeps_its_rate_while_the_others_decay(tmp_path, kind):
    fields = {"method.predictor_lr": kind, "optim.lr": 0.4, "optim.warmup_epochs": 1, "data.limit": 64}
    run = trainer(make_config(tmp_path, "simsiam", **fields))
    predictor = {id(p) for p in run.model.method.predictor.parameters()}
    rates = {True: [], False: []}
    for epoch in range(4):
        for _, ctx in run.batches(epoch):
            run.set_rates(ctx)
            for whose in rates:
                found = {
                    group["lr"]
                    for group in run.optimizer.param_groups
                    for p in group["params"]
                    if (id(p) in predictor) == whose
                }
                assert len(found) == 1
                rates[whose] += found
    warmup, decay = [0.1, 0.2, 0.3, 0.4], [0.2 * (1 + math.cos(math.pi * i / 12)) for i in range(12)]
    assert rates[False] == pytest.approx(warmup + decay)
    assert rates[True] == pytest.approx(warmup + [0.4] * 12 if kind == "constant" else rates[False])
