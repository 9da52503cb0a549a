"""Packed sets: image files as they are, in tar files of about equal size, with an index of fixed rows and a manifest.

    manifest.json      classes, splits, shards with checksums, what was left out, and the set's identity
    train.npy          a row for each image: see ROW
    train-00000.tar    the image files, each followed by its label as CLASS.cls, as WebDataset has them

The tar files are a WebDataset. The index says where in a tar file an image lies, so that one read fetches it. This module does
not import torch.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from rotssl.base.place import Place

MANIFEST = "manifest.json"
VERSION = 1

# Number of the shard, place of the image file in it, sides in pixels once it is upright, label (-1: none), EXIF orientation (1 to
# 8, where 1 is upright), and reading.digest() of the file.
ROW = np.dtype(
    [
        *(("shard", "<u4"), ("offset", "<u8"), ("length", "<u4"), ("height", "<u4"), ("width", "<u4")),
        *(("label", "<i4"), ("orientation", "u1"), ("checksum", "<u8")),
    ]
)
Rows = npt.NDArray[np.void]


@dataclass(frozen=True)
class Shard:
    """A tar file of a split."""

    file: str
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """A split: its index and the checksum of it, and its shards in the order of the index.

    ``sides`` are the lowest and the highest height of its images, and the lowest and the highest width.
    """

    images: int
    sides: tuple[int, int, int, int]
    index: str
    sha256: str
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """What a packed set holds.

    Attributes:
        classes: names by label; none if it has no labels.
        splits: ``train``, and ``validation`` and ``test`` if there are any.
        options: with which it was packed.
        left_out: images that could not be read, each with the cause.
        notes: lines about the images, and what is odd about them.
        version: of the format.
    """

    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    options: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    version: int = VERSION

    @property
    def identity(self) -> str:
        """Checksum of all that a run may depend on: the classes, the splits with their shards, and the format."""
        known = {"version": self.version, "classes": self.classes, "splits": self.splits}
        return hashlib.sha256(_json(known)).hexdigest()

    def save(self, to: Place) -> None:
        """Write it whole.

        Raises:
            OSError: it cannot be written.
        """
        to.write(MANIFEST, _json(asdict(self) | {"identity": self.identity}, indent=1))

    @classmethod
    def read(cls, place: Place) -> "Manifest | None":
        """The manifest of a set; None if there is none, which is so until the set is complete.

        Raises:
            OSError: it cannot be read.
            ValueError: it is damaged, or of a format that is not known.
        """
        if place.size(MANIFEST) is None:
            return None
        try:
            found = json.loads(place.read(MANIFEST))
            if found["version"] != VERSION:
                raise ValueError(
                    f"is of version {found['version']} of the format; this is rotssl with version {VERSION}"
                )
            splits = {
                name: Split(
                    **split
                    | {"shards": tuple(Shard(**shard) for shard in split["shards"]), "sides": tuple(split["sides"])}
                )
                for name, split in found["splits"].items()
            }
            left_out = tuple((name, why) for name, why in found["left_out"])
            made = cls(tuple(found["classes"]), splits, found["options"], left_out, tuple(found["notes"]))
            if made.identity != found["identity"]:
                raise ValueError("does not have the identity that it names")
            return made
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"is damaged ({type(error).__name__}: {error})") from error


def _json(value: Any, indent: int | None = None) -> bytes:
    def plain(value: Any) -> Any:
        return asdict(value)

    text = json.dumps(value, default=plain, indent=indent, sort_keys=True)  # names that are not UTF-8 are escaped
    return f"{text}\n".encode()


def index_bytes(rows: Rows) -> bytes:
    """The content of an index file."""
    file = io.BytesIO()
    np.save(file, rows)
    return file.getvalue()
