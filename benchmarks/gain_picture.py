"""The picture of a final stage of gain.py: accuracy against training seconds."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gain_plan import PLAIN, Results, Row

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#6A3D9A")


def curve(row: Row, results: Results, metric: str = "knn/top1") -> list[tuple[float, float]]:
    """Training seconds and accuracy in percent after each epoch that all runs of a row have, means over the runs."""
    runs = [
        content["points"] for content in map(results.read, row.cells) if content is not None and not content["error"]
    ]
    measured = [{epoch for epoch, point in points.items() if metric in point} for points in runs]
    epochs = sorted(set.intersection(*measured)) if measured else []
    return [
        (
            statistics.mean(points[epoch]["cost/train_seconds"] for points in runs),
            100 * statistics.mean(points[epoch][metric] for points in runs),
        )
        for epoch in epochs
    ]


def draw(rows: Sequence[Row], results: Results, path: Path) -> None:
    """Draw a panel per data set and method, with a line per form."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    sets = list(dict.fromkeys(row.candidate.data for row in rows))
    methods = list(dict.fromkeys(row.candidate.method for row in rows))
    wide = min(5, len(methods))
    deep = -(-len(methods) // wide)
    shape = {"figsize": (3 * wide + 0.3, 2.6 * deep * len(sets) + 0.4), "squeeze": False, "layout": "constrained"}
    figure, panels = plt.subplots(deep * len(sets), wide, **shape)
    labels = list(dict.fromkeys(row.candidate.label for row in rows if row.candidate.form != PLAIN))
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    handles: dict[str, Any] = {}
    for panel in panels.flat:
        panel.set_visible(False)
    for row in rows:
        found = curve(row, results)
        if not found:
            continue
        across, down = methods.index(row.candidate.method) % wide, methods.index(row.candidate.method) // wide
        panel = panels[sets.index(row.candidate.data) * deep + down][across]
        panel.set_visible(True)
        panel.set_title(f"{row.candidate.method}, {row.candidate.data}", fontsize=9)
        panel.set_xlabel("training time, s", fontsize=8)
        panel.set_ylabel("kNN top-1, %", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25)
        label = row.candidate.label
        (handles[label],) = panel.plot(
            *zip(*found, strict=True), color=colours.get(label, "black"), linewidth=1.4, marker="o", markersize=2
        )
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
