"""Data sets: the sample, torchvision's, a part of one, and what is held out."""

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
from torchvision.datasets import CIFAR100

from rotssl import config as cfg
from rotssl.config.fields import ConfigError
from rotssl.config.sections import DataConfig
from rotssl.data import datasets, images, packaged
from tests.data.pictures import config, folder, rows

REAL = Path(os.environ.get("ROTSSL_DATA", "")) / "FashionMNIST" / "raw"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="ROTSSL_DATA names no folder with FashionMNIST/raw")


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
    monkeypatch.setattr(packaged.resources, "files", lambda package: tmp_path / "sample")
    with pytest.raises(images.DataError, match=r"images\.npz"):
        datasets.load(DataConfig(), 0.1)


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
    assert "not yet decoded here" in datasets.describe_storage(disk, 0, info, here=True)
    mapped = datasets.load(disk, 0)
    assert isinstance(mapped.test.images, np.memmap) and np.array_equal(mapped.test.images, got.test.images)
    assert "already decoded here" in datasets.describe_storage(disk, 0, info, here=True)
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
    assert datasets.normalization("cifar100") not in (
        datasets.normalization("imagefolder"),
        datasets.normalization("cifar10"),
    )


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
