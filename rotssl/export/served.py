"""What `mlflow models serve` runs: pictures in, features out. The model carries this package, and needs only ``NEEDS``."""

import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import rotssl
from rotssl.data.reading import decode
from rotssl.export import formats
from rotssl.export.encoder import Encoder
from rotssl.export.records import Records
from rotssl.export.source import in_folder, load_encoder
from rotssl.models.encoders import save_encoder
from rotssl.tracking import registry

NEEDS = ("filelock", "numpy", "pillow", "pyyaml", "safetensors", "timm", "torch", "torchvision")


class Served:
    """A model as MLflow serves it.

    Args:
        encoder: computes the features.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def predict(self, table: Any, params: Any = None) -> npt.NDArray[np.float32]:
        """Features (N, D) of a table (a pandas.DataFrame) whose column ``picture`` has N contents of image files.

        Raises:
            DataError: one can't be decoded.
        """
        pictures = [decode(content, f"picture {i}")[0] for i, content in enumerate(table[registry.PICTURE])]
        return self.encoder.features(pictures).cpu().numpy()


def _load_pyfunc(folder: str) -> Served:
    """The model in a folder; MLflow calls this."""
    return Served(in_folder(Path(folder)).to("cuda" if torch.cuda.is_available() else "cpu"))


def register(encoder: Encoder, records: Records, name: str) -> tuple[str, float]:
    """Put an encoder into MLflow's model registry, as a model of its run, and read it again.

    Args:
        encoder: on the CPU.
        records: of its run, which is in MLflow.
        name: of the registered model.

    Returns:
        The model's address, ``models:/NAME/VERSION``, and the largest difference of the features.

    Raises:
        ConfigError: the store can't be used, or refuses the name.
    """
    uri, about = records.state.uri, encoder.about
    facts: dict[str, Any] = {"dim": encoder.dim, "image_size": encoder.image_size, "channels": len(encoder.mean)}
    facts |= {key: about[key] for key in ("encoder", "network")}
    facts |= {"git_commit": records.tags["git_commit"]} if "git_commit" in records.tags else {}
    # Without the suffix of a build such as 2.11.0+cpu, which is no version of a package registry.
    needs = [f"{package}=={metadata.version(package).partition('+')[0]}" for package in NEEDS]
    with tempfile.TemporaryDirectory(prefix="rotssl-") as scratch:
        data = Path(scratch) / "encoder"
        data.mkdir()
        save_encoder(encoder.network, about, data)
        code = Path(rotssl.__file__).parent
        version = registry.register(uri, str(records.state.run_id), name, data, __name__, code, needs, facts)
    address = f"models:/{name}/{version}"
    return address, formats.gap(encoder, load_encoder(address, uri=uri))
