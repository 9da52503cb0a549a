"""What keeps a Ray cluster from starting, or a run from joining one: each is one line that says what to type."""

import logging
import os
import signal
import subprocess

import psutil
import pytest

from rotssl.config.fields import ConfigError
from rotssl.runtimes import ray_start
from tests.programs import ROOT, SMALL, command, flags, started, wait_for, without_ray


class Ray:
    """What ``connect`` needs of Ray; a start fails as many times as there are errors."""

    def __init__(self, *errors, before=lambda: None):
        self.errors, self.before, self.starts = list(errors), before, 0

    def init(self, address, **settings):
        self.starts += 1
        self.before()
        if self.errors:
            raise self.errors.pop(0)

    def shutdown(self):
        pass


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in list(os.environ):
        if name.startswith("RAY_"):
            monkeypatch.delenv(name)
    return tmp_path / "home"


def mode(path):
    return path.stat().st_mode & 0o777


@pytest.mark.system
def test_a_folder_that_ray_cannot_use_is_one_line_and_code_2(tmp_path):
    long, taken = tmp_path / ("x" * 100), tmp_path / "taken"
    long.mkdir()
    taken.mkdir()
    (taken / "ray").write_text("of somebody else")  # as a folder that may not be entered, which root may
    began = [
        subprocess.Popen(
            command("pretrain.py", *flags(SMALL, tmp_path, run_name=folder.name[:5])),
            env=without_ray() | {"TMPDIR": str(folder)},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for folder in (long, taken)
    ]
    for process, words in zip(began, ("AF_UNIX", "File exists"), strict=True):
        told = process.communicate()[1]
        assert process.returncode == 2 and len(told.splitlines()) == 1, told
        assert words in told and "export RAY_TMPDIR=/short/path" in told, told


def test_the_address_of_a_dashboard_is_named_as_such(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ConfigError, match=r"^RAY_ADDRESS: http://127.0.0.1:8265 is the address of a dashboard.*unset"):
        ray_start.address()


TIMED_OUT = "The current node timed out during startup. This could happen because some of the raylet failed"


def test_a_start_that_times_out_is_tried_once_more(caplog):
    ray = Ray(Exception(TIMED_OUT))
    with caplog.at_level(logging.WARNING, "rotssl"):
        ray_start.connect(ray, "local")
    assert ray.starts == 2 and "timed out during startup" in caplog.text
    ray = Ray(Exception(TIMED_OUT), Exception(TIMED_OUT))
    with pytest.raises(
        ConfigError, match=r"^Ray could not start on this machine .*timed out during startup.*again|later"
    ):
        ray_start.connect(ray, "local")
    assert ray.starts == 2


def test_a_failed_start_leaves_no_process():
    ours = []

    def leave():
        ours.append(psutil.Popen(["sleep", "600"]))

    with pytest.raises(ConfigError):
        ray_start.connect(Ray(Exception(TIMED_OUT), Exception(TIMED_OUT), before=leave), "local")
    assert len(ours) == 2 and not any(process.is_running() for process in ours)


@pytest.mark.parametrize("error", [ConnectionError("refused"), RuntimeError("401"), Exception("gRPC"), OSError("x")])
def test_a_cluster_that_cannot_be_joined_is_one_line(error):
    ray = Ray(error)
    with pytest.raises(ConfigError, match=r"^RAY_ADDRESS: cannot connect.*RAY_AUTH_MODE=token"):
        ray_start.connect(ray, "127.0.0.1:6379")
    assert ray.starts == 1


def test_the_token_is_private_before_ray_reads_it(home, monkeypatch):
    token, seen = home / ".ray" / "auth_token", []
    ray_start.connect(Ray(before=lambda: seen.append((mode(token), len(token.read_text())))), "local")
    assert seen == [(0o600, 64)] and [*token.parent.iterdir()] == [token]
    kept = token.read_text()
    token.chmod(0o644)  # as Ray makes it
    ray_start.connect(Ray(before=lambda: seen.append(mode(token))), "local")
    assert seen[1] == 0o600 and token.read_text() == kept
    token.unlink()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    ray_start.connect(Ray(), "local")
    assert not token.exists()


@pytest.mark.exhaustive  # Ray waits for 30 s
def test_a_node_that_hangs_in_its_start_is_started_again(tmp_path):
    argv = command("pretrain.py", *flags(SMALL, tmp_path))
    with started(argv, tmp_path / "log", without_ray() | {"RAY_ADDRESS": "local"}) as process:

        def raylet():
            below = psutil.Process(process.pid).children()
            return next((p for p in below if p.name() == "raylet"), None)

        first = wait_for(raylet, process)
        first.send_signal(signal.SIGSTOP)
        assert process.wait() == 0, process.told()[-3000:]
        assert "trying once more" in process.told()
    assert not first.is_running()


def test_a_node_s_end_is_a_line(monkeypatch, caplog, capsys):
    from ray._private import worker

    monkeypatch.setattr(worker, "print_to_stdstream", lambda data, ignore_prefix: print(data["lines"]))
    for _ in range(2):  # a second cluster
        ray_start._shorten_messages()
    tell = worker.print_to_stdstream
    with caplog.at_level(logging.WARNING, "rotssl"):
        tell({"pid": "raylet", "lines": ["Raylet is terminated. Possible reasons\n    [stack]\n    more"]}, False)
        tell({"pid": 7, "lines": ["of a worker"]}, False)
    assert [record.getMessage() for record in caplog.records] == ["Ray: Raylet is terminated. Possible reasons"]
    assert capsys.readouterr().out == "['of a worker']\n"
