"""What all tests share: real data where there are any, one pool of two processes, one Ray cluster."""

import os
import runpy
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# Tests start clusters of their own: they must not join one that happens to run here.
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("MLFLOW_TRACKING_URI", None)  # their runs go to stores of their own
# A shell ignores Ctrl-C for what it starts in the background, and that is inherited; tests interrupt what they start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

from tests.pool import Pool
from tests.programs import ROOT, without_ray

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """A test's tier follows from what it needs, where it doesn't say more itself (pyproject.toml has the list)."""
    for item in items:
        if "pool" in item.fixturenames:
            item.add_marker("contract")
        if "cluster" in item.fixturenames:
            item.add_marker("system")


@pytest.fixture(scope="session")
def shared_data():
    """Folder with FashionMNIST/ and cifar10-jpeg.tar.gz."""
    folder = os.environ.get("ROTSSL_DATA")
    if not folder:
        pytest.skip("ROTSSL_DATA is not set: no real data here")
    return Path(folder)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The configuration of a finished run of BYOL with rotation, two epochs, in its own store. Change only ``copied`` ones."""
    from tests.finished import finished

    return finished(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def main(monkeypatch, capsys):
    """Runs a file of jobs/ as a program, in this process: its exit code, and what it printed."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "jobs" / script), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def pool():
    """Two processes with a gloo group, kept for the whole session."""
    with Pool(2) as workers:
        yield workers


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Environment of a client of a cluster with two nodes of one CPU each and a token, which cluster/local.sh starts."""
    with two_nodes(tmp_path_factory.mktemp("cluster")) as env:
        yield env


@contextmanager
def two_nodes(folder):
    """As the fixture ``cluster``, for a test that breaks the nodes; their process ids are in worker.pid and head.pid."""
    env = without_ray() | {"STATE": str(folder), "GCS_PORT": free_port(), "DASHBOARD_PORT": free_port()}
    script = str(ROOT / "cluster" / "local.sh")
    subprocess.run([script, "start"], env=env, check=True, timeout=200)
    try:
        yield env | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_ADDRESS": f"127.0.0.1:{env['GCS_PORT']}",
        }
    finally:
        subprocess.run([script, "stop"], env=env, check=True, timeout=100)
        assert not folder.exists()  # no token, logs or process ids are left
