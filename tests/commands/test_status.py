"""What jobs/status.py says of runs that run, ended, or were killed."""

import json
import logging
import os
import time

import pytest

from rotssl.runs import alive, journal
from tests.programs import SMALL, flags


def write(storage, name, status, epochs=0, silent=None, experiment="rotssl"):
    """A run's folder as a start of it leaves it."""
    folder = storage / experiment / name
    book = journal.Journal(folder)
    for epoch in range(1, epochs + 1):
        book.append(epoch, {"throughput/images_per_second": 1234.5, "cost/train_seconds": 100.0 * epoch})
    book.add(1, {"knn/top1": 0.5})
    (folder / "run.json").write_text(json.dumps({"config": {"train.epochs": 10}, "status": status, "reason": "why"}))
    if silent is not None:
        (folder / alive.NAME).touch()
        os.utime(folder / alive.NAME, (time.time() - silent,) * 2)
    return folder


def test_states_pace_and_time_left(tmp_path, main):
    write(tmp_path, "a", "running", 4, silent=5)
    write(tmp_path, "b", "running", 4, silent=500)
    write(tmp_path, "c", "running", 4)  # killed before its first sign
    write(tmp_path, "d", "finished", 10)
    write(tmp_path, "e", "interrupted", 2, experiment="other")
    (tmp_path / "rotssl" / "f").mkdir()
    (tmp_path / "rotssl" / "f" / "run.json").write_text("{")
    code, out, err = main("status.py", str(tmp_path), "--json")
    assert (code, err) == (0, "")
    runs = {each["run"]: each for each in map(json.loads, out.splitlines())}
    assert {name: each["state"] for name, each in runs.items()} == {
        **{"a": "running", "b": "stale", "c": "stale"},
        **{"d": "finished", "e": "interrupted"},
    }
    assert runs["a"]["epoch"] == 4 and runs["a"]["epochs"] == 10 and runs["a"]["seconds_left"] == 600
    assert runs["a"]["images_per_second"] == 1234.5 and runs["a"]["knn"] == 0.5 and 4 < runs["a"]["silent_seconds"] < 60
    assert runs["d"]["seconds_left"] is None and runs["e"]["experiment"] == "other"
    code, out, err = main("status.py", str(tmp_path), "--experiment", "rotssl")
    assert code == 0 and "interrupted" not in out
    (line,) = (line for line in out.splitlines() if " a " in line)
    assert "running" in line and "4/10" in line and "1,234" in line and "10:00" in line and "50.0%" in line


def test_a_place_without_runs(tmp_path, main):
    assert main("status.py", str(tmp_path)) == (0, f"no runs below {tmp_path}\n", "")
    code, _, err = main("status.py", str(tmp_path / "none"))
    assert code == 2 and err == f"error: {tmp_path / 'none'}: no such folder; give the storage.path of the runs\n"


@pytest.mark.contract
def test_a_run_gives_signs_of_life_until_it_ends(tmp_path, main, monkeypatch):
    seen = []

    def train(config, *_):
        ends = time.monotonic() + 20
        while alive.silent_for(config.run_dir) is None and time.monotonic() < ends:
            time.sleep(0.01)
        seen.append(alive.silent_for(config.run_dir))
        return "made up"

    monkeypatch.setattr("rotssl.lifecycle._run_here", train)
    main("pretrain.py", *flags(SMALL, tmp_path), "--scaling.num_workers", "0", "--tracking.uri", "off")
    assert seen[0] < 30
    assert alive.silent_for(tmp_path / "rotssl" / "run") is None


def test_the_sign_is_renewed_and_its_failure_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(alive, "EVERY_S", 0.01)
    (tmp_path / "run").mkdir()
    with alive.kept(tmp_path / "run"):
        before = time.monotonic()
        while alive.silent_for(tmp_path / "run") is None:
            assert time.monotonic() - before < 20
        os.utime(tmp_path / "run" / alive.NAME, (0, 0))
        while alive.silent_for(tmp_path / "run") > 1000:
            assert time.monotonic() - before < 20
    assert not list((tmp_path / "run").iterdir())
    with caplog.at_level(logging.WARNING, "rotssl"), alive.kept(tmp_path / "none"):
        while not caplog.records:
            assert time.monotonic() - before < 20
        time.sleep(0.1)
    assert len(caplog.records) == 1 and "cannot be renewed" in caplog.text
