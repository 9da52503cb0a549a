"""The jobs as programs, for the tests: flags, starts, and waiting for what another process does."""

import atexit
import functools
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
SMALL = {
    "data.name": "synthetic",
    "data.limit": 128,
    "data.image_size": 16,
    "method.hidden_dim": 32,
    "method.out_dim": 16,
    "train.batch_size": 32,
    "train.epochs": 2,
    # What a run without a recipe would take from the registry, which changes with what was measured last.
    "views.size_start": None,
    "rotation.weight": 1.0,
    "rotation.conditioned": False,
}


def flags(fields, storage, run_name="run"):
    fields = {**fields, "storage.path": storage, "tracking.run_name": run_name}
    return [part for key, value in fields.items() for part in (f"--{key}", str(value))]


def command(script, *arguments):
    return [sys.executable, str(ROOT / "jobs" / script), *map(str, arguments)]


def job(*arguments, script="pretrain.py", env=None):
    """Runs a job to its end. How long that may take is for the test's own timeout, which ends the program as well."""
    return subprocess.run(command(script, *arguments), env=env, cwd=ROOT, capture_output=True, text=True)


@contextmanager
def started(argv, log, env=None):
    """A program that runs meanwhile, with what it prints in a file; it is killed if the test leaves it."""
    with log.open("w") as out:
        process = subprocess.Popen(argv, env=env, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        process.told = log.read_text
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def wait_for(condition, process):
    """What another process is to bring about, once it has. Ends with that process or with the test's timeout."""
    while not (found := condition()):
        assert process.poll() is None, f"ended with {process.returncode}:\n{process.told()[-3000:]}"
        time.sleep(0.02)
    return found


def without_ray():
    """The environment without what would lead to a cluster that runs here by chance."""
    return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}


@functools.cache
def _tables():
    """A store of MLflow without runs: making its tables takes a second, which each test would spend."""
    folder = Path(tempfile.mkdtemp(prefix="rotssl-mlflow-"))
    atexit.register(shutil.rmtree, folder)
    mlflow_client(f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"


def with_store(folder):
    """The folder with an empty store of MLflow where runs below it look for one by default."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    if not (Path(folder) / "mlflow.db").exists():
        shutil.copy(_tables(), folder)
    return folder


def mlflow_client(uri):
    """MLflow's own, whose import takes seconds that tests without it need not wait."""
    from mlflow.tracking import MlflowClient

    for name in ("alembic", "mlflow"):  # a test that looks at the terminal may be the first to need the tables
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(uri)
