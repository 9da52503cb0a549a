"""Checkpoints: what comes back, which are found, and what is damaged or cannot be written."""

import logging

import pytest
import torch

from rotssl.runs import checkpoint
from tests.small_runs import full_disk


def save(run_dir, *epochs):
    for epoch in epochs:
        state = {
            "epoch": epoch,
            "model": {},
            "optimizer": {},
            "weights": torch.full((3,), float(epoch)),
            "half": torch.ones(2, dtype=torch.bfloat16),
        }
        checkpoint.save(state, run_dir / checkpoint.name(epoch))


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    save(tmp_path, 3)
    state = checkpoint.load(tmp_path / checkpoint.name(3))
    assert (state["epoch"], state["half"].dtype) == (3, torch.bfloat16)
    assert torch.equal(state["weights"], torch.full((3,), 3.0))
    assert [path.name for path in (tmp_path / "epoch_00003").iterdir()] == [checkpoint.FILE]


def test_checkpoints_are_found_newest_first_and_pruned(tmp_path):
    save(tmp_path, 9, 10, 2)
    (tmp_path / "epoch_00011").write_text("a file")
    (tmp_path / "rotssl-scratch").mkdir()
    assert [path.name for path in checkpoint.found(tmp_path)] == ["epoch_00010", "epoch_00009", "epoch_00002"]
    (tmp_path / f"{checkpoint.name(9)}.part").write_text("of a writer that was killed")
    checkpoint.prune(tmp_path)
    assert not [*tmp_path.glob("*.part")]
    assert [state["epoch"] for state in checkpoint.latest(tmp_path)] == [10, 9]
    assert (tmp_path / "rotssl-scratch").is_dir()
    checkpoint.prune(tmp_path)
    assert len(checkpoint.found(tmp_path)) == checkpoint.KEEP == 2
    assert list(checkpoint.latest(tmp_path / "none")) == []


@pytest.mark.parametrize("damage", ["cut short", "empty", "zeros", "text", "missing"])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog, damage):
    save(tmp_path, 1, 2)
    file = tmp_path / checkpoint.name(2) / checkpoint.FILE
    content = file.read_bytes()
    bad = {
        "cut short": content[: len(content) // 2],
        "empty": b"",
        "zeros": bytes(len(content)),
        "text": b"garbage" * 99,
    }
    file.unlink() if damage == "missing" else file.write_bytes(bad[damage])
    with caplog.at_level(logging.WARNING):
        assert [state["epoch"] for state in checkpoint.latest(tmp_path)] == [1]
    (record,) = caplog.records
    assert checkpoint.name(2) in record.getMessage()


@pytest.mark.parametrize("room", [0, 200_000], ids=["none", "some"])
def test_a_save_that_fails_leaves_the_checkpoint_before(tmp_path, room):
    save(tmp_path, 1)
    with full_disk(room), pytest.raises(OSError, match=r"File too large: .*part"):
        checkpoint.save({"epoch": 2, "weights": torch.ones(1_000_000)}, tmp_path / checkpoint.name(1))
    assert checkpoint.load(tmp_path / checkpoint.name(1))["epoch"] == 1


def test_a_prune_beside_another_writer_leaves_what_it_writes(tmp_path):
    for epoch in (1, 2, 3):
        checkpoint.save({"epoch": epoch}, tmp_path / checkpoint.name(epoch))
    (tmp_path / "epoch_00004.part").write_bytes(b"half")
    checkpoint.prune(tmp_path, parts=False)
    assert [path.name for path in checkpoint.found(tmp_path)] == ["epoch_00003", "epoch_00002"]
    assert (tmp_path / "epoch_00004.part").exists()
    checkpoint.prune(tmp_path)
    assert not (tmp_path / "epoch_00004.part").exists()
