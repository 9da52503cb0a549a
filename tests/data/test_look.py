"""The command that looks at a folder of images."""

import numpy as np
from PIL import Image

from rotssl.data import look
from tests.data.pictures import draw, folder


def test_a_look_prints_the_line_the_classes_and_every_bad_file(tmp_path, capsys):
    folder(tmp_path / "data", classes=("ant", "bee"), each=20)
    draw(tmp_path / "data" / "cow" / "0.png", (40, 30))
    for i in range(12):
        (tmp_path / "data" / "bee" / f"bad{i}.png").write_bytes(b"")
    (tmp_path / "data" / "bee" / "x.gif").touch()
    assert look.main([str(tmp_path / "data"), "--picture", str(tmp_path / "classes.png")]) == 0
    line, *more = capsys.readouterr().out.splitlines()
    assert line == (
        "data: 41 images in 3 classes (train 37, validation 4), 16 x 16 to 40 x 30, 12 unreadable (left out), 1 skipped (.gif)"
    )
    bad = [row for row in more if row.endswith("cannot be decoded as an image (empty file)")]
    assert sorted(row.split()[0] for row in bad) == sorted(
        str(tmp_path / "data" / "bee" / f"bad{i}.png") for i in range(12)
    )
    assert [row.split() for row in more[-5:-1]] == [
        ["class", "train", "validation"],
        ["ant", "18", "2"],
        ["bee", "29", "3"],
        ["cow", "1", "0"],
    ]
    assert more[-1] == str(tmp_path / "classes.png")
    picture = np.asarray(Image.open(tmp_path / "classes.png"))
    colours = [np.asarray(Image.open(file))[0, 0] for file in (tmp_path / "data" / "ant").iterdir()]
    shown = [bool((np.abs(picture.astype(int) - colour) <= 1).all(2).any()) for colour in colours]
    assert sum(shown) >= look.ROWS


def test_a_look_at_what_cannot_be_used_is_one_line_and_its_exit_code(tmp_path, capsys):
    assert look.main([str(tmp_path / "none")]) == 2
    (tmp_path / "x.png").touch()
    assert look.main([str(tmp_path)]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert "No such file" in first and "x.png cannot be decoded as an image (empty file)" in second


def test_a_look_takes_unlabelled_images_and_other_layouts(tmp_path, capsys):
    draw(tmp_path / "a.png")
    assert look.main([str(tmp_path), "--picture", str(tmp_path / "p.png")]) == 0
    assert capsys.readouterr().out.startswith("data: 1 images, unlabelled (train 1), 16 x 16\n")
    folder(tmp_path / "d", "train", "val")
    assert look.main([str(tmp_path / "d")]) == 0
    assert "(train 10, validation 10)" in capsys.readouterr().out
