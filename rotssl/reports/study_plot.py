"""The plot of a study: our lines, and the paper's beside them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotssl.config.methods import METHODS
from rotssl.reports.paper import ALONE, PLAIN, ROTATION, Study
from rotssl.reports.plots import DPI, pyplot
from rotssl.reports.reach import last_point, mean_of
from rotssl.reports.studies import Found, Runs, label, ordered
from rotssl.reports.tables import name_of

if TYPE_CHECKING:  # it imports torch
    from rotssl.engine.signal import Signal

_STYLES = {
    PLAIN: {"color": "black"},
    ROTATION: {"color": "#D55E00"},
    ALONE: {"color": "#0072B2"},
}
_LABELS = "#009E73"
_DASHES = ("-", "--", ":", "-.")  # one per method
Spread = tuple[float, float, float]  # mean, lowest, highest, in percent


def save(found: Sequence[Found], study: Study, metric: str, path: Path) -> None:
    """Draw the means over seeds with their ranges, left, and the paper's numbers, right, over the same axis.

    Args:
        found: from ``studies.found_in``.
        study: of these.
        metric: of the last epoch, a fraction.
        path: path of the PNG.
    """
    plt = pyplot()
    ours = {
        (entry.method, entry.budget, name): {value: _spread(runs, metric) for value, runs in line.items()}
        for entry in found
        for name, line in entry.lines.items()
    }
    papers: dict[tuple[str, int | None, str], dict[object, Spread]] = {
        (method, None, name): {value: (accuracy,) * 3 for value, accuracy in line.items()}
        for method, lines in study.paper.items()
        for name, line in lines.items()
    }
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for panel, lines, title in (
        (panels[0], ours, f"here: {name_of(metric)}, range over seeds"),
        (panels[1], papers, f"the paper: {study.source}, linear"),
    ):
        slanted = _draw(panel, lines, study)
        panel.set_title(title, loc="left")
        panel.set_xlabel(study.axis if panel is panels[0] else study.paper_axis or study.axis)
        panel.grid(alpha=0.25)
        if lines:
            panel.legend(
                loc="upper center",
                bbox_to_anchor=(0.5, -0.26 if slanted else -0.15),
                ncols=3,
                frameon=False,
                fontsize=8,
            )
        else:
            panel.text(0.5, 0.5, "no such accuracy", ha="center", transform=panel.transAxes)
    panels[0].set_ylabel("accuracy, %")
    figure.suptitle(study.title, fontweight="bold")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def save_signal(points: "Sequence[tuple[int, Signal]]", title: str, path: Path) -> None:
    """Draw the SNR of each loss's gradient and the cosines of losses against the epoch; what was not seen is left out.

    Args:
        points: epoch, and what was measured after it.
        title: of the picture.
        path: path of the PNG.
    """
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for panel, kind, label_ in ((panels[0], "snr", "SNR of one batch"), (panels[1], "cosine", "cosine")):
        names = dict.fromkeys(name for _, point in points for name in getattr(point, kind))
        for name in names:
            seen = [(epoch, getattr(point, kind).get(name)) for epoch, point in points]
            kept = [(epoch, value) for epoch, value in seen if value is not None]
            if kept:
                panel.plot(*zip(*kept, strict=True), marker="o", markersize=4, label=name)
        panel.axhline(0, color="0.6", linewidth=0.8)
        panel.set_xlabel("epochs done")
        panel.set_ylabel(label_)
        panel.grid(alpha=0.25)
        if panel.lines[:-1]:
            panel.legend(frameon=False)
    figure.suptitle(f"Gradients at the encoder: {title}", fontweight="bold")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def save_histogram(overlaps: Sequence[float], masses: Sequence[float], least: float, path: Path) -> None:
    """Draw how often two crops of an image overlap how far, the bound if there is one, and what a crop shows of its saliency."""
    plt = pyplot()
    kinds = [(overlaps, "intersection over union of two crops", "pairs")]
    kinds += [(masses, "share of the image's saliency in a crop", "crops")] if masses else []
    figure, panels = plt.subplots(1, len(kinds), figsize=(6 * len(kinds), 3.4), layout="constrained", squeeze=False)
    for panel, (values, what, counted) in zip(panels[0], kinds, strict=True):
        panel.hist(values, bins=50, range=(0, 1), color="#0072B2")
        panel.set_xlabel(what)
        panel.set_ylabel(counted)
    if least:
        panels[0, 0].axvline(least, color="#D55E00", label=f"views.min_overlap {least:g}")
        panels[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _spread(runs: Runs, metric: str) -> Spread:
    values = [100 * last_point(run)[metric] for run in runs.values()]
    return mean_of(values), min(values), max(values)


def _tick(words: str) -> str:
    """A value at an axis: of a long list the first two and the last."""
    parts = words.split(", ")
    return words if len(parts) <= 4 else f"{parts[0]}, {parts[1]}, … {parts[-1]}"


def _draw(panel: Any, lines: Mapping[tuple[str, int | None, str], Mapping[object, Spread]], study: Study) -> bool:
    """Draw lines; returns whether the words of the axis are slanted."""
    values = ordered(dict.fromkeys(value for line in lines.values() for value in line), study)
    numeric = all(isinstance(value, float) for value in values)
    places = {value: value if numeric else i for i, value in enumerate(values)}
    methods = list(dict.fromkeys(method for method, _, _ in lines))
    budgets = {budget for _, budget, _ in lines}
    for (method, budget, name), line in lines.items():
        style = {**_STYLES[name], "linestyle": _DASHES[methods.index(method) % len(_DASHES)]}
        told = f"{method}, {name}"
        if method in METHODS and METHODS[method].labels:  # no line beside the others, but what labels would give
            style, told = {**style, "color": _LABELS}, method
        words = told + (f", {budget} epochs" if len(budgets) > 1 and budget is not None else "")
        if set(line) == {None}:  # the same at every value
            panel.axhline(line[None][0], label=words, linewidth=1.4, **style)
            continue
        at = [value for value in values if value in line]
        mean, low, high = zip(*(line[value] for value in at), strict=True)
        x = [places[value] for value in at]
        shape = style if numeric else {**style, "linestyle": ""}
        panel.plot(x, mean, marker="o", markersize=4, label=words, linewidth=1.6, **shape)
        panel.vlines(x, low, high, color=style["color"], linewidth=1)
    slanted: dict[str, Any] = {}
    if not numeric:
        panel.set_xlim(-0.5, len(values) - 0.5)
        ticks = [_tick(label(value, study)) for value in values]
        slanted = {"rotation": 25, "ha": "right", "fontsize": 8} if sum(map(len, ticks)) > 50 else {}
        panel.set_xticks(range(len(values)), ticks, **slanted)
    elif study.percent:
        panel.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    return bool(slanted)
