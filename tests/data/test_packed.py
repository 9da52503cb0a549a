"""Packed sets as runs read them: crops of whole pictures, the order, shards from another place, and splits."""

import dataclasses
import itertools
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import v2 as T
from torchvision.transforms.v2 import functional as tvf

from rotssl.base import rng
from rotssl.base.place import Folder, Objects
from rotssl.config.fields import ConfigError
from rotssl.config.views import ViewsConfig
from rotssl.data import datasets, packed_sets, shards
from rotssl.data.augment import Augment, Crop
from rotssl.data.crops import draw_crops
from rotssl.data.images import DataError
from rotssl.data.packed import Manifest
from rotssl.data.packed_images import PackedImages
from rotssl.data.reading import digest, read
from rotssl.data.shards import Shards
from tests.data.pictures import config
from tests.data.views import step_at
from tests.packing.sets import packed, picture, pictures
from tests.small_runs import make_config, trainer

BUSY = ViewsConfig(blur=(1.0, 0.5), solarize=(0.0, 0.5), local_count=1, local_size=12, flip=0.5)


def opened(folder, split="train", side=32, interpolation="bilinear", **options):
    manifest = Manifest.read(Folder(folder))
    own = Shards(Folder(folder), manifest.splits[split], folder / "none", **options)
    return PackedImages(own, np.load(folder / f"{split}.npy"), side, interpolation)


@pytest.fixture
def made(tmp_path):
    packed(pictures(tmp_path / "source"), tmp_path / "set")
    return tmp_path


def by_digest(source):
    return {digest(path.read_bytes()): path for path in source.rglob("*.jpg")}


def test_pictures_are_upright_whatever_their_orientation(made):
    images, files = opened(made / "set"), by_digest(made / "source")
    seen = set()
    for i, row in enumerate(images.rows):
        expected, _ = read(str(files[row["checksum"]]))
        assert np.array_equal(np.asarray(images.picture(i)), np.asarray(expected))
        assert images.picture(i).shape == (row["height"], row["width"], 3)
        seen.add(int(row["orientation"]))
    assert seen == set(range(1, 9))


XMP = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="3"/>'
BYTE = b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 1, 1, 3, 0)  # the tag in one byte, not in two


@pytest.mark.parametrize(("options", "orientation"), [({"xmp": XMP}, 3), ({"exif": BYTE}, 1)])
def test_the_orientation_is_the_index_s_whatever_a_decoder_believes(tmp_path, options, orientation):
    for name in ("a", "b"):
        picture(tmp_path / "source" / "train" / "c" / f"{name}.jpg", 40, 30, **options, quality=90)
    packed(tmp_path / "source", tmp_path / "set")
    images, expected = opened(tmp_path / "set"), read(str(tmp_path / "source" / "train" / "c" / "a.jpg"))[0]
    assert images.rows["orientation"].tolist() == [orientation] * 2
    assert np.array_equal(images.picture(0), np.asarray(expected))


def test_a_picture_that_is_not_as_large_as_the_index_says_is_named(made):
    images = opened(made / "set")
    images.rows.setflags(write=True)
    images.rows["width"][0] += 1
    with pytest.raises(DataError, match=r"^train-00000.tar, at \d+: has \d+ x \d+ pixels, the index says \d+ x \d+$"):
        images.picture(0)


@pytest.mark.parametrize(
    ("interpolation", "count"),
    [
        ("bicubic", 40),
        pytest.param("bilinear", 1000, marks=pytest.mark.exhaustive),
        pytest.param("bicubic", 1000, marks=pytest.mark.exhaustive),
    ],
)
def test_crops_are_torchvision_s_of_whole_pictures(tmp_path, interpolation, count):
    sides = np.random.default_rng(0).integers(8, 260, (count, 2)).tolist()
    for i, (width, height) in enumerate([*sides, (400, 9), (9, 400)]):  # which no crop fits
        picture(tmp_path / "source" / "train" / f"{i % 2}" / f"{i}.jpg", width, height, i, i % 9 or 1, quality=90)
    packed(tmp_path / "source", tmp_path / "set", per_shard=100)
    images, files = opened(tmp_path / "set", interpolation=interpolation), by_digest(tmp_path / "source")
    augment = Augment(BUSY, 32, (0.5,) * 3, (0.5,) * 3, 0, {"puzzle": Crop(24, (0.3, 0.9))})
    index = np.arange(len(images))
    cuts = augment.cuts(step_at(positions=index), *images.sizes(index))
    assert [cut.size for cut in cuts] == [32, 32, 12, 24] and any(cut.flipped.any() for cut in cuts)
    pixels = np.split(images.cuts(index, cuts), np.cumsum([3 * cut.size**2 for cut in cuts])[:-1], axis=1)
    mode = T.InterpolationMode(interpolation)
    for cut, own in zip(cuts, pixels, strict=True):
        for i, row in enumerate(images.rows):
            upright, _ = read(str(files[row["checksum"]]))
            boxes = cut.boxes
            box = boxes.top[i], boxes.left[i], boxes.height[i], boxes.width[i]
            ours = own[i].reshape(cut.size, cut.size, 3)
            for whole, most in ((tvf.pil_to_tensor(upright), 0), (upright, 2)):  # Pillow rounds otherwise
                expected = tvf.resized_crop(whole, *map(int, box), [cut.size, cut.size], mode, antialias=True)
                expected = tvf.horizontal_flip(expected) if cut.flipped[i] else expected
                theirs = np.asarray(expected) if whole is upright else expected.permute(1, 2, 0).numpy()
                assert np.abs(ours.astype(int) - theirs).max() <= most, (i, row)


class Given:
    """torch's random numbers, as torchvision asks for them: area and ratio of each try, top and left of the one that fits."""

    def __init__(self, draws):
        self.tries, self.asked, self.places = iter(draws.T), itertools.count(), iter((2, 3))

    def uniform_(self, low, high):
        which = next(self.asked) % 2
        self.now = self.now if which else next(self.tries)
        return low + (high - low) * torch.tensor(self.now[which], dtype=torch.float64)

    def randint(self, low, high, size):
        return torch.tensor([int(np.floor(self.now[next(self.places)] * high))])


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.05, 0.14)])
def test_boxes_are_those_of_torchvision_for_the_same_draws(monkeypatch, scale):
    count, log = 500, torch.log
    sizes = np.random.default_rng(1).integers(5, 700, (2, count))
    crops = draw_crops(7, np.arange(count), *sizes, scale)
    draws = rng.uniform(7, np.arange(count), 40).reshape(count, 4, 10)
    for i, (height, width) in enumerate(sizes.T.tolist()):
        given, image = Given(draws[i]), torch.empty(1, height, width)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", lambda *_, given=given: given)
            patch.setattr(torch, "randint", given.randint)
            patch.setattr(torch, "log", lambda x: log(x.double()))
            box = RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3])
        assert box == (crops.top[i], crops.left[i], crops.height[i], crops.width[i]), i


def test_evaluation_sees_torchvision_s_middle_of_a_resized_picture(made):
    images, files = opened(made / "set", side=56), by_digest(made / "source")
    official = T.Compose([T.Resize(64, antialias=True), T.CenterCrop(56)])
    for i, row in enumerate(images.rows):
        upright, _ = read(str(files[row["checksum"]]))
        assert np.array_equal(images[i : i + 1][0], official(tvf.pil_to_tensor(upright)).numpy())
    assert images.shape == (16, 3, 56, 56)
    index = np.array([3, 0, 7])
    assert np.array_equal(images.subset(index)[:], images[index])


def views_of(folder, rank=0, workers=1, steps=3):
    """Digests of each image's views in the first steps, as a worker sees them."""
    fields = {"data.name": "packed", "data.root": str(folder), "data.image_size": 32, "train.batch_size": 8}
    run = make_config(folder / "run", "simclr", **fields, **{"scaling.num_workers": workers, "data.limit": None})
    splits = datasets.load(run.data, 0.0)
    from rotssl.data.loader import Loader

    augment = Augment(run.views, 32, (0.5,) * 3, (0.5,) * 3, 0)
    loader = Loader(run, splits.train.images, torch.device("cpu"), rank, workers, augment)
    found = []
    for images, ctx in itertools.islice(loader.batches(0), steps):
        made = augment(images, ctx)
        found.append([hash(tuple(view[i].numpy().tobytes() for view in made.full)) for i in range(len(images))])
    return found


def test_two_workers_see_the_pictures_of_one_in_the_same_order(tmp_path):
    packed(pictures(tmp_path / "source", each=16), tmp_path / "set")
    alone = views_of(tmp_path / "set")
    first, second = (views_of(tmp_path / "set", rank, 2) for rank in (0, 1))
    assert alone == [a + b for a, b in zip(first, second, strict=True)] == views_of(tmp_path / "set")
    assert len({view for step in alone for view in step}) == 3 * 8


def test_views_of_cut_pictures_are_coloured_as_those_of_whole_images(made):
    images = opened(made / "set")
    index, augment = np.arange(12), Augment(BUSY, 32, (0.4,) * 3, (0.2,) * 3, 0)
    ctx = step_at(positions=index)
    cut = torch.from_numpy(images.cuts(index, augment.cuts(ctx, *images.sizes(index))))
    sorted_ = augment(cut, ctx)
    from rotssl.data import augment as module

    augment.masked = module.masked_view, module.masked_cut
    for ours, theirs in zip(
        sorted_.full + sorted_.local, augment(cut, ctx).full + augment(cut, ctx).local, strict=True
    ):
        assert torch.equal(ours, theirs)
    # The whole picture as the crop, uncoloured, is the picture.
    plain = dataclasses.replace(
        BUSY, jitter_p=0.0, grayscale=0.0, blur=(0.0,), solarize=(0.0,), flip=0.0, local_count=0
    )
    bare = Augment(plain, 32, (0.4,) * 3, (0.2,) * 3, 0)
    cuts = bare.cuts(ctx, *images.sizes(index))
    seen = bare(torch.from_numpy(images.cuts(index, cuts)), ctx).full[0]
    expected = torch.from_numpy(images.cuts(index, cuts[:1])).view(-1, 32, 32, 3).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(seen, (expected - 0.4) / 0.2)


def test_a_run_trains_from_a_packed_set_and_goes_on_bit_for_bit(tmp_path):
    packed(pictures(tmp_path / "source", each=16), tmp_path / "set")
    fields = {"data.name": "packed", "data.root": str(tmp_path / "set"), "data.image_size": 32, "data.limit": None}
    fields |= {"train.batch_size": 8, "train.epochs": 2, "optim.warmup_epochs": 0}
    weights = {}
    for name, stops in (("whole", [None]), ("halves", [1, None])):
        for stop in stops:
            run_config = make_config(tmp_path / name, "byol", **fields, **{"train.stop_after": stop})
            run = trainer(run_config, datasets.load(run_config.data, 0.1))
            run.run()
        weights[name] = run.model.state_dict()
        assert {"knn/top1", "linear/top1"} <= run.journal.point(2).keys()
    for key, value in weights["whole"].items():
        assert torch.equal(value, weights["halves"][key]), key


@pytest.mark.parametrize("splits", [("train",), ("train", "val"), ("train", "test")])
def test_the_splits_of_a_run(tmp_path, splits):
    packed(pictures(tmp_path / "source", splits=splits), tmp_path / "set")
    asked = config(tmp_path / "set", name="packed", image_size=32, store="disk")
    info, got = datasets.inspect(asked, 0.25), datasets.load(asked, 0.25)
    held = 16 if "val" in splits else 4
    assert (len(got.train), len(got.validation), got.test) == (16 if "val" in splits else 12, held, None)
    assert info == datasets.DataInfo(len(got.train), 224, True, (len(got.train) + held, 3, 32, 32))
    assert "packed, identity" in got.lines[0] and got.classes == ("bee", "wasp")
    few = datasets.load(dataclasses.replace(asked, limit=6), 0.25)
    assert np.bincount(few.train.labels).tolist() == [3, 3] and len(few.validation) == held
    if "val" in splits:
        return
    assert set(got.train.images.rows["checksum"]).isdisjoint(got.validation.images.rows["checksum"])
    if "test" in splits:
        assert len(datasets.load(asked, 0.0).test) == len(datasets.load_test(asked)) == 16
    else:
        for refused in (lambda: datasets.inspect(asked, 0.0), lambda: datasets.load_test(asked)):
            with pytest.raises(ConfigError, match="no labelled test split"):
                refused()


def test_small_images_of_one_size_are_decoded_into_memory(tmp_path):
    for i in range(12):
        picture(tmp_path / "source" / "train" / f"{i % 2}" / f"{i}.png", 20, 16, i)
    packed(tmp_path / "source", tmp_path / "set")
    asked = config(tmp_path / "set", name="packed", image_size="auto")
    info = datasets.inspect(asked, 0.25)
    assert info.shape == (12, 3, 16, 20) and info.image_size == 16 and datasets.where(asked, info.bytes) == "memory"
    images = datasets.load(config(tmp_path / "set", name="packed", image_size=16), 0.25).train.images
    assert isinstance(images, np.ndarray) and images.shape == (9, 3, 16, 20)
    known = {np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes() for path in (tmp_path / "source").rglob("*.png")}
    assert {image.tobytes() for image in images} <= known


def test_what_is_no_packed_set_is_refused_in_a_line(tmp_path):
    for root, words in ((tmp_path / "none", "no packed set"), ("ftp://host/set", "ftp://host/set")):
        with pytest.raises(ConfigError, match=words):
            datasets.inspect(config(root, name="packed"), 0.1)


class Elsewhere(Objects):
    """An object store that fails for a while, and counts what is fetched."""

    def __init__(self, folder, failures=0):
        from pyarrow import fs

        super().__init__(fs.LocalFileSystem(), str(folder))
        self.failures, self.fetched = failures, []

    def fetch(self, name, file):
        if self.failures:
            self.failures -= 1
            file.write_bytes(b"half")
            raise OSError("connection refused")
        self.fetched.append(name)
        super().fetch(name, file)


def elsewhere(folder, cache, place, limit=None, say=lambda line: None):
    manifest = Manifest.read(place)
    own = Shards(place, manifest.splits["train"], cache, limit, say)
    return PackedImages(own, packed_sets.rows(place, manifest, "train"), 32)


def test_shards_from_an_object_store_are_fetched_once_and_kept(made):
    near, place = opened(made / "set"), Elsewhere(made / "set")
    far = elsewhere(made, made / "cache", place)
    assert np.array_equal(far[:], near[:]) and np.array_equal(far[:], near[:])
    assert sorted(place.fetched) == sorted(shard.file for shard in far.shards.split.shards)
    again = elsewhere(made, made / "cache", place)
    assert np.array_equal(again[:], near[:]) and len(place.fetched) == 4
    assert not list((made / "cache").glob("*.part"))


def test_what_does_not_fit_into_the_cache_is_read_picture_by_picture(made):
    sizes = [shard.bytes for shard in Manifest.read(Folder(made / "set")).splits["train"].shards]
    place = Elsewhere(made / "set")
    far, near = elsewhere(made, made / "cache", place, sum(sizes[:2])), opened(made / "set")
    with ThreadPoolExecutor(8) as pool:  # which is more than there are cores
        found = list(pool.map(lambda i: far[i : i + 1], [*range(16)] * 3))
    for i, image in enumerate(found):
        assert np.array_equal(image[0], near[i % 16 : i % 16 + 1][0])
    assert sorted(place.fetched) == [shard.file for shard in far.shards.split.shards[:2]]
    assert sum(path.stat().st_size for path in (made / "cache").glob("*.tar")) == sum(sizes[:2])
    assert far.shards.room == 0


def test_a_store_that_fails_is_asked_again_and_a_wrong_shard_is_not_taken(made, monkeypatch):
    now, said = [1.0], []
    clock = SimpleNamespace(monotonic=lambda: now[0], time=lambda: 0.0)
    monkeypatch.setattr(shards, "time", clock)
    monkeypatch.setattr(shards.Event, "wait", lambda self, seconds: now.__setitem__(0, now[0] + seconds))
    far = elsewhere(made, made / "cache", Elsewhere(made / "set", failures=3), say=said.append)
    assert np.array_equal(far[:1], opened(made / "set")[:1])
    assert len(said) == 3 and "connection refused" in said[0] and now[0] == 1 + 1 + 2 + 4
    wrong = next((made / "set").glob("train-*.tar"))
    wrong.write_bytes(wrong.read_bytes()[:700] + b"?" + wrong.read_bytes()[701:])
    with pytest.raises(DataError, match="checksum"):
        elsewhere(made, made / "other", Elsewhere(made / "set"))[:]
    assert now[0] > shards.RETRY_S


def test_a_store_that_refuses_is_not_asked_again(made):
    place = Elsewhere(made / "set")
    place.part = lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    with pytest.raises(DataError, match=r"train-\d+\.tar cannot be read .*Permission denied"):
        elsewhere(made, made / "cache", place, 1)[:1]


def test_a_damaged_or_missing_shard_is_named(made):
    images = opened(made / "set")
    file = made / "set" / images.shards.split.shards[0].file
    whole = file.read_bytes()
    start = int(images.rows[0]["offset"])
    file.write_bytes(whole[: start + 30] + bytes(200) + whole[start + 230 :])
    with pytest.raises(DataError, match=f"{file.name}, at {start}"):
        opened(made / "set").picture(0)
    file.write_bytes(whole[:start])
    with pytest.raises(DataError, match="ends before an image does"):
        opened(made / "set").picture(0)
    os.unlink(file)
    with pytest.raises(DataError, match=str(Path(file))):
        opened(made / "set").picture(0)
