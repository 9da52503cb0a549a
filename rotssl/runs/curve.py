"""A plot of the convergence of runs."""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

from rotssl.base.paths import AnyPath, write_whole
from rotssl.runs.journal import Points


def save_convergence(curves: Mapping[str, Points], path: AnyPath, metric: str = "knn/top1", title: str = "") -> None:
    """Plot a metric against epochs and against training seconds, one line per run.

    Args:
        curves: label -> points of the run's journal.
        path: path of the PNG.
        metric: metric to plot; accuracies, whose names end with top1, are plotted in percent.
        title: title above both panels.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    factor = 100 if metric.endswith("top1") else 1
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for panel, key, label in zip(
        panels, ("cost/epochs", "cost/train_seconds"), ("epoch", "training time, s"), strict=True
    ):
        for name, points in curves.items():
            chosen: list[dict[str, Any]] = [point for point in points.values() if metric in point]
            panel.plot(
                [p[key] for p in chosen], [factor * p[metric] for p in chosen], marker="o", markersize=3.5, label=name
            )
        panel.set_xlabel(label)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel({"knn/top1": "kNN top-1 on validation, %"}.get(metric, metric))
    if curves:
        panels[0].legend(frameon=False)
    figure.suptitle(title)
    content = BytesIO()
    figure.savefig(content, dpi=150)
    plt.close(figure)
    write_whole(path, content.getvalue())
