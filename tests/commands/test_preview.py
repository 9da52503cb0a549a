"""The picture of a recipe's views."""

import numpy as np
import pytest
import torch
from PIL import Image

from rotssl.commands.preview import preview
from rotssl.config.fields import ConfigError
from rotssl.data.views_grid import save_views

WHITE = 255
SMOKE = ["--smoke", "--data.image_size", "32", "--views.size_start", "none", "--rotation.conditioned", "false"]


def test_grid_has_a_row_an_image_a_column_a_version_and_small_views_in_the_middle(tmp_path):
    shade = torch.tensor([0.0, 0.4, 0.8])
    big = shade.view(3, 1, 1, 1).expand(3, 3, 100, 100)
    small = torch.cat([big[:, :, :20, :20], big[:, :, :20, :20] + 0.1])  # two versions
    save_views({"global": [big], "turned": [small]}, (0.0,), (1.0,), tmp_path / "a.png", rows=2)
    grid = np.asarray(Image.open(tmp_path / "a.png"))[16:]
    assert grid.shape == (2 * 102, 3 * 102, 3)  # below the names; a border of one pixel around each
    for row, value in enumerate((0.0, 0.4)):
        for column, expected in enumerate((value, value, value + 0.1)):
            cell = grid[row * 102 : (row + 1) * 102, column * 102 : (column + 1) * 102, 0]
            assert abs(int(cell[51, 51]) - 255 * expected) <= 1
            inside = (cell != WHITE).sum()
            assert inside == (100**2 if column == 0 else 20**2)


@pytest.mark.contract
@pytest.mark.parametrize(
    ("flags", "columns"),
    [
        (["--rotation.weight", "0"], 2),
        ([], 4),
        (["--rotation.fraction_end", "0.125"], 4),
        (["--rotation.mode", "extra"], 4),
        (["--rotation.mode", "four_way"], 6),
        (["--rotation.mode", "disjoint"], 4),
        (["--rotation.weight", "0", "--equivariance.weight", "1"], 4),
        (["--views.local_count", "3", "--method.name", "swav", "--rotation.weight", "1"], 10),
        (
            ["--jigsaw.weight", "1", "--jigsaw.grid", "2", "--jigsaw.permutations", "9"],
            8,
        ),
        (["--rotation.mode", "extra", "--rotation.fraction", "0.5"], 2),
        (["--method.name", "mocov2"], 4),
    ],
)
def test_preview_shows_every_kind_of_view(tmp_path, capsys, flags, columns):
    assert preview([*SMOKE, *flags, "--output", str(tmp_path / "views.png")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "views.png")
    width, height = Image.open(tmp_path / "views.png").size
    assert (width, height) == (columns * 34 * 3, 8 * 34 * 3 + 16)


@pytest.mark.contract
def test_preview_shows_the_small_views_of_the_first_step(tmp_path):
    file = tmp_path / "views.png"
    assert preview([*SMOKE, "--views.size_start", "16", "--rotation.mode", "four_way", "--output", str(file)]) == 0
    assert Image.open(file).size == (6 * 18 * 6, 8 * 18 * 6 + 16)


@pytest.mark.parametrize(
    ("output", "why"),
    [
        (["none/views.png"], "cannot write .*No such file"),
        (["views.xyz"], "ends in .png"),
        (["."], "ends in .png"),
        ([], "got nothing, expected a file name"),
    ],
)
def test_preview_says_where_it_cannot_write(tmp_path, monkeypatch, output, why):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"--output: .*{why}"):
        preview([*SMOKE, "--output", *output])
