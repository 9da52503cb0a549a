"""One file into 8-bit RGB: orientation tags, depths of shades, transparency, and files that are no files."""

import os

import numpy as np
import pytest
from PIL import Image

from rotssl.config.fields import ConfigError
from rotssl.data import datasets, decoding
from rotssl.data.images import DataError
from rotssl.data.reading import read
from tests.data.pictures import config, draw

ARROW = np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8).repeat(8, 0).repeat(8, 1)
RAMP = np.tile(np.linspace(0, 1, 16), (16, 1))
SHADES = (RAMP * 255).round().astype(np.uint8)

# How a camera in each position stores an upright picture.
STORED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 3),
}


@pytest.mark.parametrize("tag", STORED)
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
def test_a_picture_with_an_orientation_tag_is_turned_upright(tmp_path, kind, tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    options = {"quality": 100, "subsampling": 0} if kind == "jpg" else {"lossless": True} if kind == "webp" else {}
    Image.fromarray(np.ascontiguousarray(STORED[tag](ARROW))).save(tmp_path / f"a.{kind}", exif=exif, **options)
    image, facts = read(str(tmp_path / f"a.{kind}"))
    assert (image.size, facts.size, facts.turned) == ((80, 48), (80, 48), tag != 1)
    assert np.abs(np.asarray(image).astype(int) - ARROW).max() <= (12 if kind == "jpg" else 0)


def test_a_damaged_or_senseless_orientation_tag_is_none(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 9
    Image.fromarray(ARROW).save(tmp_path / "a.jpg", exif=exif)
    Image.fromarray(ARROW).save(tmp_path / "b.webp", exif=b"Exif\0\0XX\0\0\0\0\0\0\0\0", lossless=True)
    for name in ("a.jpg", "b.webp"):
        image, facts = read(str(tmp_path / name))
        assert image.size == (80, 48) and not facts.turned


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_turned_pictures_are_upright_in_every_store_and_their_sizes_are_those_of_upright_ones(tmp_path, store):
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(6):
        turned = i % 2 == 1
        pixels = np.roll(ARROW, i, 1)
        path = tmp_path / "data" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rot90(pixels).copy() if turned else pixels).save(path, exif=exif if turned else None)
    data = config(tmp_path / "data", store=store, cache=str(tmp_path / "cache"))
    assert datasets.inspect(data, 0.4).shape[1:] == (3, 48, 80)  # all have one size once they are upright
    got = datasets.load(data, 0.4)
    found = {image.tobytes() for part in (got.train, got.validation) for image in part.images}
    assert found == {np.roll(ARROW, i, 1).transpose(2, 0, 1).tobytes() for i in range(6)}


def write_pgm(path, top):
    values = (RAMP * top).round().astype(">u2")
    path.write_bytes(b"P5\n16 16\n%d\n" % top + values.tobytes())


def write_tiff(path, values, bits, photometric=1, kind=1):
    """A gray TIFF by hand, of a depth that Pillow does not write."""
    tags = {256: 16, 257: 16, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: 16, 279: len(values), 339: kind}
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(
        tag.to_bytes(2, "little") + (4).to_bytes(2, "little") + (1).to_bytes(4, "little") + value.to_bytes(4, "little")
        for tag, value in (tags | {273: start}).items()
    )
    path.write_bytes(
        b"II*\0" + (8).to_bytes(4, "little") + len(tags).to_bytes(2, "little") + entries + bytes(4) + values
    )


def pack_12(values):
    pairs = values.reshape(-1, 2).astype(int)
    return np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1).astype(
        np.uint8
    )


DEEP = {
    "16-bit png": lambda path: Image.fromarray((RAMP * 65535).astype(np.uint16)).save(path, "PNG"),
    "16-bit tif": lambda path: Image.fromarray((RAMP * 65535).astype(np.uint16)).save(path, "TIFF"),
    "16-bit pgm": lambda path: write_pgm(path, 65535),
    "12-bit pgm": lambda path: write_pgm(path, 4095),
    "12-bit tif": lambda path: write_tiff(path, pack_12((RAMP * 4095).round()).tobytes(), 12),
    "16-bit tif, white is 0": lambda path: write_tiff(path, ((1 - RAMP) * 65535).astype("<u2").tobytes(), 16, 0),
    "fractions in a tif": lambda path: Image.fromarray(RAMP.astype(np.float32)).save(path, "TIFF"),
    "fractions in a pfm": lambda path: Image.fromarray(RAMP.astype(np.float32)).save(path, "PPM"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_shades_of_more_than_8_bits_are_scaled(tmp_path, kind):
    DEEP[kind](tmp_path / "a.tif")  # named by its content, not by its suffix
    image, facts = read(str(tmp_path / "a.tif"))
    assert image.mode == "RGB" and facts.deep
    assert np.abs(np.asarray(image).astype(int) - SHADES[:, :, None]).max() <= 1


UNKNOWN = {
    "32 bits": lambda path: Image.fromarray((RAMP * 65535).astype(np.int32)).save(path, "TIFF"),
    "signed 16 bits": lambda path: write_tiff(path, (RAMP * 32767).astype("<i2").tobytes(), 16, kind=2),
    "floats to 255": lambda path: Image.fromarray((RAMP * 255).astype(np.float32)).save(path, "TIFF"),
    "negative floats": lambda path: Image.fromarray((RAMP - 0.5).astype(np.float32)).save(path, "TIFF"),
    "not a number": lambda path: Image.fromarray(np.where(RAMP > 0.9, np.nan, RAMP).astype(np.float32)).save(
        path, "TIFF"
    ),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_shades_of_unknown_range_are_refused_by_name(tmp_path, kind):
    UNKNOWN[kind](tmp_path / "a.tif")
    with pytest.raises(DataError, match=rf"^{tmp_path}/a\.tif has .* whose range is unknown: .*8 or 16 bits"):
        read(str(tmp_path / "a.tif"))


def test_16_bit_shades_keep_their_upper_bits_exactly(tmp_path):
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read(str(tmp_path / "a.png"))[0])[..., 0], np.arange(256).reshape(16, 16))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pictures_are_laid_on_white(tmp_path, mode):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[4:12, 4:12, 3] = 255  # a black square on nothing
    image = Image.fromarray(pixels)
    (image.quantize(4) if mode == "P" else image.convert(mode)).save(tmp_path / "a.png")
    image, facts = read(str(tmp_path / "a.png"))
    assert facts.transparent
    assert np.array_equal(np.asarray(image), np.where(pixels[..., 3:] == 255, 0, 255).repeat(3, 2))
    opaque = draw(tmp_path / "b.png", colour=(10, 20, 30))
    Image.open(opaque).convert("RGBA").save(opaque)
    image, facts = read(str(opaque))
    assert not facts.transparent and (np.asarray(image) == (10, 20, 30)).all()


def test_a_pipe_is_no_image_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"x\.png cannot be decoded as an image \(empty file\)"):
        read(str(tmp_path / "x.png"))


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_all_bad_files_are_listed_at_once_or_left_out(tmp_path, store, monkeypatch):
    monkeypatch.setattr(decoding, "BLOCK_BYTES", 7 * 768)
    pixels = np.random.default_rng(1).integers(0, 256, (40, 16, 16, 3), np.uint8)
    for i in range(40):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i]).save(path)
    bad = [tmp_path / "data" / "ab"[i % 2] / f"{i}.png" for i in (0, 7, 39)]
    for path, content in zip(bad, (b"", b"no image", bad[2].read_bytes()[:300]), strict=True):
        path.write_bytes(content)
    data = config(tmp_path / "data", store=store, cache=str(tmp_path / "cache"))
    found = datasets._scan(data)[0]
    for attempt in (lambda: datasets.inspect(data, 0.2), lambda: datasets._read(data, [found["train"]], (16, 16))):
        with pytest.raises(
            (ConfigError, DataError), match=r"; mend or remove them, or .* data\.on_bad skip$"
        ) as caught:
            attempt()
        for path, cause in zip(bad, ("empty file", "no known image format", "image file is truncated"), strict=True):
            assert f"{path} cannot be decoded as an image ({cause})" in str(caught.value)
    skipping = config(tmp_path / "data", store=store, cache=str(tmp_path / "cache"), on_bad="skip")
    for _ in range(2):  # decoded, and found in the store
        got = datasets.load(skipping, 0.2)
        found = [
            (i.tobytes(), label)
            for p in (got.train, got.validation)
            for i, label in zip(p.images, p.labels, strict=True)
        ]
        assert sorted(found) == sorted(
            (pixels[i].transpose(2, 0, 1).tobytes(), i % 2) for i in range(40) if i not in (0, 7, 39)
        )
    with pytest.raises(DataError, match=r"39\.png .*data\.on_bad skip"):
        datasets._read(data, datasets._files(skipping, 0.2)[0], (16, 16))
