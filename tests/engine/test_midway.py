"""States saved within an epoch: a run that is cut goes on from one, bit for bit, in what it learned and in what it logged."""

import logging

import numpy as np
import pytest
import torch

from rotssl import config as cfg
from rotssl.base import distributed
from rotssl.engine import midway
from rotssl.engine.events import Note
from rotssl.engine.runtime import RunFailed
from rotssl.runs import checkpoint, journal
from tests.small_runs import arithmetic, make_config, trainer

pytestmark = pytest.mark.contract
# Four steps an epoch; a state is saved after two of them.
SHORT = {"data.limit": 64, "train.epochs": 3, "evaluation.linear": False, "evaluation.knn_every": 0}
OFTEN = {"train.save_minutes": 1e-9}
SECONDS = ("seconds", "per_second", "input_wait", "memory")


class Cut(Exception):
    """What ends a start in these tests."""


def start(folder, after=None, fields=None):
    """Run to the end, or until so many steps were taken; returns the weights, the journal and the notes."""
    engine = trainer(make_config(folder, "mocov2", **(SHORT | {"rotation.share": 0.2} | (fields or {}))))
    taken, step, notes = [], engine.step, []

    def counted(*batch):
        if len(taken) == after:
            raise Cut
        taken.append(1)
        return step(*batch)

    engine.step = counted
    engine.runtime.progress = lambda event: notes.append(event.text) if isinstance(event, Note) else None
    look, midway.LOOK = midway.LOOK, 2
    try:
        engine.run()
    except Cut:
        assert after is not None
    finally:
        midway.LOOK = look
    weights = {name: value.numpy() for name, value in engine.model.state_dict().items()}
    return weights, journal.read(engine.journal.folder), notes, len(taken)


def told(points):
    """What a run logged, without what depends on the clock."""
    return {
        (epoch, key): value
        for epoch, point in points.items()
        for key, value in point.items()
        if not any(word in key for word in SECONDS)
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_is_cut_goes_on_within_the_epoch(tmp_path, request, workers):
    def run(*args):
        return start(*args) if workers == 1 else request.getfixturevalue("pool").run(start, *args)[0]

    whole, points, _, steps = run(tmp_path / "whole")
    assert steps == 12
    run(tmp_path / "cut", 7, OFTEN)  # in the fourth step of the second epoch
    folder = tmp_path / "cut" / "rotssl" / "run"
    assert (folder / checkpoint.WITHIN / checkpoint.FILE).exists()
    weights, again, notes, steps = run(tmp_path / "cut", None, OFTEN)
    assert "resuming within epoch 2, after 2 of its steps" in notes
    assert steps == 6
    for name, value in whole.items():
        np.testing.assert_array_equal(value, weights[name], err_msg=name)
    assert told(again) == told(points)
    assert not (folder / checkpoint.WITHIN).exists() and again[3]["cost/samples"] == 192


def test_a_run_without_a_checkpoint_of_an_epoch_goes_on_too(tmp_path):
    start(tmp_path, 3, OFTEN)
    _, points, notes, steps = start(tmp_path)
    assert "resuming within epoch 1, after 2 of its steps" in notes and steps == 10 and len(points) == 3


def exact_start(*args):
    """A start in double precision, whose rounding a few steps do not amplify."""
    with arithmetic(torch.float64):
        return start(*args)


@pytest.mark.parametrize("first", [1, 2])
def test_another_number_of_workers_goes_on_with_the_same_samples_and_the_means_of_all(tmp_path, pool, first):
    def run(workers, *args):
        return exact_start(*args) if workers == 1 else pool.run(exact_start, *args)[0]

    whole, points, _, _ = run(1, tmp_path / "whole")
    run(first, tmp_path / "cut", 7, OFTEN)
    weights, again, notes, steps = run(3 - first, tmp_path / "cut")
    assert steps == 6 and (first == 1 or "resuming within epoch 2, after 2 of its steps" in notes)
    ours, theirs = told(again), told(points)
    assert ours.keys() == theirs.keys()
    for (epoch, key), value in theirs.items():
        if key != "feature/std":  # of each worker's part of the batch
            assert ours[epoch, key] == pytest.approx(value, rel=1e-4), (epoch, key)
    for name, value in whole.items():
        np.testing.assert_allclose(weights[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_run_that_saves_few_epochs_trains_the_others_again_and_logs_them_once(tmp_path):
    fields = {"train.epochs": 4, "train.save_every": 9}
    whole, points, _, _ = start(tmp_path / "whole", None, fields)
    assert [folder.name for folder in checkpoint.found(tmp_path / "whole/rotssl/run")] == ["epoch_00004", "epoch_00001"]
    start(tmp_path / "cut", 13, fields)  # in the fourth epoch
    weights, again, notes, steps = start(tmp_path / "cut", None, fields)
    assert "resuming after epoch 1" in notes and steps == 12
    for name, value in whole.items():
        np.testing.assert_array_equal(value, weights[name], err_msg=name)
    assert told(again) == told(points)


def test_seconds_of_both_starts_count_once(tmp_path):
    start(tmp_path, 7, OFTEN)
    state = checkpoint.load(tmp_path / "rotssl" / "run" / checkpoint.WITHIN)
    before = state["within"]["seconds"]
    _, points, _, _ = start(tmp_path)
    second = points[2]["cost/train_seconds"] - points[1]["cost/train_seconds"]
    assert 0 < before < second
    assert points[3]["cost/lost_seconds"] < second  # the step that was repeated


@pytest.mark.parametrize("damage", ["torn", "older"])
def test_a_state_that_is_damaged_or_old_is_passed_over(tmp_path, caplog, damage):
    start(tmp_path, 7, OFTEN)
    folder = tmp_path / "rotssl" / "run"
    kept = (folder / checkpoint.WITHIN / checkpoint.FILE).read_bytes()
    if damage == "older":
        start(tmp_path, 3)  # of the two steps that are left of the second epoch, and one of the third
        (folder / checkpoint.WITHIN).mkdir()
    (folder / checkpoint.WITHIN / checkpoint.FILE).write_bytes(kept[: len(kept) // (2 if damage == "torn" else 1)])
    with caplog.at_level(logging.WARNING):
        _, points, notes, steps = start(tmp_path)
    assert steps == (8 if damage == "torn" else 4) and len(points) == 3
    assert f"resuming after epoch {1 if damage == 'torn' else 2}" in notes
    assert ("within_epoch cannot be read" in caplog.text) == (damage == "torn")


def test_a_state_of_another_configuration_is_refused(tmp_path):
    start(tmp_path, 3, OFTEN)
    with pytest.raises(RunFailed, match=r"within_epoch is of another configuration: train\.seed 0 in place of 1"):
        start(tmp_path, fields={"train.seed": 1})


def test_a_disk_that_is_full_ends_the_run_as_with_other_checkpoints(tmp_path, monkeypatch):
    def full(state, folder):
        if folder.name == checkpoint.WITHIN:
            raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(OSError, match="No space left"):
        start(tmp_path, fields=OFTEN)


def rank_0_decides(late, folder):
    clock = midway.Clock(1, "cpu", folder / "none")
    clock.saved -= 100 if (distributed.rank() == 0) == late else 0
    return clock.due(), clock.due()


@pytest.mark.parametrize("late", [True, False])
def test_the_clock_of_rank_0_decides_for_all(pool, late, tmp_path):
    assert pool.run(rank_0_decides, late, tmp_path) == [(late, False)] * 2


def test_a_file_asks_for_a_save_at_the_next_look(tmp_path):
    folder = tmp_path / "rotssl" / "run"
    start(tmp_path, 7)
    assert not (folder / checkpoint.WITHIN).exists()
    (folder / checkpoint.ASKED).touch()
    before = checkpoint.last_save(folder)
    start(tmp_path, 3)
    assert checkpoint.within(folder)["within"]["step"] == 2 and checkpoint.last_save(folder) > before


def test_zero_minutes_never_save(tmp_path):
    assert cfg.Config().train.save_minutes == 15  # as docs/reliability.md says
    start(tmp_path, 7, {"train.save_minutes": 0})
    assert not (tmp_path / "rotssl" / "run" / checkpoint.WITHIN).exists()
