"""From sources to packed sets: nothing is lost or changed, whatever ends the packing."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rotssl.base.place import Folder
from rotssl.config.fields import ConfigError
from rotssl.data.packed import Manifest
from rotssl.data.reading import digest, read
from rotssl.packing.processes import in_processes
from rotssl.packing.shards import Options
from tests.packing.sets import files, here, index, members, packed, picture, pictures, stored

ROOT = Path(__file__).parents[2]


def test_a_set_holds_the_files_as_they_are_with_what_is_known_of_them(tmp_path):
    source = pictures(tmp_path / "source")
    manifest = packed(source, tmp_path / "set")
    assert manifest == Manifest.read(Folder(tmp_path / "set")) and manifest.classes == ("bee", "wasp")
    assert {name: split.images for name, split in manifest.splits.items()} == {"train": 16, "validation": 16}
    assert [shard.images for shard in manifest.splits["train"].shards] == [5, 5, 5, 1]
    assert manifest.notes == ("28 images with an orientation tag",) and manifest.left_out == ()
    by_digest = {digest(path.read_bytes()): path for path in source.rglob("*.jpg")}
    for split, folder in (("train", "train"), ("validation", "val")):
        for row, file in zip(index(tmp_path / "set", split), stored(tmp_path / "set", split), strict=True):
            path = by_digest[row["checksum"]]
            image, _ = read(str(path))
            assert file == path.read_bytes()
            assert (row["width"], row["height"]) == image.size
            assert manifest.classes[row["label"]] == path.parent.name and path.parents[1].name == folder
            with Image.open(path) as raw:
                assert row["orientation"] == raw.getexif().get(0x0112, 1)
    low, high, narrow, wide = manifest.splits["train"].sides
    rows = index(tmp_path / "set")
    assert (low, high) == (rows["height"].min(), rows["height"].max())
    assert (narrow, wide) == (rows["width"].min(), rows["width"].max())
    # The order is shuffled, so that a shard is a sample, and the folder of classes comes out with tar.
    assert rows["label"].tolist() != sorted(rows["label"])
    for shard in manifest.splits["train"].shards + manifest.splits["validation"].shards:
        with tarfile.open(tmp_path / "set" / shard.file) as archive:
            archive.extractall(tmp_path / "out", filter="data")
    taken = files(tmp_path / "out")
    assert {name: taken[name] for name in taken if name.endswith(".jpg")} == files(source)
    assert taken["train/wasp/3.cls"] == b"1"


def test_a_set_is_the_same_from_processes_and_can_be_a_source_of_its_own(tmp_path):
    source = pictures(tmp_path / "source")
    packed(source, tmp_path / "a")
    packed(source, tmp_path / "b", lambda *task: in_processes(*task, workers=2))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    again = packed(tmp_path / "a", tmp_path / "c")  # its tar files are a WebDataset
    assert again.classes == ("0", "1") and again.options["source"] == "tars"
    for split in ("train", "validation"):
        one, other = (index(tmp_path / name, split) for name in ("a", "c"))
        pairs = [sorted(zip(rows["checksum"], rows["label"], strict=True)) for rows in (one, other)]
        assert pairs[0] == pairs[1]


class Ended(Exception):
    """What ends a packing in the middle."""


def test_a_packing_that_was_ended_goes_on_and_the_set_is_the_same(tmp_path):
    source = pictures(tmp_path / "source")
    packed(source, tmp_path / "whole")
    made = []
    for stop in (0, 3, 5):

        def run(tasks, options, address, stop=stop):
            made.append([task.name for task in tasks])
            yield from here(tasks[:stop], options, address)
            if stop < 5:
                raise Ended

        if stop < 5:
            with pytest.raises(Ended):
                packed(source, tmp_path / "set", run)
            assert Manifest.read(Folder(tmp_path / "set")) is None
        else:
            packed(source, tmp_path / "set", run)
    assert [len(tasks) for tasks in made] == [8, 8, 5]
    assert files(tmp_path / "set") == files(tmp_path / "whole")
    assert packed(source, tmp_path / "set", None).identity == Manifest.read(Folder(tmp_path / "whole")).identity


@pytest.mark.exhaustive
def test_a_packer_killed_at_any_moment_leaves_nothing_wrong(tmp_path):
    source = pictures(tmp_path / "source", each=120)
    command = [sys.executable, ROOT / "jobs" / "pack.py", source, "--images", "20", "--workers", "2"]
    subprocess.run([*command, tmp_path / "whole"], check=True, capture_output=True, cwd=ROOT)
    gen, killed = np.random.default_rng(0), 0
    while killed < 10:
        process = subprocess.Popen(
            [*command, tmp_path / "set"],
            cwd=ROOT,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            assert process.wait(timeout=gen.uniform(0.2, 2.5)) == 0
            subprocess.run(["rm", "-r", tmp_path / "set"], check=True)  # it was ready first
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
    subprocess.run([*command, tmp_path / "set"], check=True, capture_output=True, cwd=ROOT)
    assert files(tmp_path / "set") == files(tmp_path / "whole")


def test_another_source_or_other_options_are_refused(tmp_path):
    source = pictures(tmp_path / "source")

    def stops(tasks, options, address):
        yield from here(tasks[:1], options, address)
        raise Ended

    with pytest.raises(Ended):
        packed(source, tmp_path / "set", stops)
    with pytest.raises(ConfigError, match="part of a set with other options"):
        packed(source, tmp_path / "set", options=Options(resize=32))
    picture(source / "train" / "bee" / "new.jpg", 30, 30)
    with pytest.raises(ConfigError, match="part of a set of a source that has changed"):
        packed(source, tmp_path / "set")
    (source / "train" / "bee" / "new.jpg").unlink()
    packed(source, tmp_path / "set")
    whole = files(tmp_path / "set")
    with pytest.raises(ConfigError, match="another packed set"):
        packed(source, tmp_path / "set", per_shard=4)
    assert files(tmp_path / "set") == whole
    assert {path.name for path in tmp_path.iterdir()} == {"source", "set"}  # no lock is left


def test_images_that_cannot_be_read_are_refused_by_name_or_left_out(tmp_path):
    source = pictures(tmp_path / "source")
    bad = {"train/bee/1.jpg": b"", "train/wasp/2.jpg": b"no picture"}
    whole = (source / "val/bee/3.jpg").read_bytes()
    bad["val/bee/3.jpg"] = whole[: len(whole) // 2]
    kept = {name: (source / name).read_bytes() for name in bad}
    for name, text in bad.items():
        (source / name).write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        packed(source, tmp_path / "set")
    told = str(caught.value)
    assert all(name in told for name in bad) and "empty file" in told and "no known image format" in told
    assert Manifest.read(Folder(tmp_path / "set")) is None
    left = packed(source, tmp_path / "less", skip=True)
    assert sorted(name for name, _ in left.left_out) == sorted(bad)
    assert {name: split.images for name, split in left.splits.items()} == {"train": 14, "validation": 15}
    for name, text in kept.items():  # mended, the packing goes on
        (source / name).write_bytes(text)
    packed(source, tmp_path / "set")
    packed(source, tmp_path / "whole")
    assert files(tmp_path / "set") == files(tmp_path / "whole")


def test_large_images_are_reduced_and_stored_upright_where_asked_for(tmp_path):
    source = pictures(tmp_path / "source")
    manifest = packed(source, tmp_path / "set", options=Options(resize=48, quality=90))
    count = 0
    by_digest = {digest(path.read_bytes()): path for path in source.rglob("*.jpg")}
    for row, file in zip(index(tmp_path / "set"), stored(tmp_path / "set"), strict=True):
        with Image.open(io.BytesIO(file)) as image:
            if row["checksum"] in by_digest:
                assert min(row["height"], row["width"]) <= 48 and file == by_digest[row["checksum"]].read_bytes()
                continue
            count += 1
            assert min(image.size) == 48 and image.size == (row["width"], row["height"])
            assert row["orientation"] == 1 and 0x0112 not in image.getexif()
    total = sum(note.endswith("images reduced") and int(note.split()[0]) for note in manifest.notes)
    in_validation = sum(row["checksum"] not in by_digest for row in index(tmp_path / "set", "validation"))
    assert count and total == count + in_validation


def test_validation_is_held_out_of_each_class_when_the_set_is_made(tmp_path):
    source = pictures(tmp_path / "source", splits=("train",))
    manifest = packed(source, tmp_path / "set", holdout=0.25)
    assert {name: split.images for name, split in manifest.splits.items()} == {"train": 12, "validation": 4}
    assert np.bincount(index(tmp_path / "set", "validation")["label"]).tolist() == [2, 2]
    assert not set(index(tmp_path / "set", "validation")["checksum"]) & set(index(tmp_path / "set")["checksum"])


def test_images_that_are_in_train_and_in_another_split_are_told_of(tmp_path):
    source = pictures(tmp_path / "source")
    (source / "val/bee/0.jpg").write_bytes((source / "train/wasp/1.jpg").read_bytes())
    manifest = packed(source, tmp_path / "set")
    assert "warning: 1 images of validation are in train, too" in manifest.notes


def test_a_manifest_that_is_not_whole_or_of_another_version_is_refused(tmp_path):
    packed(pictures(tmp_path / "source"), tmp_path / "set")
    file = tmp_path / "set" / "manifest.json"
    text = file.read_text()
    for wrong, words in (
        (text[:-50], "damaged"),
        (text.replace('"version": 1', '"version": 2'), "version 2"),
        (text.replace('"bee"', '"wasp"', 1), "identity"),
    ):
        file.write_text(wrong)
        with pytest.raises(ValueError, match=words):
            Manifest.read(Folder(tmp_path / "set"))


def test_names_are_fit_for_webdataset(tmp_path):
    top = tmp_path / "source" / "train"
    for name in ("bee/1.jpg", "bee/1.png", "bee/im.0.jpg", "wasp/im.1.jpg"):
        picture(top / name, 30, 20, len(name))
    packed(tmp_path / "source", tmp_path / "set")
    with tarfile.open(tmp_path / "set" / "train-00000.tar") as archive:
        names = set(archive.getnames())
    images = {"train/bee/1.jpg", "train/bee/1_2.png", "train/bee/im_0.jpg", "train/wasp/im_1.jpg"}
    assert names == images | {f"{name.rpartition('.')[0]}.cls" for name in images}
    again = packed(tmp_path / "set", tmp_path / "again")
    assert again.splits["train"].images == 4 and again.notes == ()
    reduced = packed(tmp_path / "source", tmp_path / "reduced", options=Options(resize=10))
    with tarfile.open(tmp_path / "reduced" / "train-00000.tar") as archive:
        assert len(set(archive.getnames())) == 8
    assert reduced.splits["train"].images == 4


@pytest.mark.parametrize(
    ("splits", "holdout", "words"),
    [
        (("val",), 0.0, "no images of train; there are validation"),
        (("train",), 0.02, "holds out no image of 16"),
        (("train", "empty-val"), 0.0, "no images of validation"),
    ],
)
def test_a_set_without_train_or_with_an_empty_split_is_refused_before_it_is_made(tmp_path, splits, holdout, words):
    image = picture(tmp_path / "a.jpg", 9, 9).read_bytes()
    for split in splits:
        some = (
            {}
            if "empty" in split
            else {f"{i}__jpg": image for i in range(16)} | {f"{i}__cls": b"%d" % (i % 2) for i in range(16)}
        )
        members(tmp_path / "tars" / f"{split}.tar", **(some or {"x__cls": b"0"}))
    with pytest.raises(ConfigError, match=words):
        packed(tmp_path / "tars", tmp_path / "set", None, holdout=holdout)
    assert not (tmp_path / "set").exists()


def test_names_that_are_not_utf_8(tmp_path):
    for name in (b"caf\xe9", b"bar"):
        picture(Path(os.fsdecode(os.fsencode(tmp_path / "source" / "train") + b"/" + name + b"/1.jpg")), 9, 9)
    manifest = packed(tmp_path / "source", tmp_path / "set")
    assert Manifest.read(Folder(tmp_path / "set")) == manifest
    assert [os.fsencode(name) for name in manifest.classes] == [b"bar", b"caf\xe9"]


def test_one_packs_to_a_folder_at_a_time(tmp_path):
    source = pictures(tmp_path / "source")

    def run(tasks, options, address):
        with pytest.raises(ConfigError, match="another process is packing"):
            packed(source, address)
        return here(tasks, options, address)

    packed(source, tmp_path / "set", run)


def test_a_record_of_a_shard_that_is_not_there_does_not_count(tmp_path):
    source = pictures(tmp_path / "source")
    packed(source, tmp_path / "whole")

    def stops(tasks, options, address):
        yield from here(tasks, options, address)
        (Path(address) / "train-00001.tar").write_bytes(b"")  # as after a crash of the machine
        raise Ended

    with pytest.raises(Ended):
        packed(source, tmp_path / "set", stops)
    packed(source, tmp_path / "set")
    assert files(tmp_path / "set") == files(tmp_path / "whole")


def test_the_identity_does_not_depend_on_where_the_source_lies(tmp_path):
    one = packed(pictures(tmp_path / "a" / "source"), tmp_path / "one")
    other = packed(pictures(tmp_path / "b" / "moved"), tmp_path / "other")
    assert one == other and one.identity == other.identity
    assert dataclasses.replace(one, classes=("bee", "fly")).identity != one.identity


def test_the_job_says_what_it_packed(tmp_path):
    source = pictures(tmp_path / "source")
    command = [sys.executable, ROOT / "jobs" / "pack.py", source, tmp_path / "set", "--workers", "1"]
    started = time.monotonic()
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert found.returncode == 0, found.stderr
    assert "packed: 32 images in 2 classes (train 16, validation 16)" in found.stdout
    assert f"--data.name packed --data.root {tmp_path / 'set'}" in found.stdout
    assert time.monotonic() - started < 60
    wrong = subprocess.run([*command, "--holdout", "2"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1) and "--holdout: got 2.0" in wrong.stderr
