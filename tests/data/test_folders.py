"""Folders of pictures: their layouts, Tiny ImageNet's among them, and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rotssl.data import datasets
from tests.data.pictures import check_refused, config, draw, folder, rows


@pytest.mark.parametrize("splits", [(), ("train",), ("train", "test"), ("train", "val"), ("train", "val", "test")])
def test_every_layout_of_classes(tmp_path, splits):
    train, validation = (20, 20) if "val" in splits else (16, 4)
    folder(tmp_path, *splits, each=10)
    got, info = datasets.load(config(tmp_path), 0.2), datasets.inspect(config(tmp_path), 0.2)
    assert np.bincount(got.train.labels).tolist() == [train // 2] * 2
    assert np.bincount(got.validation.labels).tolist() == [validation // 2] * 2
    assert info == datasets.DataInfo(train, 16, True, (train + validation, 3, 16, 16))
    # Disjoint, test is not read, and each label is its image's.
    assert not rows(got.train.images) & rows(got.validation.images)
    home = splits[0] if splits else ""
    for where, part in ((home, got.train), ("val" if "val" in splits else home, got.validation)):
        for label, known in enumerate(got.classes):
            files = (tmp_path / where / known).iterdir()
            allowed = {np.asarray(Image.open(file)).transpose(2, 0, 1).tobytes() for file in files}
            assert rows(part.images[part.labels == label]) <= allowed
    # A limit comes after the holdout.
    less = datasets.load(config(tmp_path, limit=6), 0.2)
    assert np.bincount(less.train.labels).tolist() == [3, 3]
    assert np.array_equal(less.validation.images, got.validation.images)


def test_a_folder_without_classes_is_unlabelled(tmp_path):
    for i in range(7):
        draw(tmp_path / f"{i}.png")
    got = datasets.load(config(tmp_path), 0.2)
    assert (got.train.images.shape, got.train.labels, got.validation) == ((7, 3, 16, 16), None, None)
    assert datasets.inspect(config(tmp_path), 0.2) == datasets.DataInfo(7, 16, False, (7, 3, 16, 16))


def test_missing_and_empty_folders_are_refused_by_path(tmp_path):
    check_refused(tmp_path / "none", tmp_path / "none", "No such file")
    check_refused(draw(tmp_path / "file.png"), tmp_path / "file.png", "Not a directory")
    (tmp_path / "empty").mkdir()
    check_refused(tmp_path / "empty", tmp_path / "empty", "no images")
    folder(tmp_path / "some")
    (tmp_path / "some" / "cow").mkdir()
    check_refused(tmp_path / "some", tmp_path / "some" / "cow", "no images")
    folder(tmp_path / "split", "train", "val")
    (tmp_path / "split" / "val" / "bee").rename(tmp_path / "split" / "val" / "wasp")
    check_refused(tmp_path / "split", tmp_path / "split" / "val", "differ", "wasp")


WNIDS = ("n02", "n01", "n03")


def tiny_imagenet(root, each=10, boxes="\t0\t32\t44\t62\n"):
    """The published zip's layout: order of wnids.txt is not sorted, the last of the classes' val pictures come first."""
    lines = []
    for wnid in WNIDS:
        for i in range(each):
            draw(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", (64, 64))
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("n02_0.JPEG\t0\t32\t44\t62\n")
    for i in range(6):
        colour = (80 * (2 - i % 3), 0, 0)  # tells the class
        draw(root / "val" / "images" / f"val_{i}.JPEG", (64, 64), colour, quality=100)
        lines.append(f"val_{i}.JPEG\t{sorted(WNIDS)[2 - i % 3]}{boxes}")
    draw(root / "test" / "images" / "test_0.JPEG", (99, 99))  # another size: would be noticed
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    return root


@pytest.mark.parametrize("boxes", ["\t0\t32\t44\t62\n", "\n"], ids=["boxes", "no boxes"])
@pytest.mark.parametrize("inside", ["", "tiny-imagenet-200"])
def test_tiny_imagenet_is_read_as_its_zip_unpacks(tmp_path, inside, boxes):
    tiny_imagenet(tmp_path / inside, boxes=boxes)
    data = config(tmp_path, "tiny-imagenet", limit=9)
    assert datasets.inspect(data, 0.1) == datasets.DataInfo(9, 64, True, (15, 3, 64, 64))
    got = datasets.load(data, 0.1)
    assert got.classes == ("n01", "n02", "n03")
    assert got.train.images.shape == (9, 3, 64, 64)
    assert np.bincount(got.train.labels).tolist() == [3, 3, 3]
    assert got.validation.labels.tolist() == [2, 1, 0] * 2
    assert np.abs(got.validation.images.mean((2, 3))[:, 0] - 80 * got.validation.labels).max() < 2
    for label, wnid in enumerate(got.classes):
        files = (tmp_path / inside / "train" / wnid / "images").iterdir()
        allowed = {np.asarray(Image.open(file)).transpose(2, 0, 1).tobytes() for file in files}
        assert rows(got.train.images[got.train.labels == label]) <= allowed
    assert len(datasets.load(config(tmp_path, "tiny-imagenet"), 0.1).train) == 30


@pytest.mark.parametrize("part", ["", "wnids.txt", "train", "val", "val/val_annotations.txt"])
def test_a_tiny_imagenet_that_lacks_a_part_is_refused_by_what_is_expected(tmp_path, part):
    path = tiny_imagenet(tmp_path / "data") / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    missing = path / {"": "wnids.txt", "val": "val_annotations.txt"}.get(part, "")
    check_refused(tmp_path / "data", missing, "No such file", "tiny-imagenet-200/", name="tiny-imagenet")


CONTRADICTIONS = r"""
val/val_annotations.txt | val_9.JPEG\tn01\t0 | line 7 | no file 'val_9.JPEG'
val/val_annotations.txt | val_0.JPEG\tn09\t0 | line 7 | no class 'n09' | wnids.txt
val/val_annotations.txt | val_0.JPEG | line 7 | no class ''
wnids.txt | n04 | differ in their classes (n04)
"""


@pytest.mark.parametrize("line", CONTRADICTIONS.strip().splitlines())
def test_a_tiny_imagenet_that_contradicts_itself_is_refused(tmp_path, line):
    file, added, *words = line.split(" | ")
    with (tiny_imagenet(tmp_path) / file).open("a") as opened:
        opened.write(added.replace("\\t", "\t") + "\n")
    check_refused(tmp_path, tmp_path / file, *words, name="tiny-imagenet")


def test_a_tiny_imagenet_with_pictures_missing_unnamed_or_damaged_is_refused(tmp_path):
    extra = draw(tiny_imagenet(tmp_path) / "val" / "images" / "val_6.JPEG", (64, 64))
    check_refused(tmp_path, "val_annotations.txt", "6 of the 7 images", name="tiny-imagenet")
    extra.unlink()
    hurt = tmp_path / "val" / "images" / "val_3.JPEG"
    hurt.write_bytes(b"no image")
    check_refused(tmp_path, hurt, "cannot be decoded", name="tiny-imagenet")
    hurt.unlink()
    check_refused(tmp_path, "line 4", "val_3.JPEG", name="tiny-imagenet")
    shutil.rmtree(tmp_path / "train" / "n03" / "images")
    shutil.rmtree(tmp_path / "val" / "images")
    (tmp_path / "val" / "val_annotations.txt").write_text("")
    check_refused(tmp_path, "0 of the 0 images", name="tiny-imagenet")
    tiny_imagenet(tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "train" / "n03" / "images")
    check_refused(tmp_path / "other", Path("train", "n03"), "no images", name="tiny-imagenet")
