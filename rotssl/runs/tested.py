"""The numbers on test that are in a run's folder: all of them if it has no MLflow, else those that a store did not take."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rotssl.base.paths import AnyPath, write_whole
from rotssl.config.fields import ConfigError

FILE = "test.json"
FOLDER = "evaluation"  # in a run's folder, with a folder for the cards and hits of each protocol
ENTRY = ("epoch", "metrics", "facts")  # what each entry has at least; later versions add the card and its files


def read(folder: AnyPath) -> list[dict[str, Any]]:
    """The evaluations in a run's folder, the oldest first; none if there is no file.

    Raises:
        ConfigError: the file can't be read; ignoring it would use the test split again.
    """
    file = folder / FILE
    if not file.exists():
        return []
    try:
        return [{key: entry[key] for key in ENTRY} | entry for entry in json.loads(file.read_text())]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"--checkpoint: {file} cannot be read ({type(error).__name__}: {error})") from error


def write(folder: AnyPath, entries: Sequence[Mapping[str, Any]]) -> None:
    """Replace them."""
    write_whole(folder / FILE, json.dumps(entries, indent=2) + "\n")


def metrics(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The measures of all entries, such as ``knn/top1``; of two of a name the later one."""
    return {key: value for entry in entries for key, value in entry["metrics"].items()}
