"""Files into squares of pixels: sizes, shades, and what cannot be decoded."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rotssl.data import datasets, decoding, folders, images
from tests.data.pictures import check_refused, config, draw, folder


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
    folder(tmp_path, each=100)
    files, labels = vars(folders.scan(str(tmp_path)).splits["train"]).values()
    probed, held = set(images.choose(labels, 200, decoding.PROBED).tolist()), set(images.hold_out(labels, 0.4).tolist())
    late = sorted((held if held_out else set(range(200)) - held) - probed)[0]
    draw(Path(files[late]), (20, 24))
    assert datasets.inspect(config(tmp_path), 0.4).image_size == 16
    got = datasets.load(config(tmp_path), 0.4)
    assert got.train.images.shape == (120, 3, 19, 19)
    assert got.validation.images.shape == (80, 3, 19, 19)


@pytest.mark.parametrize("content", [b"", b"no image", None], ids=["empty", "text", "cut short"])
def test_a_corrupt_file_is_named_before_the_start_or_where_it_is_met(tmp_path, content):
    folder(tmp_path, each=35)
    files, labels = vars(folders.scan(str(tmp_path)).splits["train"]).values()
    probed = images.choose(labels, 70, decoding.PROBED).tolist()
    late = sorted(set(range(70)) - set(probed))[0]
    whole = Path(files[late]).read_bytes()
    bad = whole[: len(whole) // 2] if content is None else content
    Path(files[late]).write_bytes(bad)
    assert datasets.inspect(config(tmp_path), 0.1).train_size == 63
    with pytest.raises(images.DataError, match=f"^{files[late]} "):
        datasets.load(config(tmp_path), 0.1)
    Path(files[probed[0]]).write_bytes(bad)
    check_refused(tmp_path, files[probed[0]], "cannot be decoded")
