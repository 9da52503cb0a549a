"""From a source to a packed set: what goes into which shard, the shards in any order and number at a time, and the manifest.

The plan follows from the source and the options. It is written first, and a packing that is started again must have the same one;
it makes the shards that are not complete. The manifest comes last: without it there is no set.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath

import numpy as np

from rotssl.base import rng
from rotssl.base.errors import Held
from rotssl.base.lock import locked
from rotssl.base.paths import at
from rotssl.base.place import Folder, Place, place
from rotssl.config.fields import ConfigError
from rotssl.data.folders import EXTENSIONS
from rotssl.data.images import SPLIT_SEED, hold_out
from rotssl.data.packed import Manifest, Rows, Split, index_bytes
from rotssl.packing.shards import RECORDS, Options, Record, Task, known, rows
from rotssl.packing.sources import Item, Source

PLAN = f"{RECORDS}/plan.json"
PER_SHARD = 1024  # images

Run = Callable[
    [Sequence[Task], Options, str], Iterable[Record]
]  # makes the shards, and yields their records as they come


@dataclass(frozen=True)
class Plan:
    """What is packed: the shards of each split, the classes, and all that the result depends on but the images' content.

    Attributes:
        tasks: by split.
        classes: names by label.
        options: with which the images are packed.
        settings: what the manifest says of them.
        notes: lines about the source.
    """

    tasks: dict[str, list[Task]]
    classes: tuple[str, ...]
    options: Options
    settings: dict[str, object]
    notes: tuple[str, ...]

    @property
    def checksum(self) -> str:
        """Of all of it but where the images lie, so that a source may be moved."""
        each = (task for tasks in self.tasks.values() for task in tasks)
        told = [[task.name, [(item.name, item.label) for item in task.items]] for task in each]
        known = [told, self.classes, self.settings]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def plan(source: Source, options: Options, holdout: float = 0.0, per_shard: int = PER_SHARD) -> Plan:
    """The plan for a source.

    Images are shuffled with a fixed seed, so that each shard is a sample of the set, unless the source must be read from start to
    end.

    Args:
        source: the images.
        options: how they are packed.
        holdout: share of each class of train that becomes validation, if there is none and there are labels.
        per_shard: images in a shard.

    Raises:
        ConfigError: there is no train, or a split would be empty.
    """
    splits = {name: _named(items) for name, items in source.splits.items()}
    if not splits.get("train"):
        raise ConfigError(f"no images of train; there are {', '.join(splits) or 'none'}")
    if holdout and "validation" not in splits and source.classes:
        train = splits["train"]
        held = set(hold_out(np.array([item.label for item in train], np.int64), holdout).tolist())
        if not held:
            raise ConfigError(f"--holdout: got {holdout}, which holds out no image of {len(train)}")
        splits["validation"] = [item for i, item in enumerate(train) if i in held]
        splits["train"] = [item for i, item in enumerate(train) if i not in held]
    if empty := [name for name, items in splits.items() if not items]:
        raise ConfigError(f"no images of {', '.join(empty)}")
    tasks = {}
    for name, items in splits.items():
        if source.scattered:
            items = [items[i] for i in rng.permutation(rng.key(SPLIT_SEED, "pack", name), len(items))]
        tasks[name] = [
            Task(f"{name}-{number:05}", items[first : first + per_shard])
            for number, first in enumerate(range(0, len(items), per_shard))
        ]
    settings: dict[str, object] = asdict(options) | {"source": source.kind, "holdout": holdout, "images": per_shard}
    skipped = ", ".join(f"{count:,} {kind}" for kind, count in sorted(source.skipped.items()))
    notes = source.notes + ((f"skipped: {skipped}",) if skipped else ())
    return Plan(tasks, source.classes, options, settings, notes)


def _named(items: Sequence[Item]) -> list[Item]:
    """The images with names that WebDataset can use: no dot but before the suffix, none twice, and none that leads upwards."""
    found, seen = list[Item](), set[str]()
    for item in items:
        path = PurePosixPath(item.name)
        suffix = path.suffix if path.suffix.lower() in EXTENSIONS else ""
        stem = path.name.removesuffix(suffix).replace(".", "_") or "_"
        base = PurePosixPath(*(part for part in path.parent.parts if part not in ("..", "/")))
        key, number = str(base / stem), 1
        while key in seen:
            number += 1
            key = str(base / f"{stem}_{number}")
        seen.add(key)
        found.append(item._replace(name=key + suffix))
    return found


def pack(
    planned: Plan,
    address: str,
    run: Run,
    skip: bool = False,
    tell: Callable[[Record, int], None] = lambda r, left: None,
) -> Manifest:
    """Pack to an address; what an earlier packing completed there is kept.

    Args:
        planned: the plan.
        address: of the set, see ``place``.
        run: makes the shards.
        skip: whether images that cannot be read are left out.
        tell: called with the record of each shard, and the number of those that are still to come.

    Raises:
        ConfigError: there is another set, or a part of one; or images cannot be read and are not to be left out.
        OSError: the set cannot be written.
    """
    to = place(address)
    with _alone(to, address):
        return _pack(planned, to, address, run, skip, tell)


@contextmanager
def _alone(to: Place, address: str) -> Iterator[None]:
    """Keep other processes from packing to the same place."""
    # A folder's lock goes with the records; a claim must stay as long as it is renewed.
    path = at(address) / (f"{RECORDS}/lock" if isinstance(to, Folder) else ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with locked(path):
            yield
    except Held as error:
        raise ConfigError(f"{address}: another process is packing to it") from error


def _pack(
    planned: Plan, to: Place, address: str, run: Run, skip: bool, tell: Callable[[Record, int], None]
) -> Manifest:
    done = Manifest.read(to)
    if done is not None:
        to.remove(RECORDS)  # of a packing that was ended just then
        if done.options.get("plan") != planned.checksum:
            raise ConfigError(f"{address}: there is another packed set; give another folder, or remove it")
        return done
    _agree(to, planned, address)
    tasks = [task for own in planned.tasks.values() for task in own]
    records: dict[str, Record] = {}
    for record in _all(to, tasks, planned.options, address, run):
        records[record.shard.file.removesuffix(".tar")] = record
        tell(record, len(tasks) - len(records))
    left_out = [entry for task in tasks for entry in records[task.name].left_out]
    if left_out and not skip:
        for task in tasks:
            if records[task.name].left_out:  # is made again when they are mended
                to.remove(f"{RECORDS}/{task.name}.json")
        shown = "; ".join(f"{name}: {why}" for name, why in left_out[:10])
        more = f"; and {len(left_out) - 10} more" if len(left_out) > 10 else ""
        raise ConfigError(f"{shown}{more}; mend them, or leave them out with --on_bad skip")
    manifest = _finish(to, planned, records, left_out)
    to.remove(RECORDS)
    return manifest


def _agree(to: Place, planned: Plan, address: str) -> None:
    """Write the plan, or check that it is the one of an earlier start."""
    if to.size(PLAN) is None:
        to.write(PLAN, json.dumps({"checksum": planned.checksum, "settings": planned.settings}).encode())
        return
    begun = json.loads(to.read(PLAN))
    if begun["checksum"] != planned.checksum:
        what = "with other options" if begun["settings"] != planned.settings else "of a source that has changed since"
        raise ConfigError(f"{address}: there is a part of a set {what}; remove {RECORDS}/ and the shards to start anew")


def _all(to: Place, tasks: Sequence[Task], options: Options, address: str, run: Run) -> Iterable[Record]:
    missing = []
    for task in tasks:
        record = known(to, task.name)
        if record is None:
            missing.append(task)
        else:
            yield record
    yield from run(missing, options, address)


def _finish(to: Place, planned: Plan, records: dict[str, Record], left_out: Sequence[tuple[str, str]]) -> Manifest:
    """Write the indices and the manifest."""
    splits, indices = dict[str, Split](), dict[str, Rows]()
    counts = Counter[str]()
    for name, tasks in planned.tasks.items():
        parts = []
        for number, task in enumerate(tasks):
            part = rows(to, task.name)
            part["shard"] = number
            parts.append(part)
            counts.update(records[task.name].counts)
        indices[name] = np.concatenate(parts)
        if not len(indices[name]):
            raise ConfigError(f"no image of {name} can be read")
        content = index_bytes(indices[name])
        to.write(f"{name}.npy", content)
        shards = tuple(records[task.name].shard for task in tasks)
        own = indices[name]
        sides = tuple(int(end) for side in ("height", "width") for end in (own[side].min(), own[side].max()))
        checksum = hashlib.sha256(content).hexdigest()
        splits[name] = Split(len(own), sides, f"{name}.npy", checksum, shards)  # type: ignore[arg-type]
    options = planned.settings | {"plan": planned.checksum}
    manifest = Manifest(planned.classes, splits, options, tuple(left_out), (*planned.notes, *_notes(indices, counts)))
    manifest.save(to)
    return manifest


def _notes(indices: dict[str, Rows], counts: Counter[str]) -> list[str]:
    words = {
        "turned": "with an orientation tag",
        "transparent": "transparent",
        "deep": "of more than 8 bits",
        "reduced": "reduced",
    }
    lines = [f"{counts[key]:,} images {text}" for key, text in words.items() if counts[key]]
    train = indices["train"]["checksum"]
    for name, own in indices.items():
        same = int(np.isin(own["checksum"], train).sum()) if name != "train" else 0
        lines += [f"warning: {same:,} images of {name} are in train, too"] if same else []
    return lines
