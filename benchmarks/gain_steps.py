"""Seconds of a step of each form over plain's, and the epochs that follow from them at equal compute."""

import datetime
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import commit, machine, trainer
from gain_cells import PRECISION, TURNED, data_fields

CHEAP = 1.05  # a step up to so many times as long, or as short, counts as equal
EPOCHS, STEPS = 6, 2  # steps in the middle of each of so many epochs, since forms may change over a run
IMAGES = 5000
# Fields that do not change what a step computes: forms that differ in nothing else are timed once.
FREE = ("optim.lr", "rotation.weight", "method.momentum", "method.momentum_end", "evaluation.knn_every")

Fields = Mapping[str, Any]


def length(epochs: int, ratio: float) -> int:
    """Epochs that take as long as so many plain ones, with steps of ``ratio`` plain steps."""
    return epochs if 1 / CHEAP <= ratio <= CHEAP else max(1, round(epochs / ratio))


class Steps:
    """The measured ratios, in a file.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = self._read()

    def _read(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.path.read_text()) if self.path.exists() else []
        return found

    @staticmethod
    def key(data: str, method: str, fields: Fields) -> tuple[str, str, dict[str, Any]]:
        """What the seconds of a step depend on."""
        return data.removesuffix(TURNED), method, {key: v for key, v in fields.items() if key not in FREE}

    def find(self, data: str, method: str, fields: Fields) -> dict[str, Any] | None:
        """The entry of a form with these fields, its method's among them."""
        wanted = self.key(data, method, fields)
        return next((e for e in self.entries if (e["data"], e["method"], e["fields"]) == wanted), None)

    def add(self, entries: Sequence[dict[str, Any]]) -> None:
        """Add entries, in place of older ones of the same key."""
        self.entries = self._read()  # which another process may have added to
        for new in entries:
            wanted = new["data"], new["method"], new["fields"]
            self.entries = [e for e in self.entries if (e["data"], e["method"], e["fields"]) != wanted]
            self.entries.append(new)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.entries, indent=1) + "\n")
        part.rename(self.path)


def measure(
    data: str, method: str, plain: Fields, forms: Mapping[str, Fields], work: Path, common: Fields, rounds: int
) -> list[dict[str, Any]]:
    """Time forms, interleaved in rotated order: of each position in the run the median of the paired ratios, of these the mean.

    Args:
        data: the data set.
        method: the method.
        plain: fields of the plain run.
        forms: label -> fields, the method's among them.
        work: folder for the images.
        common: fields of all runs.
        rounds: times that each step is timed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        engines = []
        for i, fields in enumerate((plain, *map(_dense, forms.values()))):
            values = {
                "model.norm": "batch",
                "train.precision": PRECISION,
                **data_fields(data, False, work),
                "data.limit": IMAGES,
                **common,
                "method.name": method,
                **fields,
                "train.epochs": EPOCHS,
                "tracking.run_name": str(i),
                "storage.path": scratch,
            }
            engine = trainer(values)
            engine.parallel.train()
            first = max(0, (engine.steps_per_epoch - STEPS) // 2)
            parts = (itertools.islice(engine.batches(epoch), first, first + STEPS) for epoch in range(EPOCHS))
            engines.append((engine, list(itertools.chain.from_iterable(parts))))
        taken = _seconds(engines, rounds)
    about = {"machine": machine(), "precision": PRECISION, "date": str(datetime.date.today()), "commit": commit()}
    entries = []
    for (form, fields), own in zip(forms.items(), taken[1:], strict=True):
        every = next((value for key, value in fields.items() if key.endswith(".every")), 1)
        ratios = [
            1 + (statistics.median(a / b for a, b in zip(ours, theirs, strict=True)) - 1) / every
            for ours, theirs in zip(own, taken[0], strict=True)
        ]
        name, _, kept = Steps.key(data, method, fields)
        entry = {"data": name, "method": method, "form": form, "fields": kept}
        numbers = {"ratio": statistics.mean(ratios), "lowest": min(ratios), "highest": max(ratios)}
        numbers["plain_seconds"] = statistics.median(itertools.chain.from_iterable(taken[0]))
        entries.append(entry | {key: round(value, 4) for key, value in numbers.items()} | about)
    return entries


def _dense(fields: Fields) -> Fields:
    """The fields with the task in every step: those in which it is left out are plain ones."""
    return {key: value for key, value in fields.items() if not key.endswith(".every")}


def _seconds(engines: Sequence[tuple[Any, Sequence[Any]]], rounds: int) -> list[list[list[float]]]:
    """Engine -> position -> seconds of a step in each round."""
    positions = range(len(engines[0][1]))
    taken: list[list[list[float]]] = [[[] for _ in positions] for _ in engines]
    for r in range(rounds + 1):  # the first is not counted
        for p in positions:
            for k in range(len(engines)):
                i = (k + r + p) % len(engines)
                engine, batches = engines[i]
                started = time.perf_counter()
                engine.step(*batches[p])
                if r:
                    taken[i][p].append(time.perf_counter() - started)
    return taken
