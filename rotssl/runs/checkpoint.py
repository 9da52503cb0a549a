"""Checkpoints: one folder per epoch, with everything that the next step needs in one file.

The file is what ``torch.save`` writes, a zip archive. The comment at the archive's end is a checksum of all bytes before it.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from rotssl import config as cfg
from rotssl.base.files import put, sync_folder
from rotssl.base.paths import AnyPath, at, changed, fetched, filled, remove_tree, write_whole
from rotssl.config import Config
from rotssl.config.fields import ConfigError

log = logging.getLogger(__name__)
FILE = "checkpoint.pt"
WITHIN = "within_epoch"  # folder of the state that was last saved within an epoch
ASKED = "save_now"  # file in the run's folder that asks for such a save
HELD = "held"  # file in the folder of a checkpoint that is never deleted
KEEP = 2  # the newest, and one to fall back to if it is damaged
_NAME = re.compile(r"epoch_(\d{5})")
_MARK = b"sha256:"
_TAIL = len(_MARK) + 64  # bytes of the archive's comment
_PIECE = 1 << 20
_SEALED = "sealed"  # entry of a state whose file has a checksum, so that a lost one is noticed too


def name(epoch: int) -> str:
    """Folder of an epoch's checkpoint (1-based) below the run's folder."""
    return f"epoch_{epoch:05d}"


def snapshot(value: Any) -> Any:
    """A copy of a state in host memory, independent of further training: tensors in dicts, lists and tuples, and plain values.

    It is bit-identical and takes as much memory as the checkpoint on disk.
    """
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(item) for item in value)
    return value


def save(state: dict[str, Any], folder: AnyPath) -> None:
    """Write the state into a folder, atomically; the partial file that a crash leaves next to the folder is overwritten.

    For an object store the file is first written to this machine, into TMPDIR.

    Raises:
        OSError: the file can't be written, for example because the disk is full.
    """
    if isinstance(folder, Path):
        _save(state, folder)
        return
    with filled(folder) as here:
        _save(state, here / "new")
        (here / "new" / FILE).rename(here / FILE)
        (here / "new").rmdir()


def _save(state: dict[str, Any], folder: Path) -> None:
    import torch  # imported in functions only, so that the driver can list checkpoints without it

    part = folder.with_name(f"{folder.name}.part")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _check_room(part, folder)
    try:
        with part.open("w+b") as file:
            torch.save({**state, _SEALED: True}, file)
            _seal(file)
            file.flush()
            os.fsync(file.fileno())  # like the journal, which records the epoch as done
    except (OSError, RuntimeError) as error:
        why = error if isinstance(error, OSError) else error.__context__  # torch reports a full disk as a RuntimeError
        if not isinstance(why, OSError):
            raise
        raise OSError(why.errno, why.strerror, str(part)) from error
    folder.mkdir(exist_ok=True)
    put(part, folder / FILE)
    sync_folder(folder.parent)


def _check_room(part: Path, folder: Path) -> None:
    """Raise FileExistsError with what to remove if something else has the name of the folder or of a file."""
    file = folder / FILE
    for path, is_wrong in ((folder, not folder.is_dir()), (part, part.is_dir()), (file, file.is_dir())):
        if is_wrong and os.path.lexists(path):
            kind = "folder" if path.is_dir() else "file"
            raise FileExistsError(
                errno.EEXIST, f"a {kind} is where a checkpoint is to be written; remove it", str(path)
            )


def _seal(file: IO[bytes]) -> None:
    """Append the checksum to an archive, as its comment, whose length is the archive's last two bytes."""
    file.seek(-2, os.SEEK_END)
    file.write(_TAIL.to_bytes(2, "little"))
    digest = _digest(file, file.tell())
    file.seek(0, os.SEEK_END)
    file.write(_MARK + digest.encode())


def _digest(file: IO[bytes], size: int) -> str:
    """The checksum of the first bytes of a file."""
    found = hashlib.sha256()
    file.seek(0)
    while size > 0 and (piece := file.read(min(size, _PIECE))):
        found.update(piece)
        size -= len(piece)
    return found.hexdigest()


def _verify(path: Path) -> bool:
    """Whether a file has a checksum, as one of an earlier version has not; raises ValueError if it is wrong."""
    with path.open("rb") as file:
        whole = max(0, file.seek(0, os.SEEK_END) - _TAIL)
        file.seek(whole)
        tail = file.read()
        if tail.startswith(_MARK) and tail.decode("ascii", "replace") != _MARK.decode() + _digest(file, whole):
            raise ValueError("its checksum is wrong")
        return tail.startswith(_MARK)


def load(folder: AnyPath) -> dict[str, Any]:
    """The state in a checkpoint folder, on the CPU; only tensors and plain values are loaded, no pickled code is run.

    Raises:
        ValueError: the checksum is wrong, or lost.
        Exception: of several other kinds, the file is not a checkpoint.
    """
    import torch

    with fetched(folder / FILE) as file:
        has_checksum = _verify(file)
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    if state.pop(_SEALED, False) and not has_checksum:
        raise ValueError("its checksum is lost")
    return state


def found(run_dir: AnyPath) -> list[AnyPath]:
    """Checkpoint folders of a run, newest first."""
    if not isinstance(run_dir, Path):
        # An emptied folder may stay in a list for a while.
        names = sorted((entry.name for entry in run_dir.entries() if _NAME.fullmatch(entry.name)), reverse=True)
        return [run_dir / name for name in names if (run_dir / name / FILE).exists()]
    if not run_dir.is_dir():
        return []
    return sorted((p for p in run_dir.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()), reverse=True)


def latest(run_dir: AnyPath) -> Iterator[dict[str, Any]]:
    """The readable states of a run's checkpoints, newest first; a damaged one is skipped with a warning.

    Raises:
        ConfigError: one is of another epoch than its folder.
    """
    for folder in found(run_dir):
        if (state := _read(folder)) is None:
            continue
        if name(state["epoch"]) != folder.name:
            raise ConfigError(
                f"storage.path: {folder} holds the state after epoch {state['epoch']}; remove it to go on from another"
            )
        yield state


def _read(folder: AnyPath) -> dict[str, Any] | None:
    """The state in a folder; None with a warning if it is damaged."""
    try:
        state = load(folder)
        if not {"model", "optimizer", "epoch"} <= state.keys() or not isinstance(state["epoch"], int):
            raise ValueError("not a checkpoint")
    except (OSError, RuntimeError, EOFError, ValueError, AttributeError, LookupError, pickle.UnpicklingError) as error:
        why = error if type(error) is ValueError else type(error).__name__
        log.warning("checkpoint %s cannot be read (%s); trying the previous one", folder, why)
        return None
    return state


def within(run_dir: AnyPath) -> dict[str, Any] | None:
    """The state that was last saved within an epoch; None if there is none that can be read."""
    return _read(run_dir / WITHIN) if (run_dir / WITHIN / FILE).exists() else None


def last_save(run_dir: AnyPath) -> float:
    """When a state was last saved, in seconds of the file system's clock; 0 if none was."""
    times = [0.0]
    for folder in (*found(run_dir), run_dir / WITHIN):
        with contextlib.suppress(FileNotFoundError):  # the oldest ones are deleted meanwhile
            times.append(changed(folder / FILE))
    return max(times)


def source(address: str) -> AnyPath:
    """The folder of a checkpoint, given it or the folder of its run, whose newest one is taken.

    Raises:
        ConfigError: there is none.
    """
    try:
        place = at(address)
    except ValueError as error:
        raise ConfigError(f"train.init_from: {error}") from error
    folders = [place] if (place / FILE).exists() else found(place)
    if not folders:
        raise ConfigError(
            f"train.init_from: {place} holds no checkpoint; expected the folder of a run or of a checkpoint"
        )
    return folders[0]


def place(state: Mapping[str, Any]) -> str:
    """Name of the folder that holds a state."""
    return WITHIN if "within" in state else name(int(state["epoch"]))


def recorded(run_dir: AnyPath, state: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in the state of a run's checkpoint, by dotted names.

    Raises:
        ConfigError: it has none that can be read.
    """
    try:
        return cfg.flat_dict(json.loads(state["config"]))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        folder = run_dir / place(state)
        raise ConfigError(f"storage.path: the configuration in {folder} cannot be read; remove it") from error


def newest(run_dir: AnyPath, config: Config, training: bool = True) -> dict[str, Any] | None:
    """The newest readable state of a run, or None.

    Args:
        run_dir: of the run.
        config: of the run.
        training: whether the run goes on from it, which a message then speaks of.

    Raises:
        ConfigError: it is not of this run: the message names the fields that differ.
    """
    state, later = next(latest(run_dir), None), within(run_dir)
    if later is not None and (state is None or later["epoch"] >= state["epoch"]):
        state = later
    if state is not None:
        check_same(run_dir, state, config, training)
    return state


def check_same(run_dir: AnyPath, state: Mapping[str, Any], config: Config, training: bool = False) -> None:
    """Check that a state is of the run with this configuration, if it says of which it is; arguments as of ``newest``.

    Raises:
        ConfigError: it is not: the message names the fields that differ.
    """
    if "config" not in state:
        return
    differ = [change for change in cfg.changes(recorded(run_dir, state), config) if change[0] not in cfg.MAY_CHANGE]
    if differ:
        folder = run_dir / place(state)
        words = ", ".join(f"{key} {before} in place of {now}" for key, before, now in differ[:5])
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        before, after = ("storage.path: ", "; remove it to go on from another") if training else ("", "")
        raise ConfigError(f"{before}{folder} is of another configuration: {words}{more}{after}")


def hold(folder: AnyPath) -> None:
    """Keep a checkpoint for good."""
    write_whole(folder / HELD, "")


def prune(run_dir: AnyPath, parts: bool = True) -> None:
    """Delete all but the newest checkpoints of a run, and those that are held.

    Args:
        run_dir: folder of the run.
        parts: whether to delete also what a writer that was killed left; nobody may be writing then.
    """
    if parts and isinstance(run_dir, Path):
        for part in (*run_dir.glob("epoch_*.part"), run_dir / f"{WITHIN}.part"):
            part.unlink(missing_ok=True)
    for folder in found(run_dir)[KEEP:]:
        if not (folder / HELD).exists():
            remove_tree(folder)
