"""The encoder of a run: the one that it exported at its end, or one from a checkpoint. All programs find it here."""

import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rotssl.base.errors import in_a_line
from rotssl.base.paths import AnyPath
from rotssl.config import Config, build
from rotssl.config.fields import ConfigError, require
from rotssl.config.methods import METHODS
from rotssl.models.encoders import FACTS, WEIGHTS, check_fit, facts, read_facts, read_weights, restored
from rotssl.runs import checkpoint
from rotssl.runs.state import recorded

log = logging.getLogger(__name__)
_PREFIX = {"student": "encoder.", "teacher": "teacher.0."}  # of the names in a checkpoint's model


@dataclass(frozen=True)
class Network:
    """An encoder of a run.

    Attributes:
        encoder: in evaluation mode, (B, 3, S, S) -> (B, D).
        dim: D.
        about: what ``facts`` says of it; ``network``, which of the two it is; ``epoch``, if it is from a checkpoint.
    """

    encoder: nn.Module
    dim: int
    about: Mapping[str, Any]


def network_of(folder: AnyPath, network: str = "auto", epoch: int | None = None) -> Network:
    """The encoder of the run in a folder.

    It is in the files that the run has written at its end, if it has exported this one; else in the newest checkpoint.

    Args:
        folder: of the run.
        network: ``student``, ``teacher``, or ``auto``: the one that the run evaluated.
        epoch: how many epochs must be behind it; None: any number, with a warning if the run has not ended.

    Raises:
        ConfigError: there is no such network, a file is damaged, or it is of another encoder, run or epoch.
    """
    config = recorded(folder)
    wanted = _wanted(network, config)
    missing = [name for name in (WEIGHTS, FACTS) if not (folder / name).exists()]
    if wanted == config.evaluation.network and not missing:
        about, known = read_facts(folder / FACTS) | {"network": wanted}, facts(config)
        for key in ("encoder", "stem", "norm"):
            if about[key] != known[key]:
                words = f"{key} {about[key]}, the run has {known[key]}"
                raise ConfigError(f"{folder / FACTS} is of another encoder: {words}")
        return Network(*restored(about, read_weights(folder / WEIGHTS), folder / WEIGHTS), about)
    has = f"it has no {missing[0]} either" if missing else f"the {config.evaluation.network} is in {WEIGHTS}"
    state = newest(folder, config, f", where the {wanted} would be; {has}")
    if epoch is not None and state["epoch"] != epoch:
        raise ConfigError(
            f"the newest checkpoint in {folder}, where the {wanted} would be, is of epoch {state['epoch']}, not {epoch}"
        )
    if state["epoch"] < config.train.epochs:
        log.warning("%s has %d of %d epochs", folder, state["epoch"], config.train.epochs)
    told = read_facts(folder / FACTS) if FACTS not in missing else {}
    about = facts(config) | {key: told[key] for key in ("stored",) if key in told} | {"network": wanted}
    return _of_state(about, state, folder / checkpoint.place(state) / checkpoint.FILE)


def network_of_checkpoint(folder: AnyPath, network: str = "auto") -> Network:
    """The encoder in the folder of a checkpoint, which has the run's configuration; arguments and errors as ``network_of``."""
    try:
        state = checkpoint.load(folder)
        config = build(checkpoint.recorded(folder.parent, state))
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{folder / checkpoint.FILE} cannot be read ({in_a_line(error)})") from error
    about = facts(config) | {"network": _wanted(network, config)}
    return _of_state(about, state, folder / checkpoint.FILE)


def newest(folder: AnyPath, config: Config, more: str = "") -> dict[str, Any]:
    """The newest state of a run that can be read; ``check_encoder`` says whether its encoder is the configuration's.

    Args:
        folder: of the run.
        config: its configuration.
        more: added to the message if there is none.

    Raises:
        ConfigError: there is none, or it is of another configuration.
    """
    state = checkpoint.newest(folder, config, training=False)
    if state is None:
        raise ConfigError(f"{folder} has no checkpoint that can be read{more}")
    return state


def check_encoder(expected: nn.Module, config: Config, folder: AnyPath, state: Mapping[str, Any]) -> None:
    """Check that the student in the state of a run's checkpoint has the weights of an encoder.

    Raises:
        ConfigError: it is of another encoder.
    """
    where = folder / checkpoint.place(state) / checkpoint.FILE
    check_fit(facts(config), expected.state_dict(), _weights(state, "student"), where)


def _wanted(network: str, config: Config) -> str:
    """The network that is meant; refused if the method has none."""
    wanted, method = config.evaluation.network if network == "auto" else network, config.method.name
    fits = wanted == "student" or METHODS[method].teacher
    require(fits, "network", wanted, f"student: {method} has no teacher")
    return wanted


def _weights(state: Mapping[str, Any], network: str) -> dict[str, Tensor]:
    start = _PREFIX[network]
    return {key.removeprefix(start): value for key, value in state["model"].items() if key.startswith(start)}


def _of_state(about: Mapping[str, Any], state: Mapping[str, Any], file: AnyPath) -> Network:
    told = {**about, "epoch": state["epoch"]}
    return Network(*restored(about, _weights(state, about["network"]), file), told)
