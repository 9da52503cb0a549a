"""What a run has on record, who holds its folder, and what may change when it goes on."""

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest

from rotssl import config as cfg
from rotssl import lifecycle
from rotssl.config.fields import ConfigError
from rotssl.runs.state import RunState, check_writable, run_folder
from tests.small_runs import make_config


@pytest.fixture
def config(tmp_path):
    asked = cfg.build({"data.name": "synthetic", "storage.path": str(tmp_path), "tracking.run_name": "run"})
    return cfg.resolve(asked, 32, 1024)


def test_a_record_is_what_was_written_or_new(config):
    with run_folder(config.run_dir) as folder:
        record = RunState.of(config)
        assert (record.status, record.run_id) == ("new", None)
        record.run_id = "abc"
        record.write("pruned", "why")
        again = RunState.of(config)
        assert (again.status, again.reason, again.run_id) == ("pruned", "why", "abc")
        assert sorted(path.name for path in folder.iterdir()) == [".lock", "run.json"]
    with pytest.raises(ConfigError, match=r"optim.lr: got 0.5, but run 'run' was started with 0.48"):
        RunState.of(cfg.replace(config, {"optim.lr": 0.5}))
    assert RunState.of(cfg.replace(config, {"scaling.num_workers": 3})).status == "pruned"


DEEP = "[" * 10_000 + "]" * 10_000


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"config": 3}', '{"config": {}, "colour": 1}', "\x00{", DEEP])
def test_a_record_that_cannot_be_read_is_said(config, content):
    with run_folder(config.run_dir) as folder:
        (folder / "run.json").write_text(content)
        with pytest.raises(ConfigError, match=r"^storage.path: .*run.json cannot be read") as caught:
            RunState.of(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n", "\0" * 400])
def test_a_record_that_a_crash_left_empty_is_a_new_one_where_nothing_was_saved(config, content):
    with run_folder(config.run_dir) as folder:
        (folder / "run.json").write_text(content)
        assert (RunState.of(config).status, RunState.of(config).doubt) == ("new", "")


def test_a_run_is_held_by_one_process_and_waited_for(config):
    import threading
    import time

    holder = run_folder(config.run_dir)
    holder.__enter__()
    with pytest.raises(ConfigError, match="another process"), run_folder(config.run_dir):
        pass
    timer = threading.Timer(0.3, lambda: holder.__exit__(None, None, None))
    timer.start()
    started = time.monotonic()
    with run_folder(config.run_dir, patience=30) as folder:
        assert 0.2 < time.monotonic() - started < 20 and folder == config.run_dir
    timer.join()


@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL", "EIO"])
def test_a_run_on_a_file_system_without_flock_is_warned_and_goes_on(config, monkeypatch, caplog, name):
    number = getattr(errno, name)
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    with run_folder(config.run_dir) as folder:
        assert folder == config.run_dir
    (record,) = caplog.records
    assert "do not start the same run twice" in record.getMessage()


def test_a_folder_that_cannot_be_written_is_refused_and_none_is_made(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(ConfigError, match=r"^storage.path: cannot write to"):
            check_writable(folder)


def test_a_record_is_written_whole(config, monkeypatch):
    with run_folder(config.run_dir):
        record = RunState.of(config)
        record.write("running")
        monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            record.write("finished")
        assert json.loads((config.run_dir / "run.json").read_text())["status"] == "running"


def test_a_record_is_on_the_disk_before_its_name_and_the_name_before_the_next_step(config, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def synced(handle):
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        fsync(handle)

    def renamed(part, path):
        assert (part.parent, part.stat().st_size > 0) == (path.parent, True)
        done.append(("rename", path.name))
        replace(part, path)

    with run_folder(config.run_dir):
        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(Path, "replace", renamed)
        RunState.of(config).write("running")
    assert done == [("sync", "run.json.part"), ("rename", "run.json"), ("sync", "run")]


NOT_COMPUTED = {
    "evaluation.knn_every": 0,
    "evaluation.knn_bf16": True,
    "evaluation.linear": False,
    "train.compile": True,
    "train.accumulate": 2,
    "tasks.log_gradients_every": 5,
    "data.root": "/elsewhere",
}


@pytest.mark.contract
def test_what_is_not_computed_may_change_when_a_run_goes_on_and_is_said(tmp_path):
    assert set(NOT_COMPUTED) == set(cfg.MAY_CHANGE)
    config = make_config(tmp_path, "byol")
    config.run_dir.mkdir(parents=True)
    RunState.of(config).write("running")
    for key, value in NOT_COMPUTED.items():
        other = cfg.replace(config, {key: value})
        assert RunState.of(other).changes == [f"{key}: {value} in place of {cfg.flat(config)[key]}"]
        assert (cfg.fingerprint(other) == cfg.fingerprint(config)) == (key != "data.root"), key
    changed = RunState.of(cfg.replace(config, NOT_COMPUTED))
    assert len(changed.changes) == len(NOT_COMPUTED)
    changed.write("running")
    assert RunState.of(cfg.replace(config, NOT_COMPUTED)).changes == []  # said once
    with pytest.raises(ConfigError, match=r"^evaluation\.holdout: got 0\.2, but run 'run' was started with 0\.1"):
        RunState.of(cfg.replace(config, {"evaluation.holdout": 0.2}))


@pytest.mark.contract
def test_a_run_may_go_on_in_more_passes(tmp_path):
    found = []
    for passes in (1, 4):
        fields = {"data.name": "synthetic", "train.accumulate": passes, "storage.path": str(tmp_path)}
        found.append(lifecycle.prepare(cfg.build(fields))[0])
    assert found[0].run_dir == found[1].run_dir
    found[0].run_dir.mkdir(parents=True)
    RunState.of(found[0]).write("running")
    assert RunState.of(found[1]).changes == ["train.accumulate: 4 in place of 1"]


@pytest.mark.contract
def test_fields_that_came_later_leave_earlier_runs_alone(tmp_path):
    config = make_config(tmp_path, "byol")
    config.run_dir.mkdir(parents=True)
    RunState.of(config).write("running")
    assert "rotation.head_on" not in cfg.identity_of(config)
    assert RunState.of(cfg.replace(config, {"rotation.head_on": "encoder"})).changes == []
    with pytest.raises(ConfigError, match=r"^rotation\.head_on: got projector, but run 'run' was started with encoder"):
        RunState.of(cfg.replace(config, {"rotation.head_on": "projector"}))
