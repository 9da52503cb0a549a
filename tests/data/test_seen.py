"""What is said about the data: the line, and the warnings."""

import numpy as np
import pytest
from PIL import Image

from rotssl.config.sections import DataConfig
from rotssl.data import datasets, likeness, look
from rotssl.data.images import DataError
from rotssl.data.seen import listing
from tests.data.pictures import config


def noise(path, seed, size=(16, 20), top=256, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, top, (size[1], size[0], options.pop("channels", 3)), np.uint8)
    Image.fromarray(pixels).save(path, **options)


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_the_line_has_sizes_and_counts_also_from_a_finished_store(tmp_path, monkeypatch, store):
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(20):
        noise(tmp_path / "data" / "ab"[i % 2] / f"{i}.png", i, (40, 30) if i == 3 else (16, 20))
    noise(tmp_path / "data" / "a" / "turned.png", 30, (64, 48), exif=exif)
    noise(tmp_path / "data" / "b" / "clear.png", 31, channels=4)
    (tmp_path / "data" / "b" / "x.gif").touch()
    (tmp_path / "data" / "b" / "bad.png").touch()
    data = config(tmp_path / "data", store=store, cache=str(tmp_path / "cache"), on_bad="skip")
    for _ in range(2):
        line, *warnings = datasets.load(data, 0.2).lines
        assert line == (
            "data: 22 images in 2 classes (train 17, validation 5), 16 x 20 to 48 x 64, 1 with an orientation tag "
            "(turned upright), 1 transparent (on white), 1 unreadable (left out), 1 skipped (.gif)"
        )
        (warning,) = warnings
        assert warning == f"warning: left out: {tmp_path}/data/b/bad.png cannot be decoded as an image (empty file)"
    monkeypatch.setattr(datasets, "PACK_BYTES", 1)
    assert "jobs/pack.py keeps the files instead" in datasets.load(data, 0.2).lines[-1]


def test_sets_that_are_not_in_files_are_described_too():
    assert datasets.load(DataConfig(), 0.1).lines == (
        "data: 6,000 images in 10 classes (train 5,000, validation 1,000), 28 x 28",
    )


@pytest.mark.parametrize("deep", [False, True])
def test_shades_squeezed_into_a_corner_are_said(tmp_path, deep):
    for i in range(8):
        noise(tmp_path / "ab"[i % 2] / f"{i}.png", i, top=256 if deep else 16)
    if deep:  # 12-bit shades in 16-bit files, among others
        pixels = np.random.default_rng(9).integers(0, 4096, (20, 16)).astype(np.uint16)
        Image.fromarray(pixels).save(tmp_path / "a" / "deep.png")
    (warning,) = datasets.load(config(tmp_path), 0.2).lines[1:]
    depth = "more than 8 bits" if deep else "8 bits"
    assert (
        warning
        == f"warning: all shades of the images of {depth} are between 0 and 15 of 255; stretch them in the files"
    )


def scene(path, seed, size=(48, 40), flip=False, dark=1.0, **options):
    """A picture of random shades that vary smoothly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shades = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    picture = Image.fromarray(shades).resize(size, Image.Resampling.BICUBIC)
    picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else picture
    picture.point(lambda shade: int(dark * shade)).save(path, **options)
    return path


@pytest.mark.parametrize("store", ["memory", "disk"])
@pytest.mark.parametrize("split", ["val", "test"])
def test_images_that_are_or_look_like_one_of_another_split_are_said(tmp_path, split, store, monkeypatch, capsys):
    root = tmp_path / "data"
    for i in range(12):
        scene(root / "train" / "ab"[i % 2] / f"{i}.png", i)
        Image.new("RGB", (48, 40), (i, i, i)).save(root / "train" / "ab"[i % 2] / f"even{i}.png")
    # The same pixels in another file, then another size, compression and brightness, then a mirrored one.
    same = [scene(root / split / "a" / f"same{i}.png", i, compress_level=i) for i in range(3)]
    near = [scene(root / split / "a" / "small.png", 4, (31, 26)), scene(root / split / "b" / "jpeg.jpg", 5, quality=40)]
    near.append(scene(root / split / "b" / "dark.png", 6, dark=0.6))
    scene(root / split / "b" / "mirrored.png", 7, flip=True)
    for i in range(5):
        scene(root / split / "a" / f"other{i}.png", 100 + i)
    Image.new("RGB", (48, 40), (99, 99, 99)).save(root / split / "a" / "even.png")
    name = {"val": "validation", "test": "test"}[split]
    told = "(python -m rotssl.data.look names them)"
    data = config(root, store=store, cache=str(tmp_path / "cache"))
    # One image of another size makes all of its split squares: then the test split has no pixels of train.
    first = [f"warning: images of {name} that are also in train (identical pixels): 3"] if split == "val" else []
    count = 3 if split == "val" else 6
    for _ in range(2):
        lines = datasets.load(data, 0).lines[1:]
        assert list(lines) == [*first, f"warning: images of {name} that look like one in train: {count} {told}"]
    monkeypatch.setattr(likeness, "PAIRS", 24 * 5)  # of five of the others, of which two are in train
    lines, count = datasets.load(data, 0).lines[1:], 1 if split == "val" else 2
    assert list(lines) == [
        *first,
        f"warning: images of {name} that look like one in train: {count} of 5 compared {told}",
    ]
    assert look.main([str(root), "--holdout", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"warning: images of {name} that are also in train, or look like one there: 6" in lines
    for file, i in zip(same + near, (0, 1, 2, 4, 5, 6), strict=True):
        words = "has the pixels of" if file in same else "looks like"
        assert f"{file} {words} {root}/train/{'ab'[i % 2]}/{i}.png" in lines


def test_even_images_look_like_none_and_pairs_are_compared_in_blocks(monkeypatch):
    monkeypatch.setattr(likeness, "BLOCK", 3)
    gen = np.random.default_rng(0)
    even = [np.full((3, side, side), gen.integers(0, 256, (3, 1, 1)), np.uint8) for side in [259] * 10 + [129] * 10]
    asked = []
    for first, second in (
        (even[:10], even[10:]),
        (pictures := list(gen.integers(0, 256, (8, 3, 20, 20), np.uint8)), pictures),
    ):
        sums = [
            np.array(
                [(n, n + offset, *likeness.look(Image.fromarray(x.transpose(1, 2, 0)))) for n, x in enumerate(part)],
                np.uint64,
            )
            for part, offset in ((first, 0), (second, 100))
        ]

        def pixels(theirs, ours, first=first, second=second):
            asked.append(len(theirs))
            return np.stack([second[i] for i in theirs]), np.stack([first[i] for i in ours])

        found = likeness.twins(*sums, pixels, 10**6)
        assert len(found.same) == 0 and len(found.near) == (8 if first is pictures else 0)
    assert asked == [3, 3, 3, 1, 3, 3, 2]


def test_a_train_split_that_cannot_be_read_is_refused_and_looked_at(tmp_path, capsys):
    for split in ("train", "val"):
        for i in range(2):
            path = tmp_path / split / "ab"[i] / f"{i}.png"
            noise(path, i)
            path.write_bytes(b"" if split == "train" else path.read_bytes())
    with pytest.raises(DataError, match=r"^no image of train can be read: .*/train/a/0\.png cannot be decoded"):
        datasets.load(config(tmp_path, on_bad="skip"), 0.2)
    assert look.main([str(tmp_path)]) == 0
    assert "(train 0, validation 2)" in capsys.readouterr().out


def test_a_long_list_of_bad_files_ends_with_a_count():
    text = listing([[f"{i}.png", "is bad"] for i in range(13)])
    assert (
        text.startswith("0.png is bad; 1.png is bad; ")
        and "9.png is bad; and 3 more (" in text
        and "10.png" not in text
    )
