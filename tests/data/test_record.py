"""Which files a run was started with: how a later start differs, and what makes no difference."""

import shutil

import numpy as np
import pytest

from rotssl.data import datasets
from rotssl.data.record import Record
from tests.data.pictures import config, draw, folder


def record(root, **options):
    return datasets.load(config(root, **options), 0.2).record


def test_the_record_is_of_files_wherever_they_are_and_however_they_are_stored(tmp_path):
    first = record(folder(tmp_path / "data", each=10))
    first.save(tmp_path)
    (tmp_path / "data").rename(tmp_path / "moved")
    (tmp_path / "moved" / "ant" / "0.png").touch()
    moved = record(tmp_path / "moved", store="disk", cache=str(tmp_path / "cache"))
    assert moved.differences(Record.read(tmp_path)) == ""
    assert record(tmp_path / "moved", store="disk", cache=str(tmp_path / "cache")).differences(first) == ""
    assert Record.read(tmp_path / "moved") is None
    (tmp_path / "images.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"images\.npz cannot be read"):
        Record.read(tmp_path)


CHANGES = {
    "1 image was added": lambda root: draw(root / "bee" / "new.png"),
    "1 image was removed": lambda root: (root / "bee" / "3.png").unlink(),
    "1 image was replaced": lambda root: draw(root / "bee" / "3.png", colour=(1, 2, 3)),
    "2 images were added, 1 image was removed": lambda root: [
        (root / "ant" / "1.png").rename(root / "bee" / "y.png"),
        draw(root / "bee" / "z.png"),
    ],
    "classes were renamed: bee to wasp": lambda root: (root / "bee").rename(root / "wasp"),
    "class cow was added, 3 images were added": lambda root: folder(root, classes=("cow",), each=3),
    "class cat was removed, 10 images were removed": lambda root: shutil.rmtree(root / "cat"),
}


@pytest.mark.parametrize("words", CHANGES)
def test_a_difference_is_named(tmp_path, words):
    before = record(folder(tmp_path, classes=("ant", "bee", "cat"), each=10))
    CHANGES[words](tmp_path)
    assert record(tmp_path).differences(before) == words


def test_names_of_any_bytes_are_kept(tmp_path):
    made = Record(("caf\udce9", "b\nc"), np.arange(3, dtype=np.uint64), np.arange(3, dtype=np.uint64))
    made.save(tmp_path)
    read = Record.read(tmp_path)
    assert read.classes == made.classes and read.differences(made) == ""
