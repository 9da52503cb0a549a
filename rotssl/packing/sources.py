"""Where images come from: folders, tar files as WebDataset has them, Parquet files with image bytes, and idx files.

A source is listed once, by the process that packs. It names images and says where each lies; the processes that read them need
nothing else.
"""

import functools
import gzip
import io
import json
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from rotssl.base.errors import in_a_line
from rotssl.config.fields import ConfigError
from rotssl.data import folders
from rotssl.data.folders import EXTENSIONS, SPLITS
from rotssl.data.images import DataError
from rotssl.data.reading import fetch

MOST_CLASSES = 10**6
LARGEST_GROUP = 2 << 30  # bytes of a row group of Parquet, which is held in memory

Where = tuple[str, Any, Any, Any]  # the kind, a file, and two values that say where in it


class Item(NamedTuple):
    """An image: its name in the packed set, its label (-1: none), and where it lies."""

    name: str
    label: int
    where: Where


@dataclass(frozen=True)
class Source:
    """The images of each split, in an order that depends on nothing but the source.

    Attributes:
        kind: ``folders``, ``tars``, ``parquet`` or ``idx``.
        splits: ``train``, and ``validation`` and ``test`` if there are any.
        classes: names by label; none without labels.
        scattered: whether any image can be read on its own. Otherwise the files are read from start to end.
        skipped: files that are no images, by suffix or reason.
        notes: lines about what may not be meant so.
    """

    kind: str
    splits: Mapping[str, Sequence[Item]]
    classes: tuple[str, ...]
    scattered: bool = True
    skipped: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def content(where: Where) -> bytes:
    """The image file at a place; of idx files, a PNG of the pixels.

    Raises:
        OSError: it cannot be read.
        DataError: there is none.
    """
    kind, file, first, second = where
    if kind == "file":
        return fetch(file)
    if kind == "tar":
        with open(file, "rb") as archive:
            archive.seek(first)
            return bytes(archive.read(second))
    if kind == "parquet":
        column, row = second
        return _row_group(file, first, column)[int(row)]
    return _png(_idx(file)[first])


def look(root: str, columns: tuple[str, str] = ("", "")) -> Source:
    """The source at a path: what kind it is follows from the names of its files.

    Args:
        root: a folder, or one file.
        columns: of Parquet files, those of image and label; empty: found by their names and types.

    Raises:
        ConfigError: there is nothing there that is known.
    """
    top = Path(root).expanduser()
    if not top.exists():
        raise ConfigError(f"{root}: no such file or folder")
    files = [top] if top.is_file() else sorted(path for path in top.iterdir() if path.is_file())
    kinds: dict[str, Callable[[list[Path]], Source]] = {
        ".tar": _tars,
        ".parquet": functools.partial(_parquet, columns=columns),
    }
    for suffix, read in kinds.items():
        if found := [file for file in files if file.suffix == suffix]:
            return read(found)
    if images := [file for file in files if IDX.fullmatch(file.name)]:
        return _idx_files(images)
    if top.is_file():
        raise ConfigError(f"{root}: expected a folder of images, *.tar, *.parquet or *-images-idx3-ubyte")
    return _folders(str(top))


def _folders(root: str) -> Source:
    scan = folders.scan(root)
    splits = dict(scan.splits)
    test = folders.scan_test(root, scan.classes)
    if test is not None:
        splits["test"] = test

    def items(part: folders.Folder) -> list[Item]:
        labels = [-1] * len(part) if part.labels is None else part.labels.tolist()
        tops = [str(Path(file).relative_to(scan.top)) for file in part.files]
        return [Item(*row) for row in zip(tops, labels, [("file", f, 0, 0) for f in part.files], strict=True)]

    made = {name: items(part) for name, part in splits.items()}
    return Source("folders", made, scan.classes, True, dict(scan.skipped), scan.warnings)


def _split_of(name: str) -> str:
    """The split that a file belongs to, by a word in its name; train without one."""
    words = re.split(r"[^a-z]+", name.casefold())
    return next((SPLITS[word] for word in words if word in SPLITS), "train")


def _tars(files: Sequence[Path]) -> Source:
    splits: dict[str, list[Item]] = {}
    skipped = Counter[str]()
    labels, unlabelled = set[int](), 0
    for file in files:
        images: dict[str, tuple[str, Where]] = {}
        said: dict[str, int] = {}  # by .json, where there is no .cls
        known: dict[str, int] = {}
        try:
            with tarfile.open(file, "r:") as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    base, _, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    key, suffix = f"{base}/{stem}", f".{suffix.casefold()}"
                    if suffix in EXTENSIONS and key in images:
                        skipped["second images of a sample"] += 1
                    elif suffix in EXTENSIONS:
                        images[key] = member.name, ("tar", str(file), member.offset_data, member.size)
                    elif suffix in (".cls", ".json"):
                        text = archive.extractfile(member)
                        assert text is not None
                        found = known if suffix == ".cls" else said
                        found[key] = _label(suffix, text.read(), f"{file}, {member.name}")
                    else:
                        skipped[suffix] += 1
        except (tarfile.TarError, OSError) as error:
            raise ConfigError(f"{file}: is no tar file, or a compressed one ({in_a_line(error)})") from error
        part = splits.setdefault(_split_of(file.name), [])
        for key, (name, where) in images.items():
            label = known.get(key, said.get(key, -1))
            unlabelled += label < 0
            labels.add(label)
            part.append(Item(f"{file.stem}/{name}", label, where))
    if not any(splits.values()):
        raise ConfigError(f"{files[0].parent}: no images ({', '.join(sorted(EXTENSIONS))}) in the tar files")
    classes = () if unlabelled else tuple(map(str, range(max(labels) + 1)))
    if unlabelled and len(labels) > 1:
        raise ConfigError(
            f"{files[0].parent}: {unlabelled} of the images in the tar files have no label, .cls or .json"
        )
    return Source("tars", splits, classes, True, dict(skipped))


def _label(suffix: str, text: bytes, place: str) -> int:
    try:
        found = json.loads(text)
        value = found if suffix == ".cls" else found.get("label", found.get("cls", -1))
        if type(value) is int and -1 <= value < MOST_CLASSES:
            return value
    except (ValueError, AttributeError):
        pass
    raise ConfigError(f"{place}: expected a label, a whole number from 0 to {MOST_CLASSES - 1}, got {text[:40]!r}")


def _parquet(files: Sequence[Path], columns: tuple[str, str]) -> Source:
    splits: dict[str, list[Item]] = {}
    classes: tuple[str, ...] = ()
    for file in files:
        try:
            found, names = _parquet_file(file, columns)
        except ConfigError:
            raise
        except Exception as error:  # of any kind: pyarrow raises its own
            raise ConfigError(f"{file}: cannot be read as Parquet ({in_a_line(error)})") from error
        splits.setdefault(_split_of(file.name), []).extend(found)
        classes = classes or names
    labels = [item.label for items in splits.values() for item in items]
    highest = max(labels)
    if highest < 0:
        return Source("parquet", splits, (), scattered=False)
    for name, items in splits.items():
        if unlabelled := sum(item.label < 0 for item in items):
            raise ConfigError(
                f"{files[0].parent}: {unlabelled} of the images of {name} have no label; leave out the files of a split without"
            )
    classes = classes if len(classes) > highest else tuple(map(str, range(highest + 1)))
    return Source("parquet", splits, classes, scattered=False)


def _parquet_file(file: Path, columns: tuple[str, str]) -> tuple[list[Item], tuple[str, ...]]:
    """The images of a file, and the names of the classes if it has them."""
    from pyarrow import parquet

    table = parquet.ParquetFile(file)
    schema, found = table.schema_arrow, list[Item]()
    image = columns[0] or _column(schema, ("image", "img", "jpg", "png", "webp", "jpeg"), f"{file}: images")
    label = columns[1] or _column(schema, ("label", "labels", "cls", "fine_label"), "")
    for name in (image, *([label] if label else [])):
        if name not in schema.names:
            raise ConfigError(f"{file}: no column {name}; there are {', '.join(schema.names)}")
    for group in range(table.num_row_groups):
        about = table.metadata.row_group(group)
        if about.total_byte_size > LARGEST_GROUP:
            raise ConfigError(f"{file}: a row group has {about.total_byte_size:,} bytes; write it with smaller ones")
        values = table.read_row_group(group, [label]).column(0).to_pylist() if label else [-1] * about.num_rows
        for row, value in enumerate(values):
            known = -1 if value is None else value
            if type(known) is not int or not -1 <= known < MOST_CLASSES:
                raise ConfigError(f"{file}: label {known!r}, expected a whole number from 0 to {MOST_CLASSES - 1}")
            found.append(Item(f"{file.stem}/{len(found):09}", known, ("parquet", str(file), group, (image, row))))
    return found, _class_names(schema, label)


def _column(schema: Any, names: Sequence[str], what: str) -> str:
    found = next((name for name in names if name in schema.names), "")
    if not found and what:
        raise ConfigError(f"{what}: no column {' or '.join(names)}; there are {', '.join(schema.names)}")
    return found


def _class_names(schema: Any, label: str) -> tuple[str, ...]:
    """The names of the classes that the datasets library leaves in a file's metadata."""
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = about.get("info", {}).get("features", {}).get(label, {}).get("names", ())
    return tuple(names)


@functools.lru_cache(maxsize=1)
def _row_group(file: str, group: int, column: str) -> list[bytes]:
    from pyarrow import parquet

    found = []
    for value in parquet.ParquetFile(file).read_row_group(group, [column]).column(0).to_pylist():
        cell = value.get("bytes") if isinstance(value, dict) else value
        found.append(cell if isinstance(cell, bytes) else b"")
    return found


IDX = re.compile(r"(?P<set>.+)-images-idx3-ubyte(\.gz)?")


def _idx_files(images: Sequence[Path]) -> Source:
    splits: dict[str, list[Item]] = {}
    highest = -1
    for file in images:
        match = IDX.fullmatch(file.name)
        assert match is not None
        beside = file.with_name(file.name.replace("images-idx3", "labels-idx1"))
        labels = _idx(str(beside)).tolist() if beside.exists() else [-1] * len(_idx(str(file)))
        if len(labels) != len(_idx(str(file))) or _idx(str(file)).ndim != 3:
            raise ConfigError(f"{beside}: {len(labels)} labels for images of shape {_idx(str(file)).shape}")
        name = "test" if match["set"].startswith(("t10k", "test")) else _split_of(match["set"])
        part = splits.setdefault(name, [])
        part += [Item(f"{match['set']}/{i:06}.png", labels[i], ("idx", str(file), i, 0)) for i in range(len(labels))]
        highest = max([highest, *labels])
    if highest >= 0 and any(item.label < 0 for items in splits.values() for item in items):
        raise ConfigError(f"{images[0].parent}: some of the images have labels, and some none")
    return Source("idx", splits, tuple(map(str, range(highest + 1))))


@functools.lru_cache(maxsize=4)
def _idx(file: str) -> npt.NDArray[np.uint8]:
    """The array of an idx file of unsigned bytes.

    Raises:
        ConfigError: it is none.
    """
    try:
        raw = Path(file).read_bytes()
        raw = gzip.decompress(raw) if file.endswith(".gz") else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{file}: cannot be read ({in_a_line(error)})") from error
    if raw[:3] != b"\0\0\x08" or len(raw) < 8:
        raise ConfigError(f"{file}: is no idx file of unsigned bytes")
    axes = raw[3]
    shape = np.frombuffer(raw, ">u4", axes, 4).tolist()
    found = np.frombuffer(raw, np.uint8, offset=4 + 4 * axes)
    if len(found) != np.prod(shape):
        raise ConfigError(f"{file}: has {len(found)} bytes for {shape}")
    return found.reshape(shape)


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def checked(where: Where) -> bytes:
    """As ``content``, with one kind of error.

    Raises:
        DataError: it cannot be read.
    """
    try:
        found = content(where)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})") from error
    if not found:
        raise DataError("cannot be decoded as an image (empty file)")
    return found
