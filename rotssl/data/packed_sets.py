"""Packed sets as data sets: from the manifest to splits whose images are decoded when a step needs them.

Sets of small images of one size are decoded into memory at the start instead, as folders of such images are.
"""

import hashlib
import io
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rotssl.base.errors import in_a_line
from rotssl.base.place import Folder, Place, place
from rotssl.config.fields import ConfigError
from rotssl.config.resolved import ResolvedData
from rotssl.config.sections import DataConfig
from rotssl.data import disk_cache
from rotssl.data.decoding import NATIVE_LIMIT, in_threads
from rotssl.data.images import DataError, ImageSet, Labels, Pixels, Sums, choose, hold_out
from rotssl.data.packed import MANIFEST, ROW, Manifest, Rows
from rotssl.data.record import Record
from rotssl.data.shards import Shards

if TYPE_CHECKING:  # it imports torch
    from rotssl.data.packed_images import PackedImages

Index = npt.NDArray[np.int64]


def opened(config: DataConfig) -> tuple[Place, Manifest]:
    """The place of a packed set, and its manifest.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    address = os.path.expanduser(str(config.root))
    try:
        there = place(address)
    except ValueError as error:
        raise ConfigError(f"data.root: {error}") from error
    try:
        manifest = Manifest.read(there)
    except ValueError as error:
        raise ConfigError(f"data.root: {MANIFEST} in {address} {error}") from error
    except Exception as error:  # of any kind: clients of object stores raise their own
        raise ConfigError(f"data.root: cannot read {address}: {in_a_line(error)}") from error
    if manifest is None:
        raise ConfigError(f"data.root: no packed set in {address}; jobs/pack.py makes one")
    return there, manifest


def native(manifest: Manifest) -> tuple[int, int] | None:
    """Height and width of all images, if they have one size that is small enough for a store in memory."""
    sides = {split.sides for split in manifest.splits.values()}
    if len(sides) > 1:
        return None
    ((low, high, narrow, wide),) = sides
    return (high, wide) if low == high <= NATIVE_LIMIT and narrow == wide <= NATIVE_LIMIT else None


def parts(
    config: DataConfig, manifest: Manifest, holdout: float, labels: Callable[[str], Labels]
) -> dict[str, tuple[str, Index | None]]:
    """The splits that a run reads: for each the split of the set and which of its images; None: all.

    Args:
        config: the data section.
        manifest: of the set.
        holdout: share of each class of train held out if the set has no validation; 0: test is read instead.
        labels: of a split of the set.

    Raises:
        ConfigError: nothing is held out, and there is neither validation nor test.
    """
    found: dict[str, tuple[str, Index | None]] = {"train": ("train", None)}
    if "validation" in manifest.splits and manifest.classes:
        found["validation"] = "validation", None
    elif manifest.classes and holdout:
        held = hold_out(labels("train"), holdout)
        if not len(held):
            raise ConfigError(
                f"evaluation.holdout: got {holdout}, which holds out no image of {manifest.splits['train'].images}"
            )
        rest = np.setdiff1d(np.arange(manifest.splits["train"].images), held)
        found = {"train": ("train", rest), "validation": ("train", held)}
    elif manifest.classes:
        if "test" not in manifest.splits:
            raise ConfigError(f"evaluation.holdout: got 0, expected more, as {config.root} has no labelled test split")
        found["test"] = "test", None
    index = found["train"][1]
    own = np.arange(manifest.splits["train"].images) if index is None else index
    if config.limit is not None and config.limit < len(own):
        known = labels("train")[own] if manifest.classes else None
        found["train"] = "train", own[choose(known, len(own), config.limit)]
    return found


def counts(config: DataConfig, holdout: float) -> tuple[int, int, bool, tuple[int, int] | None]:
    """Images of train, and of the other split that a run reads; whether there are labels; and ``native``.

    Raises:
        ConfigError: as ``parts``.
    """
    there, manifest = opened(config)
    chosen = parts(config, manifest, holdout, lambda name: rows(there, manifest, name)["label"].astype(np.int64))
    each = {
        name: manifest.splits[split].images if index is None else len(index) for name, (split, index) in chosen.items()
    }
    train = each.pop("train")
    return train, sum(each.values()), bool(manifest.classes), native(manifest)


def rows(there: Place, manifest: Manifest, name: str) -> Rows:
    """The index of a split, mapped from a file where there is one.

    Raises:
        DataError: it cannot be read, or does not fit the manifest.
    """
    split = manifest.splits[name]
    try:
        if isinstance(there, Folder):
            found = np.load(there.path / split.index, mmap_mode="r", allow_pickle=False)
        else:
            content = there.read(split.index)
            if hashlib.sha256(content).hexdigest() != split.sha256:
                raise DataError(f"{split.index} does not have the checksum that the manifest says")
            found = np.load(io.BytesIO(content), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{split.index} of the packed set cannot be read: {in_a_line(error)}") from error
    if found.dtype != ROW or len(found) != split.images:
        raise DataError(f"{split.index} of the packed set does not fit its manifest")
    return found  # type: ignore[no-any-return]


def load(
    config: ResolvedData, holdout: float, say: Callable[[str], None] = lambda line: None
) -> tuple[dict[str, ImageSet], Manifest, Record]:
    """The splits that a run reads, by name, the manifest, and what a resumed run compares.

    Args:
        config: the data section, with ``image_size`` resolved.
        holdout: see ``parts``.
        say: called with a line about anything that takes time.

    Raises:
        ConfigError: there is no set, or it lacks a split.
        DataError: images cannot be read.
    """
    there, manifest = opened(config)
    known = {name: rows(there, manifest, name) for name in manifest.splits}
    chosen = parts(config, manifest, holdout, lambda name: known[name]["label"].astype(np.int64))
    found, checksums = dict[str, ImageSet](), list[Sums]()
    shards, room = dict[str, Shards](), None if config.cache_gb is None else int(config.cache_gb * 1e9)
    for name, (split, index) in chosen.items():
        if split not in shards:  # train comes first
            shards[split] = _shards(config, there, manifest, split, room, say)
            room = shards[split].room
        own = known[split] if index is None else known[split][index]
        found[name] = _images(config, manifest, shards[split], own)
        checksums.append(own["checksum"])
    sums = np.concatenate(checksums)  # images have no names of their own here: the content stands for them
    return found, manifest, Record(manifest.classes, sums, sums)


def load_test(config: ResolvedData) -> ImageSet:
    """The labelled test split.

    Raises:
        ConfigError: there is none.
        DataError: images cannot be read.
    """
    there, manifest = opened(config)
    if "test" not in manifest.splits or not manifest.classes:
        raise ConfigError(f"data.name: {config.name} in {config.root} has no labelled test split")
    room = None if config.cache_gb is None else int(config.cache_gb * 1e9)
    shards = _shards(config, there, manifest, "test", room)
    return _images(config, manifest, shards, rows(there, manifest, "test"))


def _shards(
    config: ResolvedData,
    there: Place,
    manifest: Manifest,
    split: str,
    room: int | None,
    say: Callable[[str], None] = lambda line: None,
) -> Shards:
    cache = disk_cache.folder(config.cache) / manifest.identity[:16]
    return Shards(there, manifest.splits[split], cache, room, say)


def _images(config: ResolvedData, manifest: Manifest, shards: Shards, own: Rows) -> ImageSet:
    from rotssl.data.packed_images import PackedImages

    images = PackedImages(shards, own, config.image_size, config.interpolation)
    labels = own["label"].astype(np.int64) if manifest.classes else None
    small = native(manifest)
    return ImageSet(decoded(images, small) if small else images, labels)


def decoded(images: "PackedImages", size: tuple[int, int]) -> Pixels:
    """All pictures of one size, (N, 3, H, W)."""
    made = np.empty((len(images), 3, *size), np.uint8)

    def work(i: int) -> None:
        made[i] = images.picture(i).permute(2, 0, 1)

    for _ in in_threads(work, range(len(images))):
        pass
    return made
