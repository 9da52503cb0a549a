"""Where an encoder comes from: a run's folder, a checkpoint, an exported folder, a run in MLflow, or MLflow's model registry."""

import logging
import pickle
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rotssl.base.paths import AnyPath, at
from rotssl.config import build
from rotssl.config.fields import ConfigError, require
from rotssl.config.methods import METHODS
from rotssl.export.encoder import Encoder
from rotssl.models.encoders import FACTS, WEIGHTS, facts, read_facts, read_weights, restored
from rotssl.models.networks import PREFIX
from rotssl.runs import checkpoint
from rotssl.runs.state import recorded
from rotssl.tracking import reader, registry
from rotssl.tracking.store import asked_uri

log = logging.getLogger(__name__)
CONFIG = "config.yaml"
CARD_FACTS, CARD_WEIGHTS = "config.json", "model.safetensors"  # as Hugging Face names them
NETWORKS = ("auto", "student", "teacher")
_RUN_ID = re.compile(r"[0-9a-f]{32}")


def load_encoder(source: str | Path, network: str = "auto", uri: str | None = None) -> Encoder:
    """A pretrained encoder, in evaluation mode, with the facts and the transform that one needs to use it.

        encoder = rotssl.load_encoder("results/rotssl/RUN")
        features = encoder(encoder.transform(PIL.Image.open(FILE))[None])

    No code is loaded from anywhere: weights are read as safetensors or by ``torch.load(weights_only=True)``.

    Args:
        source: the folder of a run (local, or in an object store), of one of its checkpoints, or one that jobs/export.py has
            made; the id of a run in MLflow, also as ``runs:/ID``; ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``.
        network: ``student``, ``teacher``, or ``auto``: the one that the run evaluated. A run's folder has the other one in its
            newest checkpoint.
        uri: URI of the tracking store, for what is in MLflow; default: MLFLOW_TRACKING_URI, else mlflow.db in ./results.

    Returns:
        The module, (B, 3, S, S) -> (B, D), as ``Encoder``.

    Raises:
        ConfigError: there is no such encoder, it is damaged, or its weights do not fit.
    """
    with _found(str(source), uri) as folder:
        return in_folder(folder, network)


@contextmanager
def _found(source: str, uri: str | None) -> Iterator[AnyPath]:
    """The folder that a source names; what is in MLflow alone is in a temporary one within the body."""
    with tempfile.TemporaryDirectory(prefix="rotssl-") as scratch:
        if source.startswith("models:/"):
            yield registry.download(asked_uri(uri), source, Path(scratch), FACTS)
            return
        run_id = source.removeprefix("runs:/").partition("/")[0]
        if not source.startswith("runs:/") and (Path(source).exists() or not _RUN_ID.fullmatch(source)):
            try:
                yield at(source)
            except ValueError as error:
                raise ConfigError(str(error)) from error
            return
        store = asked_uri(uri)
        try:
            yield at(reader.run_folder_of(store, run_id))
        except reader.FolderGone as error:  # on another machine: MLflow has a copy of the network that was evaluated
            log.warning("the folder of run %s is not there (%s): taking its encoder from MLflow", run_id, error.folder)
            yield registry.artifacts(store, run_id, (FACTS, WEIGHTS), Path(scratch))


def in_folder(folder: AnyPath, network: str = "auto") -> Encoder:
    """As ``load_encoder``, from a folder.

    Raises:
        ConfigError: as ``load_encoder``.
    """
    require(network in NETWORKS, "network", repr(network), f"one of {', '.join(NETWORKS)}")
    if (folder / CONFIG).exists():
        return _of_run(folder, network)
    if (folder / checkpoint.FILE).exists():
        return _of_checkpoint(folder, network)
    for facts_file, weights_file in ((FACTS, WEIGHTS), (CARD_FACTS, CARD_WEIGHTS)):
        if (folder / facts_file).exists():
            about = read_facts(folder / facts_file)
            has = about.get("network", "student")
            require(network in ("auto", has), "network", network, f"{has}, which is what {folder} holds")
            return _encoder(about, read_weights(folder / weights_file), folder / weights_file)
    what = "is not there" if not folder.exists() else "holds no encoder"
    raise ConfigError(
        f"{folder} {what}: expected the folder of a run or of an export, the id of a run in MLflow, or models:/NAME/VERSION"
    )


def _encoder(about: Mapping[str, Any], weights: Mapping[str, Any], where: AnyPath) -> Encoder:
    return Encoder(*restored(about, weights, where), about)


def _of_run(folder: AnyPath, network: str) -> Encoder:
    """The encoder of a run: the file that it has written at its end, or that of its newest checkpoint."""
    config = recorded(folder)
    evaluated = config.evaluation.network
    wanted = evaluated if network == "auto" else network
    _check_teacher(wanted, config.method.name)
    if wanted == evaluated and (folder / WEIGHTS).exists():
        about = read_facts(folder / FACTS) | {"network": wanted}
        known = facts(config)
        for key in ("encoder", "stem"):
            if about[key] != known[key]:
                raise ConfigError(
                    f"{folder / FACTS} is of another encoder: {key} {about[key]}, the run has {known[key]}"
                )
        return _encoder(about, read_weights(folder / WEIGHTS), folder / WEIGHTS)
    state = checkpoint.newest(folder, config)
    if state is None:
        has = f"the {evaluated} is in {WEIGHTS}" if (folder / WEIGHTS).exists() else f"it has no {WEIGHTS} either"
        raise ConfigError(f"{folder} has no checkpoint that can be read, where the {wanted} would be; {has}")
    if state["epoch"] < config.train.epochs:
        log.warning("%s has %d of %d epochs", folder, state["epoch"], config.train.epochs)
    told = read_facts(folder / FACTS) if (folder / FACTS).exists() else {}
    about = facts(config) | {key: told[key] for key in ("stored",) if key in told} | {"network": wanted}
    return _of_state(about, state, folder / checkpoint.place(state) / checkpoint.FILE)


def _of_checkpoint(folder: AnyPath, network: str) -> Encoder:
    """The encoder in the folder of a checkpoint, which has the run's configuration."""
    try:
        state = checkpoint.load(folder)
        config = build(checkpoint.recorded(folder.parent, state))
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, pickle.UnpicklingError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise ConfigError(f"{folder / checkpoint.FILE} cannot be read ({why})") from error
    wanted = config.evaluation.network if network == "auto" else network
    _check_teacher(wanted, config.method.name)
    return _of_state(facts(config) | {"network": wanted}, state, folder / checkpoint.FILE)


def _check_teacher(network: str, method: str) -> None:
    fits = network == "student" or METHODS[method].teacher
    require(fits, "network", network, f"student: {method} has no teacher")


def _of_state(about: Mapping[str, Any], state: Mapping[str, Any], file: AnyPath) -> Encoder:
    start = PREFIX[about["network"]]
    weights = {key.removeprefix(start): value for key, value in state["model"].items() if key.startswith(start)}
    return _encoder({**about, "epoch": state["epoch"]}, weights, file)
