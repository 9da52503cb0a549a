"""Supervised training: its loss, where it says that labels are used, and that nobody meets it among the methods."""

import pytest
import torch
from torch.nn import functional as F

from rotssl import config as cfg
from rotssl.config.fields import ConfigError
from rotssl.config.methods import METHODS
from rotssl.config.rules import check_labels, labels_used
from rotssl.engine.events import Note
from rotssl.engine.flops import count_step
from rotssl.reports import groups
from tests.devices import Waits
from tests.engine.test_contract import first_steps
from tests.methods.small import DIM, context, make, random_views
from tests.reports.made_up import run
from tests.small_runs import PAPER, make_config, run_to, trainer

SMALL = {"data.limit": 64, "rotation.weight": 0.0, "evaluation.knn_every": 0, "evaluation.linear": False}


def test_the_loss_is_the_cross_entropy_of_every_view():
    z, classes = random_views(3), torch.tensor([[0, 0.1], [3, 0.2], [5, 0.3], [2, 0.4]], dtype=torch.float64)
    out = make("supervised").loss(z, None, context(classes=classes))
    each = [-F.log_softmax(view, 1)[i, label] for view in z for i, label in enumerate((0, 3, 5, 2))]
    torch.testing.assert_close(out.loss, torch.stack(each).mean())
    right = [int(view[i].argmax()) == label for view in z for i, label in enumerate((0, 3, 5, 2))]
    assert float(out.logs["supervised/right"]) == pytest.approx(sum(right) / 12) and DIM == 6


def test_a_run_learns_the_labels_says_so_first_and_resumes(tmp_path):
    run_, said = trainer(make_config(tmp_path / "whole", "supervised", **SMALL, **{"optim.lr": 0.1})), []
    run_.runtime.progress = said.append
    run_.run()
    first = next(event.text for event in said if isinstance(event, Note))
    assert first.startswith("LABELS ARE USED IN PRETRAINING: supervised training") and "not self-supervised" in first
    rates = [run_.journal.point(epoch)["supervised/right"] for epoch in (1, 4)]
    assert rates[1] > rates[0] + 0.1 and rates[1] > 0.3  # of ten classes
    halves = {"folder": tmp_path / "halves", "method": "supervised", **SMALL, "optim.lr": 0.1}
    run_to(halves | {"train.stop_after": 2})
    for name, value in run_to(halves).items():
        assert (value == run_.model.state_dict()[name].numpy()).all(), name


@pytest.mark.parametrize(
    "task",
    [
        pytest.param({}, id="alone", marks=pytest.mark.exhaustive),
        pytest.param(PAPER | {"rotation.weight": 1.0}, id="with rotation"),
    ],
)
def test_two_workers_equal_one_and_the_host_waits_for_no_value(tmp_path, pool, task):
    overrides = {"folder": tmp_path, "method": "supervised", **SMALL, "model.norm": "sync", **task}
    alone, *_ = first_steps(overrides, 4)
    (losses, *_), _ = pool.run(first_steps, overrides, 4)
    for ours, theirs in zip(losses, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-7)
    run_ = trainer(make_config(**overrides))
    batches = list(run_.batches(0))
    run_.step(*batches[0])
    with Waits() as waits:
        run_.step(*batches[1])
    assert waits.found == [] and count_step(run_.config) > 0


def test_it_is_there_by_name_and_nowhere_in_a_list():
    assert "supervised" in METHODS and METHODS["supervised"].labels
    assert "supervised" not in list(METHODS)
    assert len(METHODS) == len(list(METHODS)) and not any(spec.labels for spec in METHODS.values())
    with pytest.raises(ConfigError, match="expected one of simclr") as error:
        cfg.build({"method.name": "superwised"})
    assert "supervised" not in str(error.value)


def test_it_needs_labels_and_as_many_outputs_as_classes(tmp_path):
    asked = cfg.build({"method.name": "supervised"})
    assert "labels of all images" in labels_used(asked) and labels_used(cfg.build({})) == ""
    check_labels(asked, labelled=True)
    with pytest.raises(ConfigError, match=r"^method\.name: got supervised, expected images with labels"):
        check_labels(asked, labelled=False)
    with pytest.raises(ConfigError, match=r"^method\.out_dim: got 2, expected \d+ or more, the number of classes$"):
        trainer(make_config(tmp_path, "supervised", **SMALL, **{"method.out_dim": 2}))


def test_it_has_no_place_in_a_ranking_but_one_beside_the_paper_s_lines():
    runs = [run(method__name="supervised"), run(started=1)]
    kept, left = groups.sift(runs, "knn/top1")
    assert [entry.params["method.name"] for entry in kept] == ["byol"]
    assert [entry.reason for entry in left] == ["it learns from labels: see jobs/analyze.py"]
    assert len(groups.sift(runs, "knn/top1", supervised=True)[0]) == 2
