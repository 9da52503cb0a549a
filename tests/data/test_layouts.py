"""Folders that are not as they should be: what is refused, what is said, and which files are left out."""

import os
import shutil

import numpy as np
import pytest

from rotssl.data import datasets, folders
from tests.data.pictures import check_refused, config, draw, folder


def warned(root):
    """The warnings about a folder, and its description once it is loaded."""
    info, got = datasets.inspect(config(root), 0.2), datasets.load(config(root), 0.2)
    assert info.labelled == (got.train.labels is not None)
    return " | ".join(info.warnings), got


def test_what_is_no_image_is_left_out_and_counted(tmp_path):
    folder(tmp_path, each=10)
    for name in (
        "ant/._3.png",
        "ant/.trash.png",
        "bee/.ipynb_checkpoints/3.png",
        "ant/__MACOSX/3.png",
        "__MACOSX/ant/3.png",
    ):
        draw(tmp_path / name)
    for name in ("ant/x.gif", "bee/y.GIF", "bee/z.avif", "bee/notes", "ant/.DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    draw(tmp_path / "loose.png")
    os.mkfifo(tmp_path / "ant" / "pipe.png")
    os.symlink(tmp_path / "bee" / "0.png", tmp_path / "ant" / "linked.png")
    info, got = datasets.inspect(config(tmp_path), 0.2), datasets.load(config(tmp_path), 0.2)
    assert got.classes == ("ant", "bee") and len(got.train) + len(got.validation) == 21 == info.shape[0]
    assert got.lines[0] == (
        "data: 21 images in 2 classes (train 17, validation 4), 16 x 16, 8 skipped (2 .gif, 2 hidden, 1 .avif, "
        "1 beside the class folders, 1 no suffix, 1 not a file)"
    )


def test_a_link_to_nowhere_stands_for_an_image_and_is_refused(tmp_path):
    folder(tmp_path)
    os.symlink("/nowhere/3.png", tmp_path / "ant" / "link.png")
    check_refused(tmp_path, tmp_path / "ant" / "link.png", "No such file or directory")


@pytest.mark.parametrize("names", ["Train Val Test", "TRAIN VALIDATION TEST", "training valid testing"])
def test_splits_may_be_spelt_otherwise(tmp_path, names):
    train, validation, test = names.split()
    folder(tmp_path, train, each=6)
    folder(tmp_path, validation, each=3)
    folder(tmp_path, test, each=2)
    said, got = warned(tmp_path)
    assert (said, got.classes, len(got.train), len(got.validation)) == ("", ("ant", "bee"), 12, 6)
    assert len(datasets.load_test(config(tmp_path))) == 4
    shutil.rmtree(tmp_path / validation)
    assert len(datasets.load(config(tmp_path), 0).test) == 4


REFUSED = """
dataset/train dataset/val | dataset contains train/ and val/ | set data.root to
amazon/Train amazon/Test webcam/Train webcam/Test | amazon contains Test/ and Train/ | set data.root to
train val valid | contains both val/ and valid/ | only one can be validation
val test | contains test/ and val/ | no train/
train dog | contains both train/ and dog/ | splits or classes
"""


@pytest.mark.parametrize("line", REFUSED.strip().splitlines())
def test_splits_that_are_nested_doubled_or_missing_are_refused(tmp_path, line):
    splits, *words = line.split(" | ")
    folder(tmp_path, *splits.split())
    check_refused(tmp_path, *words)


def test_imagenets_flat_validation_is_refused_with_what_to_do(tmp_path):
    folder(tmp_path, "train")
    for i in range(4):
        draw(tmp_path / "val" / f"ILSVRC2012_val_{i:08}.JPEG")
    check_refused(tmp_path, tmp_path / "val", "4 images but no class folders", "sort them into", "move val/ away")


@pytest.mark.parametrize("inner", ["", "Cat Dog"])
def test_one_class_folder_is_unlabelled_with_a_warning(tmp_path, inner):
    folder(tmp_path, "PetImages", classes=inner.split() or ("",), each=4)
    said, got = warned(tmp_path)
    assert (got.train.labels, got.validation, got.classes) == (None, None, ())
    assert "only one class folder, PetImages/: taken as unlabelled" in said
    assert (f"if Cat/ and the like are classes, set data.root to {tmp_path / 'PetImages'}" in said) == bool(inner)
    assert got.lines[0].startswith(f"data: {len(got.train)} images, unlabelled (train {len(got.train)}), 16 x 16")


def test_unlabelled_training_images_do_not_use_labelled_validation_and_say_so(tmp_path):
    folder(tmp_path, "train", classes=("",), each=6)
    folder(tmp_path, "val")
    said, got = warned(tmp_path)
    assert (len(got.train), got.validation) == (6, None)
    assert f"{tmp_path / 'val'} is not used" in said


@pytest.mark.parametrize("empty", [False, True])
def test_validation_may_lack_a_class_which_is_said(tmp_path, empty):
    folder(tmp_path, "train", classes=("ant", "bee", "cow"), each=4)
    folder(tmp_path, "val", "test", classes=("ant", "cow"), each=3)
    if empty:
        (tmp_path / "val" / "bee").mkdir()
    said, got = warned(tmp_path)
    assert np.bincount(got.validation.labels).tolist() == [3, 0, 3]
    assert f"{tmp_path / 'val'} has no images of 1 of 3 classes (bee)" in said
    assert np.bincount(datasets.load_test(config(tmp_path)).labels).tolist() == [3, 0, 3]


def test_classes_too_small_for_the_holdout_are_said(tmp_path):
    folder(tmp_path, each=20)
    folder(tmp_path, classes=("cow", "dog"), each=1)
    got = datasets.load(config(tmp_path), 0.1)
    assert np.bincount(got.train.labels).tolist() == [18, 18, 1, 1]
    assert got.lines[1] == (
        "warning: nothing is held out of 2 of 4 classes (cow), which have too few images for evaluation.holdout"
    )


def test_a_class_within_another_and_a_split_among_classes_are_said(tmp_path):
    folder(tmp_path, classes=("ant", "bee", "valid"))
    draw(tmp_path / "ant" / "bee" / "x.png")
    said, got = warned(tmp_path)
    assert f"{tmp_path / 'ant'} contains bee/, the name of another class; its images count as ant" in said
    assert "valid/ is taken for a class, since there is no train/" in said
    assert len(got.classes) == 3


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    folder(tmp_path)
    (tmp_path / "ant" / "more").mkdir()
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(folders.os, "scandir", closed)
    check_refused(tmp_path, tmp_path / "ant" / "more", "Permission denied")
