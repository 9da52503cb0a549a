"""The queue of gpu.py and what is known of its cells: the file with its rules, and the results, one line a cell and try."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

# What the cells of a kind take. `images` is for miniatures, which see few of CIFAR-10's.
KINDS: dict[str, set[str]] = {
    "pytest": {"paths", "options"},
    "ray": {"epochs", "fields"},
    "speed": {"batch", "encoder", "steps", "rounds", "images"},
    "profile": {"batch", "encoder", "steps", "form", "images"},
    "lightly": {"batch", "encoder", "steps", "rounds", "images"},
    "levers": {"batch", "encoder", "steps", "rounds", "levers", "images"},
    "decode": {"images", "steps", "rounds"},
    "equal_minutes": {"minutes", "seeds", "arms", "fields", "warmup_share", "images"},
    "train": {"recipe", "fields", "paper", "images"},
}
# What may be missing, and the modules that show whether it is.
NEEDS = {
    "ray": ("pandas", "pyarrow", "ray", "ray.train"),
    "lightly": ("lightly",),
    "decode": ("torchcodec.decoders",),
}
SLACK_S = 60  # that a cell may take beyond twice its estimate: imports, the first use of a GPU


class Refused(Exception):
    """What was asked for cannot be done; the text is the one line to print."""


@dataclass(frozen=True)
class Cell:
    """An entry of the queue.

    Attributes:
        name: unique.
        kind: one of KINDS.
        minutes: estimate, on an H100; in miniature, on two cores.
        answers: the question.
        args: of its kind.
        needs: packages that may be missing.
        least: minutes in which a cell that can go on later gets somewhere; None: it runs as a whole.
    """

    name: str
    kind: str
    minutes: float
    answers: str
    args: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    least: float | None = None

    def fits(self, seconds: float) -> bool:
        """Whether so many seconds are enough for it."""
        return 60 * (self.minutes if self.least is None else self.least) <= seconds

    def limit(self, seconds: float) -> float:
        """Seconds that it gets of those that are left."""
        return seconds if self.least is not None else min(seconds, 2 * 60 * self.minutes + SLACK_S)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


# What each field of an entry has to be, in words and as a test.
FIELDS: dict[str, tuple[str, Any]] = {
    "name": ("letters, digits and dashes", lambda v: isinstance(v, str) and re.fullmatch(r"[a-z0-9-]+", v)),
    "kind": (f"one of {', '.join(KINDS)}", lambda v: isinstance(v, str) and v in KINDS),
    "minutes": ("a number above 0", _positive),
    "answers": ("a sentence", lambda v: isinstance(v, str) and v.strip()),
    "smoke": (
        "minutes above 0, and perhaps args",
        lambda v: isinstance(v, dict) and {"minutes"} <= v.keys() <= {"minutes", "args"} and _positive(v["minutes"]),
    ),
    "args": ("a mapping", lambda v: isinstance(v, dict)),
    "needs": (f"a list of {', '.join(NEEDS)}", lambda v: isinstance(v, list) and all(each in [*NEEDS] for each in v)),
    "least": ("a number above 0", _positive),
}
OPTIONAL = {"args", "needs", "least"}


def read_queue(path: Path, smoke: bool) -> list[Cell]:
    """The cells of a file, in miniature with ``smoke``.

    Raises:
        Refused: the file cannot be read, or is not as it should be.
    """
    try:
        entries = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise Refused(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(entries, list) or not entries:
        raise Refused(f"{path.name}: expected a list of cells")
    cells: list[Cell] = []
    for i, entry in enumerate(entries):
        place = f"{path.name}, cell {i + 1}"
        _check(place, entry)
        if entry["name"] in {cell.name for cell in cells}:
            raise Refused(f"{place}: name: {entry['name']} is there twice")
        small = entry["smoke"]
        args, minutes, least = entry.get("args", {}), entry["minutes"], entry.get("least")
        if smoke:
            args, minutes = args | small.get("args", {}), small["minutes"]
            least = None if least is None else min(least, minutes)
        whole = {key: entry[key] for key in ("name", "kind", "answers")}
        cells.append(Cell(**whole, minutes=minutes, args=args, needs=tuple(entry.get("needs", ())), least=least))
    return cells


def _check(place: str, entry: Any) -> None:
    if not isinstance(entry, dict):
        raise Refused(f"{place}: expected a mapping")
    if unknown := entry.keys() - FIELDS:
        raise Refused(f"{place}: unknown field {sorted(map(str, unknown))[0]}; there are {', '.join(FIELDS)}")
    if missing := FIELDS.keys() - OPTIONAL - entry.keys():
        raise Refused(f"{place}: {sorted(missing)[0]} is missing")
    for key, value in entry.items():
        words, holds = FIELDS[key]
        if not holds(value):
            raise Refused(f"{place}: {key}: got {value!r}, expected {words}")
    for where, args in (("args", entry.get("args", {})), ("smoke: args", entry["smoke"].get("args", {}))):
        known = KINDS[entry["kind"]]
        if not isinstance(args, dict):
            raise Refused(f"{place}: {where}: got {args!r}, expected a mapping")
        if unknown := args.keys() - known:
            named = sorted(map(str, unknown))[0]
            raise Refused(f"{place}: {where}: {entry['kind']} has no {named}; it has {', '.join(sorted(known))}")
    if entry.get("least", 0) > entry["minutes"]:
        raise Refused(f"{place}: least: got {entry['least']}, expected at most the cell's {entry['minutes']} minutes")


class Results:
    """What was found so far, one line a cell and try.

    Args:
        output: folder of results.jsonl, which is added to.
        known: folders of earlier ones, which are read.
    """

    NAME = "results.jsonl"

    def __init__(self, output: Path, known: Sequence[Path] = ()) -> None:
        self.path = output / self.NAME
        self.lines = [line for folder in (*known, output) for line in read_results(folder / self.NAME)]

    def done(self, cell: Cell, device: str, smoke: bool) -> bool:
        """Whether a cell is done, on this kind of device and at this size."""
        return any(
            (line["name"], line["status"], line["device"]["type"], line["smoke"]) == (cell.name, "done", device, smoke)
            for line in self.lines
        )

    def add(self, line: dict[str, Any]) -> None:
        """Write a result, to the disk; a line before it that was cut short is ended first, or it would spoil this one."""
        self.lines.append(line)
        with self.path.open("a+b") as file:
            torn = False
            if file.seek(0, os.SEEK_END) > 0:
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
            file.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; one that was cut short is passed over."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
