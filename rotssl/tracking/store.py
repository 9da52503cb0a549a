"""The tracking store: its URI, checks that it is usable, and a client with short timeouts."""

import logging
import os
from pathlib import Path
from typing import Any

from rotssl.config import ResolvedConfig, default_storage
from rotssl.config.fields import ConfigError
from rotssl.config.sections import OFF

PARENT = "mlflow.parentRunId"

# A dead server must not block training: MLflow's defaults block for minutes.
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


def default_uri(storage: str) -> str:
    """The URI of the sqlite file in storage.path."""
    return f"sqlite:///{Path(storage) / 'mlflow.db'}"


def asked_uri(given: str | None) -> str:
    """The URI of the store given by a flag, else MLFLOW_TRACKING_URI, else the sqlite file in the default storage.

    Raises:
        ConfigError: the URI is off, which cannot be read.
    """
    storage = os.path.abspath(os.path.expanduser(default_storage()))
    uri = given or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(storage)
    if uri == OFF:
        raise ConfigError("--uri: got off, expected a store to read from: sqlite:///FILE or http(s)://HOST:PORT")
    return uri


def check_uri(uri: str) -> None:
    """Check a tracking URI without importing mlflow.

    Raises:
        ConfigError: its scheme isn't sqlite or http(s), or the folder of the sqlite file can't be written.
    """
    if uri == OFF or uri.startswith(("http://", "https://")):
        return
    if not uri.startswith("sqlite:///") or len(uri) == len("sqlite:///"):
        raise ConfigError(f"tracking.uri: got {uri!r}, expected sqlite:///FILE or http(s)://HOST:PORT")
    file = Path(uri.removeprefix("sqlite:///"))
    target = file if file.exists() else file.absolute().parent
    if file.is_dir() or not target.exists() or not os.access(target, os.W_OK):
        raise ConfigError(f"tracking.uri: {file} is not a writable file")


def store_of(config: ResolvedConfig) -> str:
    """The tracking store of a resolved configuration, or OFF."""
    return config.tracking.uri or default_uri(config.storage.path)


def check_store(uri: str, nodes: int) -> None:
    """Check that an sqlite file is used on one machine only.

    Raises:
        ConfigError: the store is an sqlite file, but the cluster has several nodes.
    """
    if uri.startswith("sqlite") and nodes > 1:
        raise ConfigError(
            f"tracking.uri: got {uri!r}, expected http(s)://HOST:PORT: sqlite works on one machine only, the cluster has {nodes}"
        )


def reachable(uri: str) -> str:
    """Why this machine cannot use a tracking store; empty if it can. A missing file is not created."""
    if uri.startswith("sqlite"):
        file = Path(uri.removeprefix("sqlite:///"))
        above = next(path for path in (file, *file.parents) if path.exists())
        if not os.access(above, os.W_OK):
            return f"tracking.uri: {file} cannot be written on this machine"
        if above != file:
            return ""
    try:
        client_of(uri).search_experiments(max_results=1)
    except Exception as error:  # as in open_run
        return f"tracking.uri: {uri} cannot be used on this machine: {short(error)}"
    return ""


def client_of(uri: str) -> Any:
    """An MLflow client of a store, which gives up soon if there is no answer."""
    for key, value in _PATIENCE.items():
        os.environ.setdefault(key, value)
    from mlflow.tracking import MlflowClient

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def short(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
