import hashlib
import importlib.util
import json
import os
import pickle
import shutil
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR100

from rotssl import config as cfg
from rotssl.config.fields import ConfigError
from rotssl.config.sections import DataConfig
from rotssl.data import datasets, decoding, folders, images

REAL = Path(os.environ.get("ROTSSL_DATA", "")) / "FashionMNIST" / "raw"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="ROTSSL_DATA names no folder with FashionMNIST/raw")


def draw(path, size=(16, 16), colour=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = colour or tuple(hashlib.sha256("/".join(path.parts[-3:]).encode()).digest()[:3])
    Image.new("RGB" if isinstance(colour, tuple) else "L", size, colour).save(path, **options)
    return path


def folder(root, *splits, classes=("ant", "bee"), each=5):
    for split in splits or ("",):
        for name in classes:
            for i in range(each):
                draw(root / split / name / f"{i}.png")
    return root


def config(root, name="imagefolder", **options):
    return DataConfig(name=name, root=str(root), image_size=16, **options)


def rows(pictures):
    return {picture.tobytes() for picture in pictures}


def check_refused(root, *words, name="imagefolder"):
    with pytest.raises(ConfigError) as caught:
        datasets.inspect(config(root, name), 0.2)
    assert str(caught.value).startswith("data.root: ")
    assert all(str(word) in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_the_sample_is_balanced_whole_and_free_of_pickles():
    at = resources.files("rotssl.data.sample")
    source, content = json.loads((at / "source.json").read_text()), at / "images.npz"
    assert hashlib.sha256(content.read_bytes()).hexdigest() == source["sha256"]
    with content.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        assert sorted(arrays) == sorted(f"{split}_{kind}" for split in source["sizes"] for kind in ("images", "labels"))
        for split, size in {"train": 5000, "validation": 1000, "test": 1000}.items():
            assert arrays[f"{split}_images"].shape == (size, 28, 28)
            assert np.bincount(arrays[f"{split}_labels"]).tolist() == [size // 10] * 10
    splits = datasets.load(DataConfig(), 0.1)
    for part, size in ((splits.train, 5000), (splits.validation, 1000)):
        assert part.images.shape == (size, 1, 28, 28)
        assert np.bincount(part.labels).tolist() == [size // 10] * 10
    assert not rows(splits.train.images) & rows(splits.validation.images)


def test_a_damaged_sample_is_noticed(monkeypatch, tmp_path):
    shutil.copytree(str(resources.files("rotssl.data.sample")), tmp_path / "sample")
    content = bytearray((tmp_path / "sample" / "images.npz").read_bytes())
    content[1000] ^= 1
    (tmp_path / "sample" / "images.npz").write_bytes(content)
    monkeypatch.setattr(datasets.resources, "files", lambda package: tmp_path / "sample")
    with pytest.raises(images.DataError, match=r"images\.npz"):
        datasets.load(DataConfig(), 0.1)


def test_choose_is_balanced_sorted_and_the_same_each_time():
    labels = np.repeat([0, 1, 2, 3], [50, 50, 50, 3])
    index = images.choose(labels, 153, 43)
    assert index.tolist() == sorted(set(index.tolist()))
    # The class of three gives all it has; what it lacks goes to the others.
    assert sorted(np.bincount(labels[index]).tolist()) == [3, 13, 13, 14]
    assert np.array_equal(index, images.choose(labels, 153, 43))
    assert index.tolist() != list(range(43))
    assert len(images.choose(None, 100, 7)) == 7
    assert images.choose(labels, 153, 500).tolist() == list(range(153))
    assert set(images.choose(labels, 153, 20)) < set(index)


@pytest.mark.parametrize("limit", [10, 1000])
def test_limit_is_a_balanced_part_of_train_and_leaves_validation_alone(limit):
    whole, part = datasets.load(DataConfig(), 0.1), datasets.load(DataConfig(limit=limit), 0.1)
    assert np.bincount(part.train.labels).tolist() == [limit // 10] * 10
    assert rows(part.train.images) <= rows(whole.train.images)
    assert np.array_equal(part.validation.images, whole.validation.images)
    assert datasets.inspect(DataConfig(limit=limit), 0.1).train_size == limit


def test_synthetic_images_repeat_exactly():
    a, b = (datasets.load(DataConfig(name="synthetic"), 0.1).train for _ in range(2))
    assert np.array_equal(a.images, b.images)
    info = datasets.inspect(DataConfig(name="synthetic"), 0.1)
    assert a.images.shape == (info.train_size, 3, info.image_size, info.image_size)
    assert np.bincount(a.labels).tolist() == [256] * 4


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


def test_without_a_holdout_all_images_train_and_test_is_read_where_there_is_no_validation(tmp_path):
    cache, tmp_path = tmp_path / "cache", tmp_path / "images"
    folder(tmp_path, "train", "test", each=10)
    got, info = datasets.load(config(tmp_path), 0), datasets.inspect(config(tmp_path), 0)
    assert (len(got.train), got.validation, len(got.test)) == (20, None, 20)
    assert info == datasets.DataInfo(20, 16, True, (40, 3, 16, 16))
    ours = datasets.load_test(config(tmp_path))
    assert np.array_equal(got.test.images, ours.images) and np.array_equal(got.test.labels, ours.labels)
    assert not rows(got.train.images) & rows(got.test.images)
    disk = config(tmp_path, store="disk", cache=str(cache))
    assert "here they are not yet" in datasets.describe_storage(disk, 0, info, here=True)
    mapped = datasets.load(disk, 0)
    assert isinstance(mapped.test.images, np.memmap) and np.array_equal(mapped.test.images, got.test.images)
    assert "here they are already" in datasets.describe_storage(disk, 0, info, here=True)
    # A holdout reads no test, and where there is validation nothing is held out anyway.
    assert datasets.load(config(tmp_path), 0.2).test is None
    folder(tmp_path, "val", each=3)
    got, info = datasets.load(config(tmp_path), 0), datasets.inspect(config(tmp_path), 0)
    assert (len(got.train), len(got.validation), got.test) == (20, 6, None)
    assert info == datasets.DataInfo(20, 16, True, (26, 3, 16, 16))


@pytest.mark.parametrize("splits", [(), ("train",)])
def test_without_holdout_validation_and_test_there_is_nothing_to_measure_by(tmp_path, splits):
    folder(tmp_path, *splits, each=4)
    with pytest.raises(
        ConfigError, match=r"^evaluation\.holdout: got 0, expected more, as imagefolder in .* has no labelled"
    ):
        datasets.inspect(config(tmp_path), 0)


def test_torchvision_sets_train_on_all_their_images_without_a_holdout(shared_data):
    fashion = DataConfig(name="fashion-mnist", root=str(shared_data))
    info, got = datasets.inspect(fashion, 0), datasets.load(fashion, 0)
    assert info == datasets.DataInfo(60000, 28, True, (70000, 1, 28, 28))
    assert (len(got.train), got.validation, len(got.test)) == (60000, None, 10000)


def test_torchvision_sets_need_their_test_files_without_a_holdout(tmp_path):
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "train").touch()
    assert datasets.inspect(DataConfig(name="cifar100", root=str(tmp_path)), 0.1).train_size == 45000
    with pytest.raises(ConfigError, match=r"^data\.root: no test in .*cifar-100-python"):
        datasets.inspect(DataConfig(name="cifar100", root=str(tmp_path)), 0)


def test_a_folder_without_classes_is_unlabelled(tmp_path):
    for i in range(7):
        draw(tmp_path / f"{i}.png")
    got = datasets.load(config(tmp_path), 0.2)
    assert (got.train.images.shape, got.train.labels, got.validation) == ((7, 3, 16, 16), None, None)
    assert datasets.inspect(config(tmp_path), 0.2) == datasets.DataInfo(7, 16, False, (7, 3, 16, 16))


@pytest.mark.parametrize("sizes", [[(16, 16), (20, 30)], [(120, 120)], [(100, 90)]])
def test_large_and_unequal_pictures_become_squares_with_a_margin(tmp_path, sizes):
    for i, size in enumerate(sizes * 3):
        draw(tmp_path / "ant" / f"{i}.png", size)
    assert datasets.load(config(tmp_path), 0.2).train.images.shape[1:] == (3, 19, 19)  # 1.15 x 16
    info = datasets.inspect(config(tmp_path), 0.2)
    assert info.image_size == 224 and info.shape[1:] == (3, 19, 19)
    assert info.bytes == 3 * 19 * 19 * len(sizes * 3)


def test_a_square_is_the_centre_of_the_picture_with_its_short_side_whole(tmp_path):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 200  # the central square
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    draw(tmp_path / "other.png")
    squares = datasets.load(config(tmp_path), 0.2).train.images[1:]
    assert squares.shape == (1, 3, 19, 19)
    assert (squares[:, :, :, 1:-1] == 200).all()
    assert (squares[:, :, :, [0, -1]] >= 100).all()


@pytest.mark.parametrize("held_out", [False, True])
def test_one_late_picture_of_another_size_makes_all_squares(tmp_path, held_out):
    folder(tmp_path, classes=("ant",), each=200)
    files, labels = folders.scan(str(tmp_path))[0]["train"].files, np.zeros(200, np.int64)
    probed, held = (set(images.choose(labels, 200, count).tolist()) for count in (decoding.PROBED, 80))
    late = sorted((held if held_out else set(range(200)) - held) - probed)[0]
    draw(Path(files[late]), (20, 24))
    assert datasets.inspect(config(tmp_path), 0.4).image_size == 16
    got = datasets.load(config(tmp_path), 0.4)
    assert got.train.images.shape == (120, 3, 19, 19)
    assert got.validation.images.shape == (80, 3, 19, 19)


def test_gray_and_turned_pictures_are_taken_as_they_are_stored(tmp_path):
    turned = Image.fromarray(np.arange(768, dtype=np.uint32).astype(np.uint8).reshape(16, 16, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to show": torchvision's readers do not, and neither do we
    turned.save(tmp_path / "b.png", exif=exif)
    draw(tmp_path / "a.png", colour=77)
    gray, coloured = datasets.load(config(tmp_path), 0.1).train.images
    assert (gray == 77).all()
    assert np.array_equal(coloured, np.asarray(turned).transpose(2, 0, 1))


def test_gray_pictures_of_16_bits_keep_their_shades(tmp_path):
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257).save(tmp_path / "a.png")
    (image,) = datasets.load(config(tmp_path), 0.1).train.images
    assert np.array_equal(image[0], np.arange(256).reshape(16, 16))


def test_missing_and_empty_folders_are_refused_by_path(tmp_path):
    check_refused(tmp_path / "none", tmp_path / "none", "No such file")
    check_refused(draw(tmp_path / "file.png"), tmp_path / "file.png", "Not a directory")
    (tmp_path / "empty").mkdir()
    check_refused(tmp_path / "empty", tmp_path / "empty", "no images")
    folder(tmp_path / "some")
    (tmp_path / "some" / "cow").mkdir()
    check_refused(tmp_path / "some", tmp_path / "some" / "cow", "no images")
    folder(tmp_path / "split", "train", "val")
    (tmp_path / "split" / "val" / "bee").rename(tmp_path / "split" / "val" / "ant" / "bee")
    check_refused(tmp_path / "split", tmp_path / "split" / "val", "differ", "bee")


@pytest.mark.parametrize("content", [b"", b"no image", None], ids=["empty", "text", "cut short"])
def test_a_corrupt_file_is_named_before_the_start_or_where_it_is_met(tmp_path, content):
    folder(tmp_path, classes=("ant",), each=70)
    files = folders.scan(str(tmp_path))[0]["train"].files
    probed = images.choose(np.zeros(70, np.int64), 70, decoding.PROBED).tolist()
    late = sorted(set(range(70)) - set(probed))[0]
    whole = Path(files[late]).read_bytes()
    bad = whole[: len(whole) // 2] if content is None else content
    Path(files[late]).write_bytes(bad)
    assert datasets.inspect(config(tmp_path), 0.1).train_size == 63
    with pytest.raises(images.DataError, match=f"^{files[late]} "):
        datasets.load(config(tmp_path), 0.1)
    Path(files[probed[0]]).write_bytes(bad)
    check_refused(tmp_path, files[probed[0]], "cannot be decoded")


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


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """Forty images in the files that torchvision reads, which is told the checksums of these."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 3072), np.uint8)
    entry = {"data": pixels, "fine_labels": [i % 4 for i in range(40)], "coarse_labels": [9] * 40}
    contents = {"train": entry, "test": entry, "meta": {"fine_label_names": ["ant", "bee", "cow", "dog"]}}
    (tmp_path / "cifar-100-python").mkdir()
    sums = {}
    for name, content in contents.items():
        (tmp_path / "cifar-100-python" / name).write_bytes(raw := pickle.dumps(content))
        sums[name] = hashlib.md5(raw).hexdigest()
    for split in ("train", "test"):
        monkeypatch.setattr(CIFAR100, f"{split}_list", [[split, sums[split]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    return tmp_path, pixels


def test_cifar100_has_fine_labels_and_its_pixels_in_place(cifar100):
    root, pixels = cifar100
    assert datasets.inspect(config(root, "cifar100"), 0.1) == datasets.DataInfo(45000, 32, True, (50000, 3, 32, 32))
    got = datasets.load(config(root, "cifar100"), 0.2)
    assert got.classes == ("ant", "bee", "cow", "dog")
    assert np.bincount(got.train.labels).tolist() == [8] * 4
    assert np.bincount(got.validation.labels).tolist() == [2] * 4
    for part in (got.train, got.validation):  # stored as one channel after the other
        for image, label in zip(part.images, part.labels, strict=True):
            (row,) = np.flatnonzero((pixels == image.ravel()).all(1))
            assert (image.shape, row % 4) == ((3, 32, 32), label)
    assert datasets.normalization("cifar100") not in (datasets.IMAGENET, datasets.normalization("cifar10"))


def test_a_damaged_cifar100_is_noticed(cifar100):
    file = cifar100[0] / "cifar-100-python" / "train"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(images.DataError, match=r"^cifar100 in .* cannot be read"):
        datasets.load(config(cifar100[0], "cifar100"), 0.2)


def test_what_is_to_be_downloaded_need_not_be_there(tmp_path):
    given = {"data.name": "cifar100", "data.root": str(tmp_path)}
    assert datasets.inspect(cfg.build(given | {"data.download": True}).data, 0.1).train_size == 45000
    with pytest.raises(ConfigError, match=r"no train in .*cifar-100-python"):
        datasets.inspect(cfg.build(given).data, 0.1)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist"])
@pytest.mark.parametrize("inside", ["", "cifar-10-batches-py", "cifar-100-python", "FashionMNIST/raw"])
def test_a_root_without_the_set_s_files_is_refused(tmp_path, name, inside):
    (tmp_path / inside).mkdir(parents=True, exist_ok=True)  # even the set's own folder, with nothing in it
    with pytest.raises(ConfigError, match=rf"^data\.root: .*{tmp_path}.*{name}"):
        datasets.inspect(DataConfig(name=name, root=str(tmp_path)), 0.1)


@needs_real_data
def test_fashion_mnist_is_read_and_divided():
    data = DataConfig(name="fashion-mnist", root=os.environ["ROTSSL_DATA"])
    splits = datasets.load(data, 0.1)
    assert splits.train.images.shape == (54000, 1, 28, 28)
    assert splits.validation.images.shape == (6000, 1, 28, 28)
    assert np.bincount(splits.train.labels).tolist() == [5400] * 10
    assert np.bincount(splits.validation.labels).tolist() == [600] * 10
    assert datasets.inspect(data, 0.1) == datasets.DataInfo(54000, 28, True, (60000, 1, 28, 28))
    mean, std = (part[0] for part in datasets.normalization("fashion-mnist"))
    pixels, shades = np.bincount(splits.train.images.ravel()) / splits.train.images.size, np.arange(256) / 255
    assert pixels @ shades == pytest.approx(mean, abs=0.001)
    assert np.sqrt(pixels @ (shades - mean) ** 2) == pytest.approx(std, abs=0.001)


@needs_real_data
def test_the_sample_is_made_again_byte_for_byte(tmp_path, monkeypatch):
    path = Path(__file__).parents[2] / "scripts" / "make_sample.py"
    spec = importlib.util.spec_from_file_location("make_sample", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "TARGET", tmp_path / "sample")
    script.main(REAL)
    shipped = resources.files("rotssl.data.sample")
    assert (tmp_path / "sample" / "source.json").read_text() == (shipped / "source.json").read_text()
    assert (tmp_path / "sample" / "images.npz").read_bytes() == (shipped / "images.npz").read_bytes()
