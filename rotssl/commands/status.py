"""The runs below a storage path: how far they are, how fast, and whether somebody works on them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rotssl.base.paths import AnyPath, folders
from rotssl.commands import EXIT_OK, folder_of
from rotssl.config.fields import ConfigError
from rotssl.runs import alive, journal

STALE = "stale"


@dataclass(frozen=True)
class Status:
    """A run.

    Attributes:
        experiment: the name of its experiment.
        run: its name.
        state: as in run.json; ``stale``: it should be running, and nobody has worked on it for a minute.
        epoch: number of epochs done.
        epochs: number of all its epochs.
        images_per_second: of the last epoch; None before the first.
        seconds_left: of training, at the mean pace of the epochs so far; None before the first, or if nothing is left.
        silent_seconds: since the last sign of life; None if the run is not running.
        knn: accuracy of the last evaluation, from 0 to 1; None if there was none.
        reason: why it is in its state.
    """

    experiment: str
    run: str
    state: str
    epoch: int
    epochs: int
    images_per_second: float | None
    seconds_left: float | None
    silent_seconds: float | None
    knn: float | None
    reason: str


def found(storage: AnyPath, experiment: str | None = None) -> Iterator[Status]:
    """The runs below a storage path, by experiment and name; folders without a readable run.json are left out.

    Raises:
        ConfigError: there is no such folder.
    """
    if not storage.is_dir():
        raise ConfigError(f"{storage}: no such folder; give the storage.path of the runs")
    for folder in (run for group in folders(storage) for run in folders(group)):
        try:
            record = json.loads((folder / "run.json").read_text())
            config = record["config"]
            status = _status(folder, record, config)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if experiment in (None, status.experiment):
            yield status


def _status(folder: AnyPath, record: Mapping[str, Any], config: Mapping[str, Any]) -> Status:
    points = journal.read(folder)
    epoch, epochs = max(points, default=0), int(config["train.epochs"])
    last = points.get(epoch, {})
    state, silent = str(record["status"]), None
    if state == "running":
        silent = alive.silent_for(folder)
        state = STALE if silent is None or silent > alive.STALE_S else state
    accuracies = [points[e]["knn/top1"] for e in sorted(points) if "knn/top1" in points[e]]
    ended = state == "finished" or epoch == 0
    return Status(
        experiment=folder.parent.name,
        run=folder.name,
        state=state,
        epoch=epoch,
        epochs=epochs,
        images_per_second=last.get("throughput/images_per_second"),
        seconds_left=None if ended else journal.seconds_left(points, epochs),
        silent_seconds=silent,
        knn=accuracies[-1] if accuracies else None,
        reason=str(record.get("reason", "")),
    )


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds; empty for None."""
    if seconds is None:
        return ""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def show(runs: list[Status]) -> None:
    """Print a table of runs."""
    from rich.table import Table

    from rotssl.reports import terminal

    table = Table()
    for name in ("experiment", "run", "state"):
        table.add_column(name, overflow="fold")
    for name in ("epoch", "images/s", "left", "last sign", "kNN"):
        table.add_column(name, justify="right")
    for each in runs:
        rate = "" if each.images_per_second is None else f"{each.images_per_second:,.0f}"
        sign = "" if each.silent_seconds is None else f"{duration(each.silent_seconds)} ago"
        knn = "" if each.knn is None else f"{each.knn:.1%}"
        epoch = f"{each.epoch}/{each.epochs}"
        table.add_row(each.experiment, each.run, each.state, epoch, rate, duration(each.seconds_left), sign, knn)
    terminal.show(table)


def status(storage: str, experiment: str | None, as_json: bool) -> int:
    """Print the runs below a storage path, as a table or as lines of JSON; returns the exit code.

    Raises:
        ConfigError: there is no such folder.
    """
    runs = list(found(folder_of("PATH", storage), experiment))
    if as_json:
        for each in runs:
            print(json.dumps(asdict(each)))
    elif runs:
        show(runs)
    else:
        print(f"no runs below {storage}")
    return EXIT_OK
