"""MLflow's model registry: an encoder as a model that MLflow serves, and back from there."""

import base64
import io
import re
import tempfile
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rotssl.base.address import file_of, is_gone
from rotssl.config.fields import ConfigError
from rotssl.tracking.store import check_uri, client_of, short

PICTURE = "picture"  # column of a served model's input
_DATA = "data"  # folder of a model with what its loader gets
_ADDRESS = re.compile(r"models:/(?P<name>[^/@:]+)(/(?P<version>\d+)|@(?P<alias>[^/@]+))")
_OF_RUN = re.compile(r"runs:/(?P<id>[^/]+)/(?P<path>.+)")


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of a run in MLflow: its split, its metrics, and the parameters that say how they were measured."""

    split: str
    metrics: Mapping[str, float]
    how: Mapping[str, str]


@contextmanager
def _errors(what: str, uri: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # of MLflow, sqlalchemy, requests or the artifact store: in any case it is not to be had
        raise ConfigError(f"{what} of {uri} cannot be used ({short(error)})") from error


def _client(uri: str) -> Any:
    if is_gone(uri):
        raise ConfigError(f"tracking.uri: no file {file_of(uri)}")
    check_uri(uri)
    return client_of(uri)


def download(uri: str, address: str, folder: Path, name: str) -> Path:
    """The folder with a file of this name in a registered model, copied here. No code of the model is run.

    Args:
        uri: URI of the tracking store, which has the registry.
        address: ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``.
        folder: to copy to.
        name: of the file.

    Raises:
        ConfigError: the store can't be used, or has no such model, or the model has no such file.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise ConfigError(f"got {address!r}, expected models:/NAME/VERSION or models:/NAME@ALIAS")
    with _errors(address, uri):
        client, alias = _client(uri), found["alias"]
        version = client.get_model_version_by_alias(found["name"], alias).version if alias else found["version"]
        # MLflow's own functions for such addresses take the store from the process, not from an argument.
        place = client.get_model_version_download_uri(found["name"], version)
        of_run = _OF_RUN.fullmatch(place)
        if of_run is not None:
            client.download_artifacts(of_run["id"], f"{of_run['path']}/{_DATA}", str(folder))
        else:
            from mlflow import artifacts

            artifacts.download_artifacts(artifact_uri=f"{place}/{_DATA}", dst_path=str(folder), tracking_uri=uri)
        files = sorted(folder.rglob(name))
    if len(files) != 1:
        raise ConfigError(f"{address} of {uri} is not an encoder of rotssl: {len(files)} files {name} in it")
    return files[0].parent


def artifacts(uri: str, run_id: str, names: Sequence[str], folder: Path) -> Path:
    """The folder to which some artifacts of a run were copied.

    Raises:
        ConfigError: the store can't be used, or has no such artifacts.
    """
    with _errors(f"run {run_id}", uri):
        client = _client(uri)
        for name in names:
            client.download_artifacts(run_id, name, str(folder))
    return folder


def evaluations(uri: str, run_id: str) -> list[Evaluation]:
    """The evaluations of a run, oldest first.

    Raises:
        ConfigError: the store can't be used, or has no such run.
    """
    with _errors(f"run {run_id}", uri):
        client = _client(uri)
        wanted = f"tags.`mlflow.parentRunId` = '{run_id}' and tags.kind = 'evaluation'"
        found = client.search_runs([client.get_run(run_id).info.experiment_id], wanted, order_by=["start_time ASC"])
        return [
            Evaluation(run.data.tags.get("split", ""), dict(run.data.metrics), dict(run.data.params)) for run in found
        ]


def tags_of(uri: str, run_id: str) -> dict[str, str]:
    """The tags of a run.

    Raises:
        ConfigError: the store can't be used, or has no such run.
    """
    with _errors(f"run {run_id}", uri):
        return dict(_client(uri).get_run(run_id).data.tags)


def register(
    uri: str,
    run_id: str,
    name: str,
    folder: Path,
    loader: str,
    code: Path,
    needs: Sequence[str],
    about: Mapping[str, Any],
) -> str:
    """Log an encoder as a model of its run and register it; returns its version.

    Its input is a column of pictures, each the content of an image file; its output an array of features, (N, D).

    Args:
        uri: URI of the tracking store.
        run_id: of the run that made it.
        name: of the registered model, created if missing.
        folder: what the loader gets.
        loader: module whose ``_load_pyfunc(folder)`` returns an object with ``predict``.
        code: folder of the package that has this module; it is copied into the model.
        needs: requirements of the package, as of pip.
        about: of the encoder: ``dim``, ``image_size`` and ``channels``, and other facts for the version's tags.

    Raises:
        ConfigError: the store can't be used, or refuses the name.
    """
    with _errors(f"model {name}", uri), tempfile.TemporaryDirectory(prefix="rotssl-") as scratch:
        client, made = _client(uri), Path(scratch) / "model"
        _save(made, folder, loader, code, needs, about)
        place = f"model/{uuid.uuid4().hex}"  # what earlier versions refer to stays
        client.log_artifacts(run_id, str(made), place)
        from mlflow.exceptions import MlflowException

        try:
            client.create_registered_model(name)
        except MlflowException:
            if client.get_registered_model(name) is None:
                raise
        tags = {key: str(value) for key, value in about.items()}
        return str(client.create_model_version(name, f"runs:/{run_id}/{place}", run_id, tags=tags).version)


def _save(made: Path, folder: Path, loader: str, code: Path, needs: Sequence[str], about: Mapping[str, Any]) -> None:
    """Save a model of MLflow into the folder ``made``; the other arguments are those of ``register``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's, about its own code
        from mlflow import pyfunc
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, DataType, Schema, TensorSpec

        pyfunc.save_model(
            path=made,
            loader_module=loader,
            data_path=str(folder),
            code_paths=[str(code)],
            pip_requirements=list(needs),
            signature=ModelSignature(
                inputs=Schema([ColSpec(DataType.binary, PICTURE)]),
                outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, about["dim"]), "features")]),
            ),
            input_example=_example(about["image_size"], about["channels"]),
        )


def request(pictures: Sequence[bytes]) -> dict[str, Any]:
    """The body of a request to a served model.

    Args:
        pictures: contents of image files.
    """
    rows = [[base64.b64encode(content).decode()] for content in pictures]
    return {"dataframe_split": {"columns": [PICTURE], "data": rows}}


def _example(side: int, channels: int) -> Any:
    """A made-up picture, a ramp of shades, as a table."""
    import pandas

    shades = np.linspace(0, 255, side * side).astype(np.uint8).reshape(side, side)
    file = io.BytesIO()
    Image.fromarray(shades).convert("RGB" if channels == 3 else "L").save(file, "PNG")
    return pandas.DataFrame({PICTURE: [file.getvalue()]})
