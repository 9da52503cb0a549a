"""MoCo's two views and its queue."""

from collections import deque

import pytest
import torch
from torch.nn import functional as F

from rotssl.engine.pretrainer import build_pretrainer
from rotssl.methods.losses import info_nce
from tests.methods.small import context, make, random_views
from tests.small_runs import CPU, batch, make_config


def test_moco_s_query_is_the_first_view_and_its_key_the_second(tmp_path):
    config = make_config(tmp_path, "mocov2", **{"rotation.weight": 0})
    model = build_pretrainer(config, CPU)
    views, ctx = batch(config, model)
    seen = {"query": [], "key": []}
    for who, encoder in (("query", model.encoder), ("key", model.teacher[0])):
        encoder.register_forward_pre_hook(lambda _, args, who=who: seen[who].append(args[0]))
    model(views, ctx)
    assert [len(passes) for passes in seen.values()] == [1, 1]
    assert torch.equal(seen["query"][0], views.full[0])
    assert torch.equal(seen["key"][0], views.full[1])


def test_moco_s_keys_are_shuffled_for_batchnorm_over_parts_and_come_back_in_order(tmp_path):
    fields = {"rotation.weight": 0, "model.norm": "split", "model.norm_splits": 4}
    model = build_pretrainer(config := make_config(tmp_path, "mocov2", **fields), CPU)
    views, ctx = batch(config, model)
    seen = []
    model.teacher[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    first = model(views, ctx).loss
    order = [int((row == views.full[1]).flatten(1).all(1).nonzero()) for row in seen[0]]
    assert order != sorted(order) == list(range(16))
    (keys,) = model.method.keys.take()
    model.eval()  # where parts do not matter
    with torch.no_grad():
        model(views, ctx)
    (shuffled,) = model.method.keys.take()
    model.shuffle = False
    with torch.no_grad():
        model(views, ctx)
    torch.testing.assert_close(shuffled, model.method.keys.take()[0])
    again = build_pretrainer(config, CPU)
    assert again(views, ctx).loss == first and torch.equal(again.method.keys.take()[0], keys)  # a function of the step


@pytest.mark.parametrize("size", [4, 8, 10])
def test_moco_s_queue_is_first_in_first_out(size):
    method, line = make("mocov2", queue_size=size), deque(maxlen=size)
    line.extend(method.queue.clone())
    for step in range(7):
        query, key = random_views(2, seed=step)
        before, ctx = method.queue.clone(), context(step)
        loss = method.loss([query], [7 * key], ctx).loss
        unit = F.normalize(key, dim=1)
        torch.testing.assert_close(loss, info_nce(F.normalize(query, dim=1), unit, before, 0.2))
        assert torch.equal(method.queue, before)
        method.after_step(ctx)
        line.extend(unit)
        torch.testing.assert_close(method.queue, torch.stack(list(line)))
    torch.testing.assert_close(method.queue.norm(dim=1), torch.ones(size))
