"""Checkpoints: one folder per epoch, with everything that the next step needs in one file."""

import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
FILE = "checkpoint.pt"
KEEP = 2  # the newest, and one to fall back to if it is damaged
_NAME = re.compile(r"epoch_(\d{5})")


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


def save(state: dict[str, Any], folder: Path) -> None:
    """Write the state into a folder, atomically; the partial file that a crash leaves next to the folder is overwritten.

    Raises:
        OSError: the file can't be written, for example because the disk is full.
    """
    import torch  # imported in functions only, so that the driver can list checkpoints without it

    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f"{folder.name}.part")
    try:
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # like the journal, which records the epoch as done
    except (OSError, RuntimeError) as error:
        why = error if isinstance(error, OSError) else error.__context__  # torch reports a full disk as a RuntimeError
        if not isinstance(why, OSError):
            raise
        raise OSError(why.errno, why.strerror, str(part)) from error
    folder.mkdir(exist_ok=True)
    os.replace(part, folder / FILE)


def load(folder: Path) -> dict[str, Any]:
    """The state in a checkpoint folder, on the CPU; only tensors and plain values are loaded, no pickled code is run."""
    import torch

    return torch.load(folder / FILE, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


def found(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first."""
    if not run_dir.is_dir():
        return []
    return sorted((p for p in run_dir.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()), reverse=True)


def latest(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The readable states of a run's checkpoints, newest first; a damaged one is skipped with a warning."""
    for folder in found(run_dir):
        try:
            state = load(folder)
            if not {"model", "optimizer", "epoch"} <= state.keys():
                raise ValueError("not a checkpoint")
        except (OSError, RuntimeError, EOFError, ValueError, AttributeError, pickle.UnpicklingError) as error:
            log.warning("checkpoint %s cannot be read (%s); trying the previous one", folder, type(error).__name__)
            continue
        yield state


def prune(run_dir: Path) -> None:
    """Delete all but the newest checkpoints of a run, and what a writer that was killed left; nobody may be writing."""
    for part in run_dir.glob("epoch_*.part"):
        part.unlink(missing_ok=True)
    for folder in found(run_dir)[KEEP:]:
        shutil.rmtree(folder)
