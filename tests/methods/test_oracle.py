"""The oracle that removes false negatives: which pairs, what the loss becomes, and that without it nothing changes."""

import json
import math
from itertools import islice

import numpy as np
import pytest
import torch

from rotssl import config as cfg
from rotssl.base import distributed
from rotssl.config.rules import check_labels
from rotssl.data.loader import classes_of
from rotssl.engine.events import Note
from rotssl.methods.losses import info_nce, nt_xent
from rotssl.methods.oracle import Oracle
from rotssl.reports import findings
from tests.devices import Waits
from tests.methods.papers import NEGATIVES, dot, grads, unit, vectors
from tests.reports.made_up import compare, rotated, run
from tests.small_runs import arithmetic, make_config, run_to, trainer

pytestmark = pytest.mark.contract
HAVING = ("simclr", "mocov2")
# Class and number of six images: three of class 0, two of class 1, one of class 2.
CLASSES = torch.tensor([[0, 0.1], [1, 0.2], [0, 0.6], [2, 0.3], [0, 0.25], [1, 0.9]], dtype=torch.float64)


def judged(share, of_pairs=False):
    """The removed pairs, as a set, and the logs."""
    removed, logs = Oracle(share, of_pairs).judge(CLASSES, CLASSES, 0)
    return removed, {key: float(value) for key, value in logs.items()}


def pairs(removed):
    return {(i, j) for i, j in removed.nonzero().tolist()}


def both(*found):
    return {*found, *((j, i) for i, j in found)}


def test_the_oracle_counts_and_removes_the_pairs_whose_labels_it_knows():
    removed, logs = judged(1.0)
    assert pairs(removed) == both((0, 2), (0, 4), (2, 4), (1, 5))  # no image is its own false negative
    assert logs == {"oracle/same_class": pytest.approx(8 / 30), "oracle/removed": 1}
    removed, logs = judged(0.5)  # the labels of images 0, 1, 3 and 4 are known
    assert pairs(removed) == both((0, 4))
    assert logs == {"oracle/same_class": pytest.approx(8 / 30), "oracle/removed": pytest.approx(2 / 8)}
    removed, logs = judged(0.5, of_pairs=True)  # the sums are .7, .35, .85 and 1.1
    assert pairs(removed) == both((0, 4), (1, 5))
    assert logs["oracle/removed"] == pytest.approx(4 / 8)
    removed, logs = judged(0.0)
    assert removed is None and logs == {"oracle/same_class": pytest.approx(8 / 30)}


def test_the_keys_of_a_fresh_queue_are_of_no_class():
    removed, logs = Oracle(1.0).judge(torch.full((2, 2), -1.0), torch.full((3, 2), -1.0))
    assert not removed.any() and logs["oracle/same_class"] == 0


def test_shares_of_images_and_of_pairs_are_kept_over_many_images():
    known = torch.from_numpy(classes_of(np.zeros(2000, np.int64), 3))
    assert int((known[:, 1] < 0.3).sum()) == 600
    assert pairs_share(known, False) == pytest.approx(600 * 599 / (2000 * 1999))
    assert pairs_share(known, True) == pytest.approx(0.3, abs=0.01)


def pairs_share(known, of_pairs):
    removed, logs = Oracle(0.3, of_pairs).judge(known, known, 0)
    assert torch.equal(removed, removed.T)
    assert logs["oracle/same_class"] == 1
    return float(logs["oracle/removed"])


def simclr_without(a, b, removed):
    """Eq. 1 of SimCLR, anchor by anchor, without the removed negatives."""
    rows, count = [*unit(a)[0], *unit(b)[0]], len(a)
    terms = []
    for i, anchor in enumerate(rows):
        positive = (i + count) % (2 * count)
        kept = [k for k in range(2 * count) if k != i and (i % count, k % count) not in removed]
        assert positive in kept
        terms.append(-(dot(anchor, rows[positive]) / 0.2) + sum((dot(anchor, rows[k]) / 0.2).exp() for k in kept).log())
    return sum(terms) / len(terms)


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("of_pairs", [False, True])
def test_simclr_without_false_negatives_is_that_of_a_plain_loop_on_one_worker_and_on_three(share, of_pairs):
    a, b = vectors()
    oracle, (unit_a, unit_b) = Oracle(share, of_pairs), unit(a, b)
    removed, _ = oracle.judge(CLASSES, CLASSES, 0)
    whole = nt_xent(unit_a, unit_b, unit_a, unit_b, 0, 0.2, removed)
    paper = simclr_without(a, b, pairs(removed))
    torch.testing.assert_close(whole, paper, rtol=1e-12, atol=0)
    ours = torch.autograd.grad(whole, (a, b), retain_graph=True)
    torch.testing.assert_close(ours, grads(paper, a, b), rtol=1e-10, atol=1e-14)
    assert nt_xent(unit_a, unit_b, unit_a, unit_b, 0, 0.2) > whole + 1e-3
    parts = []
    for i in (0, 2, 4):
        mine, _ = oracle.judge(CLASSES[i : i + 2], CLASSES, i)
        assert torch.equal(mine, removed[i : i + 2])
        parts.append(nt_xent(unit_a[i : i + 2], unit_b[i : i + 2], unit_a, unit_b, i, 0.2, mine))
    torch.testing.assert_close(sum(parts) / 3, whole)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_mocov2_without_false_negatives_is_that_of_a_plain_loop(share):
    a, b = vectors()
    queue = torch.cat([CLASSES[[1, 0, 4, 5, 2]], torch.tensor([[-1.0, -1.0], [7.0, 0.0]])])
    removed, logs = Oracle(share).judge(CLASSES, queue)
    query, key = unit(a, b)
    found = info_nce(query, key, NEGATIVES, 0.2, removed)
    terms = []
    for i, (q, k) in enumerate(zip(query, key.detach(), strict=True)):
        fits = [
            CLASSES[i, 0] == queue[n, 0] and CLASSES[i, 1] < share and queue[n, 1] < share for n in range(len(queue))
        ]
        kept = [NEGATIVES[n] for n in range(len(queue)) if not fits[n]]
        terms.append(-(dot(q, k) / 0.2) + sum((dot(q, other) / 0.2).exp() for other in (k, *kept)).log())
    torch.testing.assert_close(found, sum(terms) / len(terms), rtol=1e-12, atol=0)
    same = sum(int(c[0] == q[0]) for c in CLASSES for q in queue)
    assert float(logs["oracle/same_class"]) == pytest.approx(same / (6 * 7))


def test_a_loss_without_any_negatives_left_is_zero_and_has_a_gradient():
    a, b = vectors()
    unit_a, unit_b = unit(a, b)
    everything = ~torch.eye(6, dtype=torch.bool)
    loss = nt_xent(unit_a, unit_b, unit_a, unit_b, 0, 0.2, everything)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12) and torch.isfinite(a.grad).all()
    nothing = torch.zeros(6, 6, dtype=torch.bool)
    plain, same = (nt_xent(unit_a, unit_b, unit_a, unit_b, 0, 0.2, mask) for mask in (None, nothing))
    assert torch.equal(plain, same)


# --- in training --------------------------------------------------------------------------------------------------------

SMALL = {"data.limit": 64, "train.batch_size": 16, "rotation.weight": 0}
FULL = {"oracle.false_negatives": 1.0}


def logs_of(overrides, steps=6):
    """The logs of the first steps, means over workers, and the last state."""
    with arithmetic(torch.float64):
        run = trainer(make_config(**overrides))
        batches = islice((item for epoch in range(4) for item in run.batches(epoch)), steps)
        logs = [run.step(images, ctx) for images, ctx in batches]
        seen = [{key: float(distributed.mean(log[key].double())) for key in sorted(log)} for log in logs]
        return seen, {name: value.numpy().copy() for name, value in run.model.state_dict().items()}


@pytest.mark.parametrize("method", HAVING)
def test_counting_changes_no_bit_and_removing_does(tmp_path, method):
    known = {"folder": tmp_path, "method": method, **SMALL}
    plain, weights = logs_of(known)
    counted, same = logs_of(known | {"oracle.log": True})
    removed, _ = logs_of(known | FULL)
    for name, value in weights.items():
        np.testing.assert_array_equal(value, same[name], err_msg=name)
    for off, counting in zip(plain, counted, strict=True):
        assert off["loss/ssl"] == counting["loss/ssl"]
        assert off.keys() | {"oracle/same_class"} == counting.keys()
        assert 0 <= counting["oracle/same_class"] < 0.5
    assert removed[-1]["loss/ssl"] < plain[-1]["loss/ssl"] - 1e-3
    assert removed[-1]["oracle/removed"] == 1


@pytest.mark.parametrize("method", HAVING)
def test_two_workers_have_the_loss_of_one(tmp_path, pool, method):
    overrides = {"folder": tmp_path, "method": method, **SMALL, "oracle.false_negatives": 0.7}
    alone, state = logs_of(overrides)
    (first, one), (second, two) = pool.run(logs_of, overrides)
    assert first == second
    for ours, theirs in zip(first, alone, strict=True):
        for key in ("loss/ssl", "oracle/same_class"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-7), key
    if method == "mocov2":
        for found in (one, two):
            np.testing.assert_array_equal(found["method.queue_classes"], state["method.queue_classes"])


def test_the_classes_of_the_queue_are_those_of_its_keys_image_by_image(tmp_path):
    run_ = trainer(make_config(tmp_path, "mocov2", **SMALL, **FULL))
    seen = []
    for images, ctx in run_.batches(0):
        run_.step(images, ctx)
        seen.append(ctx.classes)
    labels, order = run_.splits.train.labels, run_.loader.classes
    told = torch.cat(seen)[-len(run_.model.method.queue) :]
    assert torch.equal(run_.model.method.queue_classes, told)
    assert sorted(order[:, 0].tolist()) == sorted(labels.tolist()) and len(set(order[:, 1])) == len(labels)


def test_a_step_that_rotates_some_images_apart_judges_the_others(tmp_path):
    fields = {"rotation.mode": "disjoint", "rotation.fraction": 0.25, "train.batch_size": 64, "data.limit": 64}
    run_ = trainer(make_config(tmp_path, "simclr", **fields, **FULL))
    images, ctx = next(iter(run_.batches(0)))
    asked = []
    judge = run_.model.method.oracle.judge
    run_.model.method.oracle.judge = lambda *given: asked.append(given) or judge(*given)
    (task,) = (task for _, task in run_.model.named_tasks())
    views = run_.augment(images, ctx)
    run_.model(views, ctx)
    rest = task.transform(views.full, ctx)[1].rest
    assert len(rest) == 48 and torch.equal(asked[0][0], ctx.classes[rest])


@pytest.mark.parametrize("method", HAVING)
def test_the_host_waits_for_no_value(tmp_path, method):
    run_ = trainer(make_config(tmp_path, method, **SMALL, **FULL))
    batches = list(run_.batches(0))
    run_.step(*batches[0])
    with Waits() as waits:
        run_.step(*batches[1])
    assert waits.found == []


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    small = {"method": "mocov2", **SMALL, "data.limit": 48, "oracle.false_negatives": 0.5}
    small |= {"evaluation.knn_every": 0, "evaluation.linear": False}
    whole = run_to({"folder": tmp_path / "whole", **small})
    run_to({"folder": tmp_path / "halves", **small, "train.stop_after": 2})
    resumed = run_to({"folder": tmp_path / "halves", **small})
    for name, value in whole.items():
        np.testing.assert_array_equal(value, resumed[name], err_msg=name)
    assert (whole["method.queue_classes"][:, 0] >= 0).any()
    lines = (tmp_path / "halves" / "rotssl" / "run" / "metrics.jsonl").read_text().splitlines()
    assert 0 < json.loads(lines[-1])["oracle/removed"] < 1


# --- said loudly, refused, left out of an identity ----------------------------------------------------------------------


def test_methods_without_negatives_and_images_without_labels_are_refused():
    for method in ("byol", "swav", "dino"):
        with pytest.raises(cfg.ConfigError, match=r"^oracle\.false_negatives: got 0\.3, expected 0: .* no negatives"):
            cfg.build({"method.name": method, "oracle.false_negatives": 0.3})
    with pytest.raises(cfg.ConfigError, match=r"^oracle\.log: got true, expected false"):
        cfg.build({"method.name": "byol", "oracle.log": True})
    asked = cfg.build({"method.name": "simclr", "oracle.false_negatives": 0.3})
    with pytest.raises(cfg.ConfigError, match=r"^oracle\.false_negatives: got 0\.3, expected images with labels"):
        check_labels(asked, labelled=False)
    check_labels(asked, labelled=True)
    check_labels(cfg.build({}), labelled=False)


def test_a_run_with_an_oracle_says_so_first_and_a_report_of_it_too(tmp_path):
    quick = {"train.epochs": 1, "optim.warmup_epochs": 0, "evaluation.knn_every": 0, "evaluation.linear": False}
    config = make_config(tmp_path, "simclr", **SMALL, **FULL, **quick)
    run_, said = trainer(config), []
    run_.runtime.progress = said.append
    run_.run()
    first = next(event.text for event in said if isinstance(event, Note))
    assert first.startswith(
        "LABELS ARE USED IN PRETRAINING: an oracle removes false negatives, given the labels of 100%"
    )
    tags = {findings.LABELS: str(config.oracle)}
    runs = [run(tags=tags, started=1), rotated((0.2, 0.4, 0.5, 0.7), tags=tags)]
    warned = findings.facts(compare(runs).cells, "knn/top1")[1]
    assert warned[0].startswith("LABELS WERE USED IN PRETRAINING in 2 of 2 runs: an oracle removes")
    assert not any(
        "LABELS" in line for line in findings.facts(compare([run(), rotated((0.2, 0.7))]).cells, "knn/top1")[1]
    )


def test_runs_recorded_before_the_oracle_keep_their_identity():
    plain = cfg.build({"method.name": "simclr"})
    assert not any(key.startswith("oracle.") for key in cfg.identity_of(plain))
    assert math.isclose(cfg.identity_of(cfg.build({"method.name": "simclr", **FULL}))["oracle.false_negatives"], 1)
