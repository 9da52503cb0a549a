"""Plots of a comparison: convergence against epochs, FLOPs and device time, and a heat map of final accuracy."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rotssl.reports.groups import Variant
from rotssl.reports.reach import COSTS
from rotssl.reports.tables import name_of, scale
from rotssl.tracking.reader import TrackedRun

# The palette of Okabe and Ito, which most colour-blind people can distinguish, and two more; the baseline is black.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#7F7F7F", "#6A3D9A")
_STYLES = ("-", "--", ":")
_AXES = {"epochs": "epochs", "flops": "training compute", "device_seconds": "device time"}
_DPI = 150
Curve = list[tuple[float, float, float, float]]  # cost, and mean, lowest and highest of the metric in percent


def pyplot() -> Any:
    """Matplotlib's pyplot, without a window and with the style of reports."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def curve(runs: Mapping[int, TrackedRun], cost: str, metric: str) -> Curve:
    """Mean of cost and metric over seeds, and the metric's range, at each epoch that all seeds have."""
    each = [
        {epoch: point for epoch, point in run.points.items() if metric in point and f"cost/{cost}" in point}
        for run in runs.values()
    ]
    epochs = sorted(set.intersection(*(set(points) for points in each)))
    found = []
    for epoch in epochs:
        values = [points[epoch][metric] for points in each]
        costs = [points[epoch][f"cost/{cost}"] for points in each]
        mean = 100 * (math.fsum(values) / len(each))  # the same order as in the tables, so that ties round alike
        found.append((math.fsum(costs) / len(each), mean, 100 * min(values), 100 * max(values)))
    return found


def save_curves(cells: Sequence[Variant], baselines: Iterable[str], metric: str, path: Path) -> None:
    """Plot one row of panels per budget, one panel per cost, one line per variant: the mean over seeds, their range as a band.

    If the metric was measured only at the end of runs, there is one row, whose lines join the budgets.

    Args:
        cells: cells of one family.
        baselines: variants that are baselines, drawn in black.
        metric: metric to plot, a fraction.
        path: path of the PNG.
    """
    plt = pyplot()
    styles = _styles([cell.variant for cell in cells], set(baselines))
    curves = _curves(cells, metric)
    present = {cost for lines in curves.values() for (_, cost), line in lines.items() if line}
    costs = [cost for cost in COSTS if cost in present]
    height = 2.9 * len(curves) + 0.3 + 0.22 * math.ceil(len(cells) / 3)
    shape = {"figsize": (10, height), "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, panels = plt.subplots(len(curves), len(costs), **shape)
    shade = 0.13 if len(cells) <= 6 else 0.07
    largest = {
        cost: max(line[-1][0] for lines in curves.values() for (_, c), line in lines.items() if c == cost and line)
        for cost in costs
    }
    for row, (budget, lines) in zip(panels, curves.items(), strict=True):
        for panel, cost in zip(row, costs, strict=True):
            size, unit = scale(largest[cost], cost)  # the same in all rows
            of_cost = {variant: line for (variant, other), line in lines.items() if other == cost and line}
            _draw_panel(panel, of_cost, size, styles, shade)
            if cost == "epochs":
                panel.xaxis.get_major_locator().set_params(integer=True)
            panel.set_xlabel(_AXES[cost] + ("" if cost == "epochs" else f", {unit}"))
        row[0].set_ylabel(f"{name_of(metric)}, %")
        if budget:
            row[0].set_title(f"runs of {budget} epochs", loc="left", fontweight="bold")
    handles = {label: line for row in panels for line, label in zip(*row[0].get_legend_handles_labels(), strict=True)}
    shown = [cell.variant for cell in cells]
    labels = [label for label in shown if label in handles]
    columns = 3 if max(map(len, shown)) < 45 else 2
    place = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    figure.legend([handles[label] for label in labels], labels, **place)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def _curves(cells: Sequence[Variant], metric: str) -> dict[int, dict[tuple[str, str], Curve]]:
    """Budget -> (variant, cost) -> curve; a single budget 0 if every curve is one point."""
    budgets = sorted({budget for cell in cells for budget in cell.runs})
    curves: dict[int, dict[tuple[str, str], Curve]] = {
        budget: {
            (cell.variant, cost): curve(cell.runs[budget], cost, metric)
            for cell in cells
            if budget in cell.runs
            for cost in COSTS
        }
        for budget in budgets
    }
    if any(len(line) > 1 for lines in curves.values() for line in lines.values()):
        return curves
    keys = dict.fromkeys(key for budget in budgets for key in curves[budget])
    return {0: {key: [point for budget in budgets for point in curves[budget].get(key, [])] for key in keys}}


def _draw_panel(
    panel: Any, lines: Mapping[str, Curve], size: float, styles: Mapping[str, dict[str, Any]], shade: float
) -> None:
    for variant, line in lines.items():
        at, mean, low, high = zip(*line, strict=True)
        x = [value / size for value in at]
        few = 3 if len(line) <= 25 else 0
        panel.plot(x, mean, label=variant, marker="o", markersize=few, linewidth=1.6, **styles[variant])
        panel.fill_between(x, low, high, color=styles[variant]["color"], alpha=shade, linewidth=0)
    panel.grid(alpha=0.25)


def _styles(variants: Sequence[str], baselines: set[str]) -> dict[str, dict[str, Any]]:
    styles: dict[str, dict[str, Any]] = {}
    others = [variant for variant in variants if variant not in baselines]
    for i, variant in enumerate(others):
        lap, colour = divmod(i, len(_COLOURS))
        styles[variant] = {"color": _COLOURS[colour], "linestyle": _STYLES[lap % len(_STYLES)]}
    for i, variant in enumerate(variant for variant in variants if variant in baselines):
        styles[variant] = {"color": "black", "linestyle": _STYLES[i % len(_STYLES)]}
    return styles


def save_heat_map(cells: Sequence[Variant], metric: str, path: Path) -> None:
    """Plot the mean final metric in percent, a row per family and budget, a column per variant; missing cells are hatched."""
    plt = pyplot()
    import numpy as np
    from matplotlib.patches import Rectangle

    several = len({cell.family for cell in cells}) > 1
    columns = list(dict.fromkeys(cell.variant for cell in sorted(cells, key=lambda cell: (cell.weights, cell.variant))))
    rows = [
        (family, budget)
        for family in dict.fromkeys(cell.family for cell in cells)
        for budget in sorted({b for cell in cells if cell.family == family for b in cell.runs})
    ]
    table = np.full((len(rows), len(columns)), np.nan)
    for cell in cells:
        for budget, runs in cell.runs.items():
            line = curve(runs, "epochs", metric)
            table[rows.index((cell.family, budget)), columns.index(cell.variant)] = line[-1][1]
    labels = [column.replace(", ", "\n").replace(" + ", "\n+ ").replace(" weight ", "\nweight ") for column in columns]
    widest = max(len(part) for label in labels for part in label.split("\n"))
    names = [f"{family}, {budget} epochs" if several else f"{budget} epochs" for family, budget in rows]
    width = max(0.7, 0.075 * widest + 0.15)
    lines = max(label.count("\n") + 1 for label in labels)
    left = 0.08 * max(map(len, names)) + 0.3
    figure, panel = plt.subplots(
        figsize=(max(4.5, left + width * len(columns) + 1.2), max(2.2, 0.9 + 0.42 * len(rows) + 0.16 * lines)),
        layout="constrained",
    )
    image = panel.imshow(np.ma.masked_invalid(table), cmap="cividis", aspect="auto")
    low, high = image.get_clim()
    for (i, j), value in np.ndenumerate(table):
        if np.isnan(value):
            box = Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor="white", edgecolor="0.75", hatch="///", linewidth=0)
            panel.add_patch(box)
            panel.text(j, i, "\N{EN DASH}", ha="center", va="center")
            continue
        dark = high == low or (value - low) / (high - low) < 0.6
        best = "bold" if value == np.nanmax(table[i]) else "normal"
        panel.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if dark else "black", fontweight=best)
    panel.set_xticks(range(len(columns)), labels)
    panel.set_yticks(range(len(rows)), names)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    figure.colorbar(image, ax=panel, label=f"{name_of(metric)}, %", shrink=0.9)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
