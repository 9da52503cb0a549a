"""A run's folder: its state in run.json, its lock, and the check that it can be written."""

import json
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rotssl import config as cfg
from rotssl.base.address import file_of, is_gone, without_login
from rotssl.base.errors import Held
from rotssl.base.lock import locked
from rotssl.base.paths import AnyPath, write_whole
from rotssl.config import Config, ResolvedConfig
from rotssl.config.fields import ConfigError
from rotssl.config.recipes import load_recipe
from rotssl.runs import checkpoint, journal

NOT_SAVED = ("path", "changes", "doubt", "moved")


class Busy(ConfigError):
    """Another process holds the lock of the run."""


@dataclass
class RunState:
    """``run.json`` in the run's folder: the configuration of the run, and how its last start ended.

    ``status`` is new, running, finished, failed, interrupted, stopped (``train.stop_after``) or pruned (by a sweep's scheduler).
    ``missing`` names measures that failed at the end of the run. ``tested`` names the protocols of ``evaluation.protocols`` that
    the finished run was evaluated by on test, ``untested`` says why it could not be. ``changes`` lists, in lines, requested
    fields that differ from the recorded ones and do not affect what is computed. ``doubt`` is a line that says why the file was
    not believed. ``moved`` tells that the store is looked for in another place than the recorded one, where it is gone.
    """

    path: AnyPath
    config: dict[str, Any]
    status: str = "new"
    reason: str = ""
    uri: str = ""
    run_id: str | None = None
    synced: bool = False
    missing: list[str] = field(default_factory=list)
    tested: list[str] = field(default_factory=list)
    untested: str = ""
    changes: list[str] = field(default_factory=list)
    doubt: str = ""
    moved: bool = False

    @property
    def is_done(self) -> bool:
        """Whether another start has nothing to do: the run is finished, and all its measures were made."""
        return self.status == "finished" and not self.missing

    def to_test(self, config: Config) -> bool:
        """Whether the run is finished, and not yet evaluated by all protocols that the configuration asks for."""
        return self.status == "finished" and not set(config.evaluation.protocols or ()) <= set(self.tested)

    @classmethod
    def of(cls, config: ResolvedConfig) -> "RunState":
        """The state of a run, read from its folder if it was started before; without a record, from its newest checkpoint.

        Raises:
            ConfigError: it was started with another configuration, or neither run.json nor a checkpoint can be read.
        """
        ours = cfg.identity_of(config)
        record = cls.read(config.run_dir / "run.json", ours)
        if record.status == "new" and checkpoint.found(config.run_dir):
            record._rebuild(config)
        done, epochs = max(journal.read(config.run_dir), default=0), config.train.epochs
        if record.status == "finished" and done < epochs:
            record.status = "interrupted"
            record.doubt = (
                f"run.json says that the run is finished, but its journal has {done} of {epochs} epochs: going on"
            )
        for key, before, now in cfg.changes(record.config, config):
            if key not in cfg.MAY_CHANGE:
                raise ConfigError(
                    f"{key}: got {now}, but run {config.tracking.run_name!r} was started with {before}; choose another run_name"
                )
            if key in record.config:
                record.changes.append(f"{key}: {now} in place of {before}")
        if not record.is_done:
            record.config = ours
        return record

    @classmethod
    def epochs_of(cls, config: ResolvedConfig) -> int | None:
        """The length of a run that was started before, in epochs; None if there is none in its folder.

        Raises:
            ConfigError: neither run.json nor a checkpoint can be read.
        """
        record = cls.read(config.run_dir / "run.json", {}).config
        if not record and (state := next(checkpoint.latest(config.run_dir), None)):
            record = checkpoint.recorded(config.run_dir, state)
        found: int | None = record.get("train.epochs")
        return found

    def _rebuild(self, config: ResolvedConfig) -> None:
        """Take the configuration of the newest checkpoint: the record of a run that has some is lost."""
        state = checkpoint.newest(config.run_dir, config)
        if state is None or "config" not in state:
            raise ConfigError(
                f"storage.path: {config.run_dir} has no run.json and no checkpoint that can be read; move the folder away to "
                "start again"
            )
        self.config = checkpoint.recorded(config.run_dir, state)
        self.status, place = "interrupted", checkpoint.place(state)
        self.doubt = f"run.json of {config.tracking.run_name!r} was lost: rebuilt from {place}"

    @classmethod
    def read(cls, path: AnyPath, config: dict[str, Any]) -> "RunState":
        """The state in a file, or a new one with this configuration if there is no file or nothing in it.

        Raises:
            ConfigError: the file can't be read.
        """
        try:
            content = path.read_bytes() if path.exists() else b""
            if not content.strip(b"\0 \n"):  # what a crash of the machine leaves of a file that was not yet on the disk
                return cls(path, config)
            record = cls(path, **json.loads(content))
            if not isinstance(record.config, dict):
                raise ValueError("no configuration in it")
            before = without_login(record.uri)
            record.uri = _found_again(before, path.parent)
            record.moved = record.uri != before
        except (OSError, ValueError, TypeError, RecursionError) as error:
            saved = "remove it to go on from the newest checkpoint, or " if checkpoint.found(path.parent) else ""
            raise ConfigError(
                f"storage.path: {path} cannot be read ({error}); {saved}move the folder away to start again"
            ) from error
        return record

    def write(self, status: str, reason: str = "") -> None:
        """Save atomically with a new status and its reason."""
        self.status, self.reason = status, reason
        content = {key: value for key, value in vars(self).items() if key not in NOT_SAVED}
        write_whole(self.path, json.dumps(content, indent=2) + "\n")


def recorded(folder: AnyPath, root: str | None = None) -> ResolvedConfig:
    """The resolved configuration of a run, from the ``config.yaml`` in its folder.

    Args:
        folder: of the run.
        root: the images' new ``data.root``, if they were moved.

    Raises:
        ConfigError: it can't be read.
    """
    moved = {} if root is None else {"data.root": root}
    # Fields that the run's version did not have are open; the others are resolved, whatever the size of the data set.
    return cfg.resolve(cfg.build(load_recipe(folder / "config.yaml") | moved), 224, sys.maxsize)


@contextmanager
def run_folder(folder: AnyPath, patience: float = 0) -> Iterator[AnyPath]:
    """Create and lock the folder of a run for this process.

    Args:
        folder: ``ResolvedConfig.run_dir``, or the folder of a sweep.
        patience: seconds to wait for another process that holds it: one that lost its driver takes some time to notice.

    Raises:
        ConfigError: the folder can't be written.
        Busy: another process holds it.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / ".lock", patience))
        except Held as error:
            raise Busy(f"tracking.run_name: another process is currently running {folder.name!r}") from error
        except OSError as error:
            raise ConfigError(f"storage.path: cannot write to {error.filename or folder}: {error.strerror}") from error
        yield folder


def _found_again(uri: str, folder: AnyPath) -> str:
    """The store of a run; that in its storage.path if it was moved there with the run's folder."""
    file = file_of(uri)
    if not isinstance(folder, Path):
        return uri
    beside = folder.absolute().parent.parent / (file.name if file else "")
    return f"sqlite:///{beside}" if is_gone(uri) and beside.is_file() else uri


def check_writable(folder: AnyPath) -> None:
    """Check that a folder can be created and written, without creating it.

    Raises:
        ConfigError: it can't.
    """
    if not isinstance(folder, Path):
        probe = folder / f".check-{uuid.uuid4().hex}"
        try:
            probe.write_bytes(b"")
            probe.remove()
        except OSError as error:
            raise ConfigError(f"storage.path: cannot write to {folder}: {error.strerror}") from error
        return
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"storage.path: cannot write to {folder}")
