"""Where progress is shown: in a terminal, in a log, or in a notebook, whose red error stream is for errors."""

import html
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:  # a program that fails at once need not import it
    from rich.console import Console
    from rich.progress import Progress, TaskID

WIDTH = 110  # of texts where no terminal has one
_EVERY_S = 0.2  # between two drawings of a notebook's bar


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    if "IPython" not in sys.modules:
        return False
    from rich.console import Console

    return Console().is_jupyter


def stream() -> TextIO:
    """Where lines that are not a result go: stderr, in a notebook stdout."""
    return sys.stdout if in_notebook() else sys.stderr


def progress_console() -> "Console":
    """A console for lines about progress."""
    from rich.console import Console

    if in_notebook():  # as text: rich would make a block of HTML of every line
        return Console(file=sys.stdout, force_jupyter=False, highlight=False, soft_wrap=True, width=WIDTH)
    return Console(stderr=True, highlight=False, soft_wrap=True)


class NotebookBar:
    """A progress bar of a notebook's cell, which vanishes at its end; takes the calls that rich's bar takes."""

    def __init__(self, unit: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.unit, self.clock = unit, clock
        self.description, self.total, self.completed = "", 0.0, 0.0
        self._place: Any = None
        self._drawn = -_EVERY_S

    def start(self) -> None:
        """Show it."""
        from IPython.display import display

        self._place = display(self, display_id=True)

    def stop(self) -> None:
        """Remove it."""
        from IPython.display import HTML

        if self._place is not None:
            self._place.update(HTML(""))
            self._place = None

    def add_task(self, description: str, total: float | None = None, completed: float = 0) -> "TaskID":
        """Set what is shown; there is one task."""
        self.description, self.total, self.completed = description, total or 0.0, completed
        return 0  # type: ignore[return-value]  # a NewType of rich

    def update(self, task: "TaskID", **values: Any) -> None:
        """Set ``description``, ``total`` or ``completed``."""
        vars(self).update(values)
        if self._place is not None and self.clock() - self._drawn >= _EVERY_S:
            self._drawn = self.clock()
            self._place.update(self)

    def advance(self, task: "TaskID", count: float) -> None:
        """Add to what is completed."""
        self.update(task, completed=self.completed + count)

    def __repr__(self) -> str:
        return f"{self.description} {self.completed:g}/{self.total:g} {self.unit}"

    def _repr_html_(self) -> str:
        share = f' value="{self.completed:g}" max="{self.total:g}"' if self.total else ""
        return (
            f"<div>{html.escape(self.description)} <progress{share}></progress> "
            f"{self.completed:g}/{self.total:g} {html.escape(self.unit)}</div>"
        )


def bar(console: "Console", unit: str) -> "Progress | NotebookBar":
    """A bar that counts units; hidden where there is neither a terminal nor a notebook."""
    if in_notebook():
        return NotebookBar(unit)
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    counted = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit)
    return Progress(*counted, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
