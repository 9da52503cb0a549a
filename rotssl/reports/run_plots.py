"""Pictures of one run for its page, each drawn twice: for light and for dark paper."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from rotssl.reports.plots import pyplot
from rotssl.runs.journal import Points

if TYPE_CHECKING:  # it imports torch
    from rotssl.explain.run import Map

_INKS = {"light": "#1c1c1e", "dark": "#e8e8ea"}
# Okabe and Ito's colours that can be told from both papers, and three more; others are grey.
_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#9B6A5B", "#8E7CC3", "#8DB600", "#E1477E"),
)
_GREY = "#8a8a8f"
_DPI = 150
_TILE = 96  # pixels of a picture's side on the page

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Drawing:
    """A picture for each paper as a data URI, with its width on the page in pixels."""

    light: str
    dark: str
    width: int


def _drawn(draw: Callable[[Any], Any]) -> Drawing:
    """Draw a figure by a function of pyplot, in the ink of each paper and without a background."""
    plt = pyplot()
    found, width = {}, 0
    for paper, ink in _INKS.items():
        names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor")
        with plt.rc_context(dict.fromkeys(names, ink)):
            figure = draw(plt)
            content = BytesIO()
            figure.savefig(content, dpi=_DPI, transparent=True)
            width = round(figure.get_figwidth() * 96)
            plt.close(figure)
        found[paper] = _uri(content.getvalue())
    return Drawing(found["light"], found["dark"], width)


def _uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def curves(points: Points) -> Drawing:
    """Losses, accuracies and the rank of the features against epochs, those that the run has."""
    wanted = (
        ("loss", 1, (("loss/total", "total"), ("loss/ssl", "method"), ("loss/rotation", "rotation"))),
        ("accuracy, %", 100, (("knn/top1", "kNN, validation"), ("rotation/accuracy", "rotation, training views"))),
        ("effective rank", 1, (("feature/effective_rank", "effective rank"),)),
    )
    panels = [
        (label, factor, [(key, name) for key, name in lines if any(key in point for point in points.values())])
        for label, factor, lines in wanted
    ]
    panels = [panel for panel in panels if panel[2]]

    def draw(plt: Any) -> Any:
        figure, axes = plt.subplots(1, len(panels), figsize=(10, 2.9), squeeze=False, layout="constrained")
        for axis, (label, factor, lines) in zip(axes[0], panels, strict=True):
            for i, (key, name) in enumerate(lines):
                known = [(epoch, factor * point[key]) for epoch, point in sorted(points.items()) if key in point]
                few = 3.5 if len(known) <= 25 else 0
                axis.plot(*zip(*known, strict=True), color=_COLOURS[i], marker="o", markersize=few, label=name)
            axis.set_xlabel("epoch")
            axis.set_ylabel(label)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(color=_GREY, alpha=0.25)
            if len(lines) > 1:
                axis.legend(frameon=False)
        return figure

    return _drawn(draw)


def scatter(found: "Map", labels: npt.NDArray[np.int64] | None, classes: Sequence[str]) -> Drawing:
    """Pictures in the plane, coloured by class; of more than ten classes the largest ten."""
    shown: list[int] = []
    if labels is not None:
        kinds, counts = np.unique(labels, return_counts=True)
        shown = sorted(kinds[np.argsort(-counts, kind="stable")][: len(_COLOURS)].tolist())

    def draw(plt: Any) -> Any:
        figure, axis = plt.subplots(figsize=(7.6, 5), layout="constrained")
        rest = np.ones(len(found.places), bool) if labels is None else ~np.isin(labels, shown)
        size = 14 if len(found.places) <= 2500 else 6
        style = {"s": size, "linewidths": 0, "alpha": 0.75}
        if rest.any():
            axis.scatter(*found.places[rest].T, color=_GREY, label="others" if shown else None, **style)
        for colour, kind in zip(_COLOURS, shown, strict=False):
            axis.scatter(*found.places[labels == kind].T, color=colour, label=classes[kind], **style)
        axis.set_aspect("equal", "datalim")
        shares = [f", {100 * share:.0f}% of the variance" for share in found.shares or ()] or ["", ""]
        axis.set_xlabel(f"{found.kind} 1{shares[0]}")
        axis.set_ylabel(f"{found.kind} 2{shares[1]}")
        axis.set_xticks([])
        axis.set_yticks([])
        if shown:
            axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, markerscale=1.8)
        return figure

    return _drawn(draw)


def tile(picture: Pixels) -> str:
    """A picture (C, H, W) as a data URI; small ones are magnified without smoothing."""
    return _uri(_png(_square(picture)))


def heated(picture: Pixels, heat: npt.NDArray[np.float32]) -> str:
    """A picture (C, H, W) in grey with a map (S, S) from 0 to 1 over it, as a data URI."""
    grey = np.asarray(_square(picture).convert("L"), dtype=np.float32)[..., None] / 255
    size = Image.fromarray((heat * 255).astype(np.uint8)).resize((_TILE, _TILE), Image.Resampling.BILINEAR)
    share = np.asarray(size, dtype=np.float32)[..., None] / 255
    colour = pyplot().get_cmap("inferno")(share[..., 0])[..., :3]
    mixed = (1 - 0.8 * share) * (0.15 + 0.6 * grey) + 0.8 * share * colour
    return _uri(_png(Image.fromarray((mixed.clip(0, 1) * 255).astype(np.uint8))))


def _square(picture: Pixels) -> Image.Image:
    pixels = picture.transpose(1, 2, 0)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")
    how = Image.Resampling.NEAREST if max(image.size) < _TILE else Image.Resampling.LANCZOS
    return image.resize((_TILE, _TILE), how)


def _png(image: Image.Image) -> bytes:
    content = BytesIO()
    image.save(content, "PNG", optimize=True)
    return content.getvalue()
