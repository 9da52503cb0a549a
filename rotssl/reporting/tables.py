"""Tables for the terminal."""

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from rotssl.journal import Points

_ROWS = (
    ("kNN top-1 on {split}", "knn/top1", "{:.1%}"),
    ("linear probe top-1 on {split}", "linear/top1", "{:.1%}"),
    ("loss, method", "loss/ssl", "{:.4f}"),
    ("loss, rotation", "loss/rotation", "{:.4f}"),
    ("rotation accuracy (training views)", "rotation/accuracy", "{:.1%}"),
    ("rotation's gradient over the method's, norms", "rotation/grad_ratio", "{:.3g}"),
    ("cosine between the two", "rotation/grad_cosine", "{:.3f}"),
    ("loss, jigsaw", "loss/jigsaw", "{:.4f}"),
    ("jigsaw accuracy (training views)", "jigsaw/accuracy", "{:.1%}"),
    ("jigsaw's gradient over the method's, norms", "jigsaw/grad_ratio", "{:.3g}"),
    ("cosine between the two", "jigsaw/grad_cosine", "{:.3f}"),
    ("feature spread (1 = even, 0 = collapsed)", "feature/std", "{:.2f}"),
    ("effective rank of features", "feature/effective_rank", "{:.1f}"),
    ("training time", "cost/train_seconds", "{:.1f} s"),
    ("device time", "cost/device_seconds", "{:.1f} s"),
    ("training compute", "cost/flops", "{:.3g} FLOPs"),
    ("throughput", "throughput/images_per_second", "{:.0f} images/s"),
)


def show(table: Table) -> None:
    """Print to stdout, at a fixed width where that is no terminal."""
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = 110
    console.print(table)


def result(name: str, points: Points) -> Table:
    """The last epoch of a run."""
    return measures(f"{name}, epoch {max(points)}", points[max(points)])


def measures(title: str, last: Mapping[str, float], split: str = "validation") -> Table:
    """Metrics by their names in words, measured on a split."""
    table = Table(title=title, title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for label, key, form in _ROWS:
        if key in last:
            table.add_row(label.format(split=split), form.format(last[key]))
    return table


def convergence(title: str, names: Sequence[str], curves: Sequence[Points], metric: str = "knn/top1") -> Table:
    """A metric of several runs, epoch by epoch."""
    table = Table(title=title, title_justify="left")
    table.add_column("epoch", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for epoch in sorted(set().union(*curves)):
        cells = [f"{points[epoch][metric]:.1%}" if metric in points.get(epoch, {}) else "" for points in curves]
        table.add_row(str(epoch), *cells)
    return table
