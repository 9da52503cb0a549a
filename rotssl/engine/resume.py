"""Resuming: the newest checkpoint that belongs to a run, and its tensors in a model and an optimizer."""

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rotssl.base import distributed
from rotssl.base.paths import AnyPath
from rotssl.config import ConfigError, ResolvedConfig
from rotssl.engine.runtime import RunFailed
from rotssl.runs import checkpoint


def newest(run_dir: AnyPath, config: ResolvedConfig) -> dict[str, Any] | None:
    """The newest readable state of a run, or None.

    Raises:
        RunFailed: it is of another configuration or of another epoch than its folder's.
    """
    try:
        return checkpoint.newest(run_dir, config)
    except ConfigError as error:
        raise RunFailed(str(error)) from error


def begin(model: nn.Module, place: str | None) -> None:
    """Put the weights of another run's checkpoint in place, if one is given.

    Raises:
        RunFailed: it cannot be read, or is of other networks.
    """
    if place is None:
        return
    try:
        folder = checkpoint.source(place)
        model.load_state_dict(checkpoint.load(folder)["model"])
    except ConfigError as error:
        raise RunFailed(str(error)) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise RunFailed(f"train.init_from: the weights in {folder} cannot be taken ({why})") from error


def agree(epochs: int, steps: int, device: torch.device) -> None:
    """See that all workers found the same checkpoint; storage that is not shared by all nodes would split the run.

    Args:
        epochs: whole epochs that this worker's has.
        steps: of the next one.
        device: of the collectives.

    Raises:
        RunFailed: they did not.
    """
    if distributed.world_size() == 1:
        return
    seen = distributed.gather(torch.tensor([[float(epochs), float(steps)]]).to(device))
    if not bool((seen == seen[0]).all()):
        raise RunFailed(
            f"storage.path: the workers see different checkpoints ({seen.tolist()}); all nodes must share this folder"
        )


@contextmanager
def fitting(run_dir: AnyPath, state: Mapping[str, Any]) -> Iterator[None]:
    """Report in one line that a state does not fit the run which restores it in the body.

    Raises:
        RunFailed: it does not fit.
    """
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        folder = run_dir / checkpoint.place(state)
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise RunFailed(
            f"storage.path: {folder} does not fit this run ({why}); remove it to go on from another"
        ) from error


def load_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Put the weights and the optimizer's moments of a state in place."""
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    # A run may resume on another kind of device with another weight layout; fused kernels assume the same for moments.
    for param, kept in optimizer.state.items():
        moments = {key: v for key, v in kept.items() if torch.is_tensor(v) and v.shape == param.shape}
        kept.update({key: torch.empty_like(param, dtype=value.dtype).copy_(value) for key, value in moments.items()})
