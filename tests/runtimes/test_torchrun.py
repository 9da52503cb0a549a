"""Runs in the processes that torchrun starts."""

import json
import sys

import psutil
import pytest

from rotssl.config.fields import ConfigError
from rotssl.engine.events import Usage
from rotssl.runs import journal
from rotssl.runtimes import torchrun
from rotssl.runtimes.torchrun import Group
from tests.programs import ROOT, SMALL, flags, job, started, wait_for
from tests.small_runs import make_config

FIELDS = {**SMALL, "train.epochs": 6, "tracking.uri": "off"}


def test_the_group_is_the_environment_s(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert torchrun.group() is None
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert torchrun.group() is None  # Ray Train sets them, too
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert torchrun.group() == Group(3, 4, 1)


def test_a_group_that_does_not_fit_is_refused(tmp_path):
    for workers in ("auto", 0, 4):
        torchrun.check(make_config(tmp_path, "byol", **{"scaling.num_workers": workers}), Group(0, 4, 0))
    with pytest.raises(ConfigError, match=r"scaling.num_workers: got 2, but torchrun has started 4 processes"):
        torchrun.check(make_config(tmp_path, "byol", **{"scaling.num_workers": 2}), Group(0, 4, 0))
    with pytest.raises(ConfigError, match=r"train.batch_size: got 16, expected a multiple of the 3 workers"):
        torchrun.check(make_config(tmp_path, "byol"), Group(0, 3, 0))


def test_the_first_machine_shows_the_samples_of_the_others(monkeypatch):
    from torch.distributed import HashStore

    for name in ("GROUP_RANK", "GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert torchrun.machines(Group(0, 4, 0)) == (0, 1, 4)
    for name, value in {"GROUP_RANK": "1", "GROUP_WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert torchrun.machines(Group(2, 6, 0)) == (1, 3, 2)
    shown, store = [], HashStore()
    first, second, third = (torchrun.passed_on(store, node, 3, shown.append) for node in range(3))
    first(Usage({"a": 1.0}))
    assert shown == [Usage({"a": 1.0})], "nobody is waited for"
    second(Usage({"b": 1.0}))
    second(Usage({"b": 2.0}))
    third(Usage({"c": 3.0}))
    first(Usage({"a": 2.0}))
    first(Usage({"a": 3.0}))
    assert shown[1:] == [Usage({"a": 2.0}), Usage({"b": 2.0}), Usage({"c": 3.0}), Usage({"a": 3.0})]


def start(*arguments):
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--max-restarts",
        "1",
    ]
    return [*launch, str(ROOT / "jobs" / "pretrain.py"), *map(str, arguments)]


@pytest.mark.system
@pytest.mark.exhaustive
def test_two_processes_of_torchrun_of_which_one_dies_end_as_if_it_had_not(tmp_path):
    given = flags(FIELDS, tmp_path, "two")
    folder = tmp_path / "rotssl" / "two"
    with started(start(*given), tmp_path / "log") as process:
        wait_for(lambda: 2 in journal.read(folder), process)
        workers = [
            child for child in psutil.Process(process.pid).children() if "jobs/pretrain.py" in str(child.cmdline())
        ]
        assert len(workers) == 2
        workers[1].kill()
        assert process.wait() == 0, process.told()[-3000:]
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    with started(start(*flags(FIELDS, tmp_path, "whole")), tmp_path / "log") as process:
        assert process.wait() == 0, process.told()[-3000:]
    cut, whole = (journal.read(tmp_path / "rotssl" / name) for name in ("two", "whole"))
    assert [cut[epoch]["loss/total"] for epoch in cut] == [whole[epoch]["loss/total"] for epoch in whole]
    assert set(cut) == set(range(1, 7))
    again = job(*given)  # finished, whatever starts it
    assert again.returncode == 0 and "already finished" in again.stdout
