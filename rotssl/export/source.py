"""Where an encoder comes from: a run's folder, a checkpoint, an exported folder, a run in MLflow, or MLflow's model registry."""

import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rotssl.base.paths import AnyPath, at
from rotssl.config.fields import ConfigError, require
from rotssl.export.encoder import Encoder
from rotssl.models.encoders import FACTS, WEIGHTS, read_facts, read_weights, restored
from rotssl.models.networks import network_of, network_of_checkpoint
from rotssl.runs import checkpoint
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
    if (folder / CONFIG).exists() or (folder / checkpoint.FILE).exists():
        find = network_of if (folder / CONFIG).exists() else network_of_checkpoint
        found = find(folder, network)
        return Encoder(found.encoder, found.dim, found.about)
    for facts_file, weights_file in ((FACTS, WEIGHTS), (CARD_FACTS, CARD_WEIGHTS)):
        if (folder / facts_file).exists():
            about = read_facts(folder / facts_file)
            has = about.get("network", "student")
            require(network in ("auto", has), "network", network, f"{has}, which is what {folder} holds")
            where = folder / weights_file
            return Encoder(*restored(about, read_weights(where), where), about)
    what = "is not there" if not folder.exists() else "holds no encoder"
    raise ConfigError(
        f"{folder} {what}: expected the folder of a run or of an export, the id of a run in MLflow, or models:/NAME/VERSION"
    )
