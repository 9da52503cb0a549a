"""The journal of a run: one line of JSON for the training of each epoch, and one for its evaluation. MLflow is filled from it.

A line is on disk before it is used anywhere else. In an object store each start of the run has lines of its own. The evaluation
has a separate line, because it happens after the checkpoint and may fail without losing the epoch.
"""

import json
from collections.abc import Hashable

from rotssl.base import paths
from rotssl.base.paths import AnyPath, append_line, read_lines

Points = dict[int, dict[str, float]]


class Journal:
    """The points of a run, each epoch and each of its metrics once.

    Args:
        folder: folder of the run; created if missing.
    """

    NAME = "metrics.jsonl"

    def __init__(self, folder: AnyPath) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / self.NAME
        self._points = read(folder)

    @property
    def points(self) -> Points:
        """Epoch -> metrics."""
        return self._points

    def point(self, epoch: int) -> dict[str, float] | None:
        """The metrics of an epoch (1-based), or None if it is not recorded."""
        return self._points.get(epoch)

    def last(self) -> dict[str, float]:
        """The metrics of the last epoch; empty before the first."""
        return self._points[max(self._points)] if self._points else {}

    def append(self, epoch: int, metrics: dict[str, float]) -> None:
        """Add an epoch's metrics unless the epoch is recorded already: a repeated epoch keeps its first point."""
        if epoch not in self._points:
            self.add(epoch, metrics)

    def add(self, epoch: int, metrics: dict[str, float]) -> None:
        """Add metrics to an epoch; metrics that it already has keep their first value."""
        point = self._points.get(epoch, {})
        new = {key: value for key, value in metrics.items() if key not in point}
        if not new:
            return
        append_line(self.path, json.dumps({"epoch": epoch, **new}).encode())
        self._points[epoch] = point | new


def read(folder: AnyPath) -> Points:
    """Epoch -> metrics of the run in a folder; lines that a crash cut short, or that are no metrics of an epoch, are skipped."""
    points: Points = {}
    for line in read_lines(folder / Journal.NAME):
        try:
            point = json.loads(line)
            epoch = point.pop("epoch")
            if type(epoch) is not int or epoch < 1 or not all(type(value) in (int, float) for value in point.values()):
                continue
            points[epoch] = {key: float(value) for key, value in point.items()} | points.get(epoch, {})
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError, OverflowError):
            continue
    return points


def stamp(folder: AnyPath) -> Hashable:
    """Changes whenever the journal in a folder does; None if there is none."""
    return paths.stamp(folder / Journal.NAME)


def seconds_left(points: Points, epochs: int) -> float:
    """Seconds of training until a run has so many epochs, at the mean pace so far; 0 before its first."""
    done = max(points, default=0)
    return (epochs - done) * points[done].get("cost/train_seconds", 0.0) / done if done else 0.0
