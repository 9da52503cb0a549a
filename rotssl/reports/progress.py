"""Progress of a run: one line per epoch, and a bar in a terminal or a notebook."""

import time
from collections.abc import Mapping
from types import TracebackType

from rotssl.base import show
from rotssl.engine.events import Alert, EpochDone, Event, Note, StepDone


def epoch_line(epoch: int, epochs: int, metrics: Mapping[str, float], left: float) -> str:
    """One line about an epoch (1-based): losses, accuracies of the tasks, kNN, images per second, time left."""
    parts = [
        f"epoch {epoch:>{len(str(epochs))}}/{epochs}",
        f"loss {metrics['loss/total']:.3f}",
        f"ssl {metrics['loss/ssl']:.3f}",
    ]
    for task in (key.removesuffix("/accuracy") for key in metrics if key.endswith("/accuracy")):
        parts.append(f"{task} {metrics[f'loss/{task}']:.3f} (accuracy {metrics[f'{task}/accuracy']:.1%})")
    for key, name in (("knn/top1", "kNN"), ("test/knn/top1", "kNN on test")):
        if key in metrics:
            parts.append(f"{name} {metrics[key]:.1%}")
    parts.append(f"{metrics['throughput/images_per_second']:.0f} images/s")
    minutes, seconds = divmod(round(left), 60)
    parts.append(f"{minutes}:{seconds:02d} left")
    return "  ".join(parts)


class ProgressView:
    """Renders the events of a run to stderr, in a notebook to its cell; a context manager.

    Args:
        epochs: number of epochs of the whole run.
        name: name shown beside the bar.
    """

    def __init__(self, epochs: int, name: str) -> None:
        self.epochs = epochs
        self.console = show.progress_console()
        self.bar = show.bar(self.console, "steps")
        self.task = self.bar.add_task(f"{name}: starting workers", total=None)
        self.name = name
        self.first: tuple[float, int] | None = None

    def __enter__(self) -> "ProgressView":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def handle(self, event: Event) -> None:
        """Show an event of the engine, if it is meant for display."""
        match event:
            case Alert(text):
                self.console.print(f"warning: {text}", markup=False)
            case Note(text):
                self.console.print(text, markup=False)
            case StepDone(epoch, step, total):
                self._advance(epoch, step, total)
            case EpochDone(epoch, step, total, metrics):
                left = self._advance(epoch, step, total)
                self.console.print(epoch_line(epoch, self.epochs, metrics, left))

    def _advance(self, epoch: int, step: int, total: int) -> float:
        """Move the bar; returns the seconds left."""
        now = time.monotonic()
        if self.first is None or step < self.first[1]:
            self.first = (now, step - 1)
        description = f"{self.name}: epoch {epoch}/{self.epochs}"
        self.bar.update(self.task, description=description, total=total, completed=step)
        began, before = self.first
        return (now - began) / max(1, step - before) * (total - step)
