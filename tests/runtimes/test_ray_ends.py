"""How a run on a cluster of its own ends: with its head, by a signal, and what it leaves behind."""

import json
import os
import signal
import threading
from concurrent.futures import wait
from pathlib import Path

import psutil
import pytest

from rotssl.runs import journal
from rotssl.runtimes import watch
from tests.programs import SMALL, command, flags, job, started, wait_for, without_ray

LONG = {**SMALL, "data.limit": 1024, "train.epochs": 6, "tracking.uri": "off"}


def of_the_run(process):
    """All processes below the program, by now."""
    return psutil.Process(process.pid).children(recursive=True)


def shared_memory():
    return {path.name for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem.")}


def under_way(tmp_path, process):
    """Wait for the first epoch; returns the processes of the run and the files of shared memory that they made."""
    wait_for(lambda: 1 in journal.read(tmp_path / "rotssl" / "run"), process)
    return of_the_run(process)


def gone(processes):
    return psutil.wait_procs(processes, timeout=30)[1] == []


@pytest.mark.exhaustive  # the head may come back: a run waits for it for half a minute
def test_a_head_that_dies_ends_the_run_in_one_line_and_it_goes_on_later(tmp_path):
    argv, env = command("pretrain.py", *flags(LONG, tmp_path)), without_ray() | {"RAY_ADDRESS": "local"}
    with started(argv, tmp_path / "log", env) as process:
        ours = under_way(tmp_path, process)
        next(p for p in ours if p.name() == "gcs_server").kill()
        assert process.wait() == 1, process.told()[-3000:]
        last = process.told().splitlines()[-1]
        assert "the head of the Ray cluster is gone" in last and "goes on from the last checkpoint" in last
        assert "Traceback" not in process.told()
    assert json.loads((tmp_path / "rotssl" / "run" / "run.json").read_text())["status"] == "failed"
    assert gone(ours)
    done = job(*flags(LONG, tmp_path), env=env)
    assert done.returncode == 0 and "resuming after epoch" in done.stderr, done.stderr[-3000:]


@pytest.mark.system
@pytest.mark.exhaustive  # a cluster of its own, most of a minute
def test_a_run_that_is_terminated_leaves_its_status_and_nothing_else(tmp_path):
    argv, env = command("pretrain.py", *flags(LONG, tmp_path)), without_ray() | {"RAY_ADDRESS": "local"}
    before = shared_memory()
    with started(argv, tmp_path / "log", env) as process:
        ours = under_way(tmp_path, process)
        assert any("RayTrainWorker" in " ".join(p.cmdline()) for p in ours)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 130, process.told()[-3000:]
    folder = tmp_path / "rotssl" / "run"
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert gone(ours)
    pids = {str(p.pid) for p in ours}
    assert not [name for name in shared_memory() - before if any(pid in name for pid in pids)]
    assert not [*folder.rglob("*.part")] and os.listdir(folder)


def test_a_head_that_comes_back_in_time_is_waited_for(monkeypatch):
    now, ended, asked = [0.0], threading.Event(), []
    silent = iter([*["refused"] * 3, "", *["refused"] * 9])
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])

    def why_silent(address):
        asked.append(address)
        now[0] += 9
        return next(silent)

    monkeypatch.setattr(watch, "why_silent", why_silent)
    monkeypatch.setattr(watch, "wait", lambda futures, timeout: wait(futures, timeout=0))
    with pytest.raises(watch.HeadGone, match=r"^the head of the Ray cluster is gone \(h:1: refused\)"):
        watch.Head("h:1").until_done(ended.wait)
    ended.set()
    assert len(asked) == 8, "27 seconds of silence, an answer, 36 seconds of silence"
    assert watch.Head("h:1").until_done(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        watch.Head("h:1").until_done(lambda: 1 / 0)
