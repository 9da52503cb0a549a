"""The command that packs images into a set that is read from anywhere."""

import os
import shlex
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rotssl.base.errors import in_a_line
from rotssl.base.place import place
from rotssl.commands import EXIT_INTERRUPTED, EXIT_OK, say
from rotssl.config.fields import ConfigError
from rotssl.data.packed import Manifest
from rotssl.packing import packer
from rotssl.packing.processes import in_processes
from rotssl.packing.shards import Options, Record, Task
from rotssl.packing.sources import look


class _View:
    """A bar on a terminal, else a line now and then: images, images and megabytes a second, and the time left."""

    EVERY_S = 30.0

    def __init__(self, total: int) -> None:
        self.total, self.console = total, Console(stderr=True)
        self.started = self.shown = time.monotonic()
        self.images = self.bytes = 0
        columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        live = self.console.is_terminal
        self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True, disable=not live)
        self.task = self.bar.add_task("packing", total=total, rate="")

    def see(self, record: Record, left: int) -> None:
        """Count a shard."""
        self.images += record.shard.images + len(record.left_out)
        self.bytes += record.shard.bytes
        self.bar.update(self.task, completed=self.images, rate=self.rate())
        now = time.monotonic()
        if not self.console.is_terminal and left and now - self.shown > self.EVERY_S:
            self.shown = now
            seconds = (now - self.started) * (self.total - self.images) / self.images
            say(f"packed {self.images:,} of {self.total:,} images, {self.rate()}, {seconds / 60:.0f} minutes left")

    def rate(self) -> str:
        """Images and megabytes a second."""
        seconds = max(1e-9, time.monotonic() - self.started)
        return f"{self.images / seconds:,.0f} images/s, {self.bytes / seconds / 1e6:,.0f} MB/s"


def pack(
    source: str,
    address: str,
    options: Options,
    holdout: float,
    skip: bool,
    workers: int | None = None,
    cluster: bool = False,
    columns: tuple[str, str] = ("", ""),
    per_shard: int = packer.PER_SHARD,
) -> int:
    """Pack a source, and print what the set holds; returns the exit code.

    Args:
        source: path of the images.
        address: of the set.
        options: how images are packed.
        holdout: share of each class of train that becomes validation, if there is none.
        skip: whether images that cannot be read are left out.
        workers: processes; None: one for each core.
        cluster: whether a Ray cluster does it.
        columns: of Parquet files, those of image and label.
        per_shard: images in a shard.

    Raises:
        ConfigError: the source or the set is not as it must be.
    """
    source = os.path.abspath(os.path.expanduser(source))  # other nodes work in other folders
    address = address if "://" in address else os.path.abspath(os.path.expanduser(address))
    try:
        place(address)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if "://" not in address and Path(address).is_relative_to(source):
        raise ConfigError(f"{address}: lies within {source}, and would be packed the next time")
    planned = packer.plan(look(source, columns), options, holdout, per_shard)

    def run(tasks: Sequence[Task], options: Options, address: str) -> Iterable[Record]:
        if cluster:
            from rotssl.runtimes.ray_pack import on_cluster

            return on_cluster(tasks, options, address)
        return in_processes(tasks, options, address, workers or os.cpu_count() or 1)

    view = _View(sum(len(task.items) for tasks in planned.tasks.values() for task in tasks))
    try:
        with view.bar:
            manifest = packer.pack(planned, address, run, skip, view.see)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from here")
        return EXIT_INTERRUPTED
    except ConfigError:
        raise
    except Exception as error:  # of any kind: clients of object stores, and Ray, raise their own
        if isinstance(error, OSError) and error.errno is not None and "://" not in address:
            raise  # of a disk
        raise ConfigError(f"{address}: {in_a_line(error)}; the same command goes on from here") from error
    _show(manifest, address)
    return EXIT_OK


def _show(manifest: Manifest, address: str) -> None:
    splits = ", ".join(f"{name} {split.images:,}" for name, split in manifest.splits.items())
    among = f" in {len(manifest.classes):,} classes" if manifest.classes else ", unlabelled"
    images = sum(split.images for split in manifest.splits.values())
    size = sum(shard.bytes for split in manifest.splits.values() for shard in split.shards)
    print(f"packed: {images:,} images{among} ({splits}), {size / 1e9:,.2f} GB, identity {manifest.identity[:12]}")
    for line in manifest.notes:
        print(line)
    for name, why in manifest.left_out[:10]:
        print(f"left out: {name} {why}")
    if len(manifest.left_out) > 10:
        print(f"left out: {len(manifest.left_out) - 10:,} more, see manifest.json")
    print(f"train from it: --data.name packed --data.root {shlex.quote(address)}")
