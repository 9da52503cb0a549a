"""Decoded images on disk: the same pixels as in memory, decoded once, whole or not at all."""

import errno
import json
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest
from filelock import FileLock, Timeout
from PIL import Image

from rotssl import config as cfg
from rotssl import lifecycle
from rotssl.base import distributed, memory
from rotssl.config.fields import ConfigError
from rotssl.config.sections import DataConfig
from rotssl.data import datasets, decoding, disk_cache, folders
from rotssl.data.images import DataError


@pytest.fixture
def root(tmp_path):
    """Two classes of 40 pictures that differ."""
    for name in ("ant", "bee"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(40):
            noise = np.random.default_rng([ord(name[0]), i]).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


def config(root, where="disk", **options):
    return DataConfig(
        name="imagefolder", root=str(root), image_size=16, store=where, cache=str(root.parent / "cache"), **options
    )


def names(root):
    """Kinds of files in the cache; the lock may stay, empty, and what says that a store was verified."""
    return sorted(path.suffix for path in (root.parent / "cache").iterdir() if path.suffix not in (".lock", ".ok"))


def same(a, b):
    for ours, theirs in ((a.train, b.train), (a.validation, b.validation)):
        assert np.array_equal(ours.images, theirs.images) and np.array_equal(ours.labels, theirs.labels)


@pytest.fixture
def decoded(monkeypatch):
    """Paths of the pictures as they are decoded, without those that are probed."""
    seen, read = [], decoding.read
    monkeypatch.setattr(decoding, "probe", lambda splits, skip: (16, 16))
    monkeypatch.setattr(decoding, "read", lambda path: seen.append(path) or read(path))
    return seen


@pytest.mark.parametrize("late", [None, (20, 24)], ids=["native", "one late picture of another size"])
def test_disk_and_memory_hold_the_same_pixels_and_a_later_start_decodes_nothing(root, decoded, late, monkeypatch):
    monkeypatch.setattr(decoding, "BLOCK_BYTES", 7 * 768)  # blocks of 7 pictures: the last one is short
    if late:
        Image.new("RGB", late, (1, 2, 3)).save(root / "bee" / "39.png")
    ram = datasets.load(config(root, "memory"), 0.2)
    disk = datasets.load(config(root), 0.2)
    same(disk, ram)
    assert disk.train.images.shape == ((64, 3, 19, 19) if late else (64, 3, 16, 16))
    assert isinstance(disk.train.images, np.memmap) and not disk.train.images.flags.writeable
    assert names(root) == [".json", ".npy", ".sums"]
    (about,) = (root.parent / "cache").glob("*.json")
    assert json.loads(about.read_text())["folder"] == str(root)
    decoded.clear()
    same(datasets.load(config(root), 0.2), ram)
    assert decoded == []


def test_what_changes_the_pixels_makes_another_store(root, decoded):
    def count():
        datasets.load(config(root), 0.2)
        return len(list((root.parent / "cache").glob("*.npy")))

    assert (count(), count()) == (1, 1)
    os.utime(root / "ant" / "0.png", (1, 1))
    assert count() == 2
    datasets.load(config(root, limit=10), 0.2)
    assert count() == 3
    parts = [folders.Folder((str(root / "ant" / "0.png"),), None)]
    assert (
        disk_cache.checksum(parts, None, 16)
        != disk_cache.checksum(parts, (16, 16), 16)
        != disk_cache.checksum(parts, (16, 16), 32)
    )


@pytest.mark.parametrize("damage", ["cut short", "empty", "no json", "another's json", "broken json"])
def test_a_damaged_store_is_made_again(root, decoded, damage):
    whole = datasets.load(config(root, "memory"), 0.2)
    datasets.load(config(root), 0.2)
    (pixels,), (about,) = ((root.parent / "cache").glob(f"*.{kind}") for kind in ("npy", "json"))
    if damage in ("cut short", "empty"):
        os.truncate(pixels, 5000 if damage == "cut short" else 0)
    elif damage == "no json":
        about.unlink()
    else:
        about.write_text("3" if damage == "broken json" else json.dumps({"checksum": "x", "shape": [80, 3, 16, 16]}))
    decoded.clear()
    same(datasets.load(config(root), 0.2), whole)
    assert len(decoded) == 80 and names(root) == [".json", ".npy", ".sums"]


def test_one_flipped_bit_of_a_store_is_noticed_and_it_is_made_again(root, decoded):
    whole = datasets.load(config(root, "memory"), 0.2)
    datasets.load(config(root), 0.2)
    (pixels,) = (root.parent / "cache").glob("*.npy")
    for at, bit in ((-1, 0), (-768 * 40, 7), (128, 3)):  # the last and the first byte among them
        datasets.load(config(root), 0.2)  # verified, which is believed only of this content
        content = bytearray(pixels.read_bytes())
        content[at] ^= 1 << bit
        pixels.write_bytes(content)
        decoded.clear()
        said = []
        same(datasets.load(config(root), 0.2, said.append), whole)
        assert said[0] == f"{pixels} is damaged: the pixels of 1 images do not have their checksums"
        assert said[1].startswith("decoding 80 images") and len(decoded) == 80


def test_of_processes_that_start_together_one_verifies(root, decoded, monkeypatch):
    counted, digest = [], disk_cache.digest
    monkeypatch.setattr(disk_cache, "digest", lambda row: counted.append(1) or digest(row))
    for _ in range(3):  # decoded, verified, believed
        datasets.load(config(root), 0.2)
    assert len(counted) == 80
    (stamp,) = (root.parent / "cache").glob("*.ok")
    os.utime(stamp, (1, 1))
    datasets.load(config(root), 0.2)
    assert len(counted) == 160


def slow_load(root, ready):
    """Decodes, and hangs in the middle of it."""
    read = decoding.read

    def hang(path):
        if path.endswith("bee/20.png"):
            ready.set()
            time.sleep(60)
        return read(path)

    decoding.probe, decoding.read, decoding.BLOCK_BYTES = lambda splits, skip: (16, 16), hang, 7 * 768
    datasets.load(config(root), 0.2)


def test_a_killed_writer_leaves_nothing_that_is_taken_for_whole(root):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    writer = context.Process(target=slow_load, args=(root, ready), daemon=True)
    writer.start()
    assert ready.wait(30)
    (part,) = (root.parent / "cache").glob("*.part")
    said = []
    waiter = threading.Thread(target=lambda: datasets.load(config(root), 0.2, said.append))
    waiter.start()
    while not said:
        assert waiter.is_alive()
        time.sleep(0.01)
    assert said == [f"waiting for another process that is decoding into {part}"]
    os.kill(writer.pid, signal.SIGKILL)
    waiter.join(30)
    assert not waiter.is_alive() and said[1].startswith("decoding 80 images into ")
    writer.join()
    assert names(root) == [".json", ".npy", ".sums"]
    same(datasets.load(config(root), 0.2), datasets.load(config(root, "memory"), 0.2))


@pytest.mark.parametrize("attempt", range(5))
def test_processes_that_start_together_decode_once(root, decoded, attempt):
    found = []
    threads = [threading.Thread(target=lambda: found.append(datasets.load(config(root), 0.2))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 4 and len(decoded) == 80 and names(root) == [".json", ".npy", ".sums"]
    for splits in found[1:]:
        same(splits, found[0])


def test_a_disk_without_room_is_one_line_and_leaves_nothing(root, monkeypatch):
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr(disk_cache.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(DataError, match=r"^data\.cache: .*61,440 bytes.*10,000 free.*data\.limit") as caught:
        datasets.load(config(root), 0.2)
    assert "\n" not in str(caught.value) and names(root) == []
    # Before the start, where this machine is the one that trains; elsewhere it is said.
    info = datasets.inspect(config(root), 0.2)
    with pytest.raises(ConfigError, match=r"^data\.cache: .*61,440 bytes"):
        datasets.describe_storage(config(root), 0.2, info, here=True)
    assert "10,000 free" in datasets.describe_storage(config(root), 0.2, info, here=False)
    # What a killed process left takes room only until it is written over.
    name = disk_cache.checksum(*datasets._files(config(root), 0.2)[:2], 16)
    (root.parent / "cache" / f"{name[:16]}.part").write_bytes(bytes(60_000))
    assert "not yet decoded here" in datasets.describe_storage(config(root), 0.2, info, here=True)


@pytest.mark.parametrize("where", [(disk_cache.os, "pwrite"), (disk_cache.os, "fsync"), (disk_cache.Path, "rename")])
def test_a_disk_that_becomes_full_is_one_line_and_leaves_nothing(root, monkeypatch, where):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*where, full)
    with pytest.raises(DataError, match=r"^data\.cache: the disk of .* is full"):
        datasets.load(config(root), 0.2)
    assert names(root) == []


def test_a_cache_that_is_no_folder_or_a_picture_that_is_none_is_named(root):
    with pytest.raises(DataError, match=r"^data\.cache: cannot write to"):
        datasets.load(DataConfig(**{**vars(config(root)), "cache": str(root / "ant" / "0.png")}), 0.2)
    (root / "ant" / "7.png").write_bytes(b"no image")
    parts = [folders.scan(str(root))[0]["train"]]
    with pytest.raises(DataError, match=r"ant/7\.png cannot be decoded"):
        disk_cache.load(parts, (16, 16), 16, root.parent / "cache")
    assert names(root) == []


def test_where_images_are_kept(root, monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: 1000)
    assert [disk_cache.kind("auto", size) for size in (150, 151)] == ["memory", "disk"]
    assert [disk_cache.kind(asked, 10**6) for asked in ("memory", "disk")] == ["memory", "disk"]
    assert isinstance(datasets.load(config(root, "auto"), 0.2).train.images, np.memmap)
    assert datasets.where(DataConfig(), 10**9) == "memory"  # read as a whole
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(disk_cache.folder(None)) == "/somewhere/rotssl" and str(disk_cache.folder("/x")) == "/x"


def test_the_store_is_no_part_of_what_a_run_is(root):
    def prepared(**fields):
        given = {"data.name": "imagefolder", "data.root": str(root), "train.batch_size": 16, **fields}
        return lifecycle.prepare(cfg.build(given))[0]

    ram, disk = prepared(), prepared(**{"data.store": "disk", "data.cache": str(root / "..")})
    assert (ram.data.store, disk.data.store) == ("memory", "disk")
    assert cfg.identity_of(ram) == cfg.identity_of(disk) and ram.run_dir == disk.run_dir
    assert disk.data.cache == str(root.parent)


def test_the_line_of_a_dry_run_says_where_and_how_many_bytes(root):
    info = datasets.inspect(config(root), 0.2)
    lines = [datasets.describe_storage(config(root, where), 0.2, info, True) for where in ("memory", "disk")]
    datasets.load(config(root), 0.2)
    lines.append(datasets.describe_storage(config(root), 0.2, info, True))
    cache = root.parent / "cache"
    assert lines == [
        "images: 80 of 3 x 16 x 16, 61,440 bytes, in memory, one copy per node",
        f"images: 80 of 3 x 16 x 16, 61,440 bytes, on disk in {cache} of each node; not yet decoded here",
        f"images: 80 of 3 x 16 x 16, 61,440 bytes, on disk in {cache} of each node; already decoded here",
    ]


def test_the_lock_is_free_again(root):
    datasets.load(config(root), 0.2)
    (about,) = (root.parent / "cache").glob("*.json")
    with disk_cache._alone(about.with_suffix(".part"), print), pytest.raises(Timeout):
        FileLock(about.with_suffix(".lock"), timeout=0).acquire()
    FileLock(about.with_suffix(".lock"), timeout=0).acquire().lock.release()


def first_text(rank_with_text):
    import torch

    text = "data.cache: Größe" if distributed.rank() == rank_with_text else ""
    return distributed.first_nonempty(text, torch.device("cpu"))


def test_what_one_worker_met_all_workers_know(pool):
    assert pool.run(first_text, 1) == pool.run(first_text, 0) == ["data.cache: Größe"] * 2
    assert pool.run(first_text, 2) == ["", ""] and first_text(0) == "data.cache: Größe"
