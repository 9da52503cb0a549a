"""The tracking store: its URI, checks that it is usable, and a client with short timeouts."""

import contextlib
import errno
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from rotssl.base import place
from rotssl.base.address import file_of, is_gone, without_login
from rotssl.base.lock import locked
from rotssl.config import ResolvedConfig, default_storage
from rotssl.config.fields import ConfigError
from rotssl.config.rules import INSTEAD, no_login
from rotssl.config.sections import OFF
from rotssl.tracking import moved

ADDRESS = "MLFLOW_TRACKING_URI"
_USER, _PASSWORD, _TOKEN = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"
PARENT = "mlflow.parentRunId"

# A dead server must not block training: MLflow's defaults block for minutes.
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout is for results
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
CREATING_S = 120  # seconds to wait for another process that creates the tables of a store


def default_uri(storage: str) -> str:
    """The URI of the sqlite file in storage.path."""
    return f"sqlite:///{Path(storage) / 'mlflow.db'}"


def asked_uri(given: str | None) -> str:
    """The URI of the store given by a flag, else MLFLOW_TRACKING_URI, else the sqlite file in the default storage.

    Raises:
        ConfigError: the URI is off, which cannot be read, or the flag has a login in it.
    """
    storage = os.path.abspath(os.path.expanduser(default_storage()))
    no_login("--uri", given, INSTEAD)
    uri = given or take_login(os.environ.get(ADDRESS) or default_uri(storage))
    if uri == OFF:
        raise ConfigError("--uri: got off, expected a store to read from: sqlite:///FILE or http(s)://HOST:PORT")
    return uri


def chosen_uri(given: str | None, say: Callable[[str], None]) -> str | None:
    """tracking.uri, else MLFLOW_TRACKING_URI, without login; None for the default.

    Args:
        given: tracking.uri of a resolved configuration.
        say: called with a line if MLFLOW_TRACKING_URI is set but not used.

    Raises:
        ConfigError: it is of an unknown kind, or its file can't be written.
    """
    set_ = os.environ.get(ADDRESS)
    if given is not None:
        check_uri(given)
        if set_ and without_login(set_) != given:
            say(f"{ADDRESS} ({without_login(set_)}) is not used: tracking.uri is {given}")
        return given
    if not set_:
        return None
    uri, file = take_login(set_), file_of(set_)
    uri = uri if file is None else f"sqlite:///{file.absolute()}"  # workers run in another folder
    if uri == OFF:
        raise ConfigError(f"{ADDRESS}: got off, expected a store; train without one by --tracking.uri off")
    check_uri(uri, ADDRESS)
    return uri


def take_login(uri: str) -> str:
    """The address without its login, which is from now on in the environment of this process, where MLflow reads it.

    So it is in no file, on no terminal and in no store.
    """
    shown = without_login(uri)
    if shown != uri:
        found = urlsplit(uri)
        os.environ[_USER], os.environ[_PASSWORD] = unquote(found.username or ""), unquote(found.password or "")
    return shown


def credentials() -> dict[str, str]:
    """What a worker needs in its environment to use the store, and the object store, of this process."""
    return {key: os.environ[key] for key in (_USER, _PASSWORD, _TOKEN) if key in os.environ} | place.credentials()


def check_uri(uri: str, key: str = "tracking.uri") -> None:
    """Check a tracking URI without importing mlflow.

    Args:
        uri: the URI.
        key: field or variable that named it, for the message.

    Raises:
        ConfigError: its scheme isn't sqlite or http(s), or the folder of the sqlite file can't be written.
    """
    if uri == OFF or uri.startswith(("http://", "https://")):
        return
    file = file_of(uri)
    if file is None:
        raise ConfigError(f"{key}: got {uri!r}, expected sqlite:///FILE or http(s)://HOST:PORT")
    target = file if file.exists() else file.absolute().parent
    if file.is_dir() or not target.exists() or not os.access(target, os.W_OK):
        raise ConfigError(f"{key}: {file} is not a writable file")


def store_of(config: ResolvedConfig) -> str:
    """The tracking store of a resolved configuration, or OFF."""
    return config.tracking.uri or default_uri(config.storage.path)


def check_store(uri: str, nodes: int) -> None:
    """Check that the trials of a sweep do not write to an sqlite file from several machines; of a run the driver alone does.

    Raises:
        ConfigError: the store is an sqlite file, but the cluster has several nodes.
    """
    if uri.startswith("sqlite") and nodes > 1:
        raise ConfigError(
            f"tracking.uri: got {uri!r}, expected http(s)://HOST:PORT: the trials write from all {nodes} nodes, "
            "and sqlite works on one machine only"
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


def client_of(uri: str, create: bool = False) -> Any:
    """An MLflow client of a store, which gives up soon if there is no answer.

    Args:
        uri: URI of the store, without login.
        create: whether an sqlite file that is missing is created.

    Raises:
        FileNotFoundError: the file is missing.
        Exception: of MLflow, the store can't be used.
    """
    if not create and is_gone(uri):
        raise FileNotFoundError(errno.ENOENT, "the store is not there any more", str(file_of(uri)))
    for key, value in _PATIENCE.items():
        os.environ.setdefault(key, value)
    from mlflow.tracking import MlflowClient

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with _alone(uri):
        return MlflowClient(tracking_uri=uri)


@contextlib.contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Lock an sqlite store: two processes that create or upgrade its tables at once would both fail."""
    file = file_of(uri)
    if file is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(PermissionError):  # a folder that can only be read: nobody creates anything there
            stack.enter_context(locked(file.with_name(f".{file.name}.lock"), CREATING_S))
        if file.exists():
            with contextlib.suppress(sqlite3.Error):  # tables that MLflow has not made yet, or is about to refuse
                moved.follow(file)
        yield


def short(error: Exception) -> str:
    """An error in one line."""
    return without_login(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}")
