"""What all tests share: real data where there are any, one pool of two processes, one Ray cluster."""

import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# Tests start clusters of their own: they must not join one that happens to run here.
os.environ.pop("RAY_ADDRESS", None)
# A shell ignores Ctrl-C for what it starts in the background, and that is inherited; tests interrupt what they start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

from tests.pool import Pool

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared_data():
    """Folder with FashionMNIST/ and cifar10-jpeg.tar.gz."""
    folder = os.environ.get("ROTSSL_DATA")
    if not folder:
        pytest.skip("ROTSSL_DATA is not set: no real data here")
    return Path(folder)


@pytest.fixture(scope="session")
def pool():
    """Two processes with a gloo group, kept for the whole session."""
    with Pool(2) as workers:
        yield workers
