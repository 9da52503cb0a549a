"""Joining or starting a Ray cluster; whatever goes wrong is one line that says what to type."""

import contextlib
import logging
import os
import secrets
import socket
import tempfile
from pathlib import Path
from typing import Any

import psutil

from rotssl.config.fields import ConfigError

log = logging.getLogger(__name__)
_ours = set[psutil.Process]()  # the processes of the cluster that we have started; their children are not in it


def address() -> str:
    """The address to connect to: RAY_ADDRESS, else the cluster of ``ray start`` on this machine if it answers, else ``local``.

    Raises:
        ConfigError: nothing answers at RAY_ADDRESS, where Ray itself would keep trying for minutes, or it is the dashboard's.
    """
    from ray._private.utils import read_ray_address

    asked = os.environ.get("RAY_ADDRESS", "auto")
    found = asked if asked != "auto" else read_ray_address() or "local"
    if found.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS: {found} is the address of a dashboard, which only `ray job submit` uses; "
            "`unset RAY_ADDRESS` to start this program by itself, or submit it as a job"
        )
    if "://" in found or not found.rpartition(":")[2].isdecimal():
        return found
    if silence := why_silent(found):
        if asked != "auto":
            raise ConfigError(f"RAY_ADDRESS: nothing answers at {found} ({silence})")
        return "local"  # the address file of a killed cluster
    return found


def why_silent(where: str) -> str:
    """Why nothing answers at HOST:PORT; empty if something does."""
    host, _, port = where.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return str(error)
    return ""


def connect(ray: Any, where: str) -> None:
    """Connect to the cluster at an address, or start one of our own if it is ``local``.

    Raises:
        ConfigError: that failed; a start that times out on a busy machine is tried once more before.
    """
    # Our warnings come through the progress queue; messages of Ray's own actors stay in its session's logs.
    whole = os.environ.get("RAY_LOG_TO_DRIVER") == "1"
    settings = {"logging_level": logging.ERROR, "log_to_driver": whole}
    if not whole:
        _shorten_messages()
    if where != "local":
        try:
            ray.init(where, **settings)
        except Exception as error:  # of any kind: Ray raises its own, the system's and those of gRPC
            token = "" if os.environ.get("RAY_AUTH_MODE") else "; if it requires a token: export RAY_AUTH_MODE=token"
            raise ConfigError(f"RAY_ADDRESS: cannot connect to the Ray cluster ({_line(error)}){token}") from error
        return
    try:
        _protect_token()
        try:
            _start(ray, settings)
        except (OSError, ValueError):
            raise  # another try would end in the same way
        except Exception as error:
            log.warning("Ray could not start (%s); trying once more", _line(error))
            _start(ray, settings)
    except Exception as error:  # as above
        raise ConfigError(_why_not_started(error)) from error


def _shorten_messages() -> None:
    """Let what Ray prints of a node's end be a line: it prints the last part of the node's log, with a trace of its stack."""
    from ray._private import worker as module

    if getattr(module.print_to_stdstream, "shortened", False):
        return
    whole = module.print_to_stdstream

    def first_line(data: dict[str, Any], ignore_prefix: bool) -> None:
        if data.get("pid") != "raylet":
            whole(data, ignore_prefix)
            return
        for text in data["lines"]:
            log.warning("Ray: %s", (str(text).strip().splitlines() or [""])[0][:200])

    first_line.shortened = True  # type: ignore[attr-defined]
    module.print_to_stdstream = first_line


def _start(ray: Any, settings: dict[str, Any]) -> None:
    """Start a cluster; what a failed start leaves behind is ended, which Ray itself does not do."""
    before = set(psutil.Process().children())
    try:
        ray.init("local", **settings)
    except BaseException:
        _ours.update(set(psutil.Process().children()) - before)
        disconnect(ray)
        raise
    _ours.update(set(psutil.Process().children()) - before)


def disconnect(ray: Any) -> None:
    """Disconnect, and end a cluster of our own with all of its processes; Ray leaves some if its head has died before."""
    left = set(_ours)
    for process in _ours:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.update(process.children(recursive=True))
    _ours.clear()
    ray.shutdown()
    for process in psutil.wait_procs(left, timeout=1)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10)


def _why_not_started(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
        folder = next(filter(None, map(os.environ.get, ("RAY_TMPDIR", "TMPDIR"))), "/tmp")  # noqa: S108 - as Ray chooses
        return (
            f"RAY_TMPDIR: Ray cannot use {folder}/ray for its sockets and logs ({_line(error)}); "
            "it needs a short path to a folder of your own: export RAY_TMPDIR=/short/path"
        )
    return (
        f"Ray could not start on this machine ({_line(error)}); if it is only busy, the same command may do later; "
        "--scaling.num_workers 0 needs no Ray"
    )


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300].rstrip(". ")


def _protect_token() -> None:
    """Make the token of our cluster readable for its owner only, and before Ray does, which lets everyone read it.

    Raises:
        OSError, RuntimeError: there is no home folder, or it can't be written; Ray fails for the same reason.
    """
    named = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if named or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return  # Ray makes none
    token = Path.home() / ".ray" / "auth_token"
    if not token.exists():
        token.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=token.parent) as whole:  # with mode 0600
            whole.write(secrets.token_hex(32))
            whole.flush()
            with contextlib.suppress(FileExistsError):  # another run has just made it
                os.link(whole.name, token)
    if token.stat().st_mode & 0o077:
        token.chmod(0o600)
