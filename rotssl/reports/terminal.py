"""Tables for the terminal."""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Literal

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table as RichTable

from rotssl.base.show import WIDTH
from rotssl.config.tasks import TASKS
from rotssl.runs.journal import Points

if TYPE_CHECKING:  # with it come numpy and scipy
    from rotssl.reports.tables import Table

_WORDS = re.compile(r"[a-z]+ [a-z]+ [a-z]+")
_ROWS = (
    ("kNN top-1 on {split}", "knn/top1", "{:.1%}"),
    ("linear probe top-1 on {split}", "linear/top1", "{:.1%}"),
    ("kNN top-1 on test", "test/knn/top1", "{:.1%}"),
    ("linear probe top-1 on test", "test/linear/top1", "{:.1%}"),
    ("loss, method", "loss/ssl", "{:.4f}"),
    *(
        (label.format(task), key.format(task), form)
        for task in TASKS
        for label, key, form in (
            ("loss, {}", "loss/{}", "{:.4f}"),
            ("{} accuracy (training views)", "{}/accuracy", "{:.1%}"),
            ("{} cosine (training views)", "{}/similarity", "{:.3f}"),
            ("{} gradient norm / method's", "{}/grad_ratio", "{:.3g}"),
            ("cosine of the two gradients", "{}/grad_cosine", "{:.3f}"),
        )
    ),
    ("feature spread (1 = even, 0 = collapsed)", "feature/std", "{:.2f}"),
    ("effective rank of features", "feature/effective_rank", "{:.1f}"),
    ("training time", "cost/train_seconds", "{:.1f} s"),
    ("device time", "cost/device_seconds", "{:.1f} s"),
    ("training compute", "cost/flops", "{:.3g} FLOPs"),
    ("throughput", "throughput/images_per_second", "{:.0f} images/s"),
)


_silent = ContextVar("silent", default=False)


@contextmanager
def silent() -> Iterator[None]:
    """Within the body, ``show`` prints nothing: whoever called has the result as an object."""
    before = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(before)


def show(*parts: RenderableType) -> None:
    """Print tables and texts to stdout, at a fixed width if stdout is not a terminal."""
    if _silent.get():
        return
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    for part in parts:
        console.print(part)


def result(name: str, points: Points) -> RichTable:
    """A table of the metrics of a run's last epoch."""
    return measures(f"{name}, epoch {max(points)}", points[max(points)])


def measures(
    title: str, last: Mapping[str, float], split: str = "validation", more: Iterable[tuple[str, str]] = ()
) -> RichTable:
    """A table of metrics measured on a split, with readable names, and more rows of names and values."""
    table = RichTable(title=title, title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for label, key, form in _ROWS:
        if key in last:
            table.add_row(label.format(split=split), form.format(last[key]))
    for label, value in more:
        table.add_row(escape(label), value)
    return table


def convergence(title: str, names: Sequence[str], curves: Sequence[Points], metric: str = "knn/top1") -> RichTable:
    """A table of one metric of several runs, epoch by epoch."""
    table = RichTable(title=title, title_justify="left")
    table.add_column("epoch", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for epoch in sorted(set().union(*curves)):
        cells = [f"{points[epoch][metric]:.1%}" if metric in points.get(epoch, {}) else "" for points in curves]
        table.add_row(str(epoch), *cells)
    return table


def rich_table(table: "Table") -> RichTable:
    """A table of a comparison for the terminal; names from MLflow are shown literally, including brackets."""
    made = RichTable(
        title=f"\n{table.title}\n[not bold]{escape(table.caption)}[/]",
        title_justify="left",
        title_style="bold",
        show_lines=True,
    )
    for i, header in enumerate(table.headers):
        # If space is short, wrap words rather than numbers, and keep names legible.
        name = i < table.names
        keeps = not name and not any(_WORDS.search(row[i]) for row in table.rows)
        width = min(10, max(len(row[i]) for row in table.rows)) if name else None
        justify: Literal["left", "right"] = "left" if name else "right"
        made.add_column(escape(header), justify=justify, no_wrap=keeps, overflow="fold", min_width=width)
    for row in table.rows:
        made.add_row(*map(escape, row))
    return made
