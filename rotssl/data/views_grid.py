"""A picture of the views that the model sees."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from rotssl.base.paths import AnyPath, write_whole

if TYPE_CHECKING:
    from torch import Tensor


def save_views(
    views: "Mapping[str, Sequence[Tensor]]", mean: Sequence[float], std: Sequence[float], path: AnyPath, rows: int = 8
) -> None:
    """Save a grid with one row per image and one column per view, magnified without smoothing; smaller views are centred.

    Args:
        views: name -> normalised views of that kind, each (B, 3, S, S), or (k x B, 3, S, S) for k versions in blocks of B rows.
            The first view determines B.
        mean: channel means that were subtracted.
        std: channel standard deviations that were divided by.
        path: path of the PNG.
        rows: number of images to show.
    """
    everything = [(name, view) for name, group in views.items() for view in group]
    count, side = len(everything[0][1]), max(view.shape[-1] for _, view in everything)
    columns, names = [], []
    for name, view in everything:
        for version in view.detach().split(count):
            pixels = version[:rows].float().cpu().numpy() * np.reshape(std, (-1, 1, 1)) + np.reshape(mean, (-1, 1, 1))
            before = (side - pixels.shape[-1]) // 2
            pad = (before + 1, side - pixels.shape[-1] - before + 1)
            columns.append(np.pad(pixels.clip(0, 1), ((0, 0), (0, 0), pad, pad), constant_values=1.0))
            names.append(name)
    stack = np.stack(columns, axis=1)  # (rows, columns, 3, S, S)
    shown, cell = len(stack), side + 2
    grid = (stack.transpose(0, 3, 1, 4, 2).reshape(shown * cell, len(columns) * cell, 3) * 255).astype(np.uint8)
    scale, head = max(1, 100 // side), 16
    pixels = Image.fromarray(grid).resize((grid.shape[1] * scale, grid.shape[0] * scale), Image.Resampling.NEAREST)
    picture = Image.new("RGB", (pixels.width, pixels.height + head), "white")
    picture.paste(pixels, (0, head))
    for i, name in enumerate(names):
        ImageDraw.Draw(picture).text((i * cell * scale + 2, 2), name, fill="black")
    content = BytesIO()
    picture.save(content, "PNG")
    write_whole(path, content.getvalue())
