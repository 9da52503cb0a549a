"""A store that was moved together with its folder: MLflow's tables hold absolute addresses of the artifacts."""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

ARTIFACTS = "mlartifacts"  # folder beside the store


def follow(store: Path) -> None:
    """Point the experiments of a store to the artifacts beside it where the folder they are said to be in is gone.

    MLflow would create that folder again. It has no function for this: the tables ``experiments`` and ``runs`` are changed.

    Raises:
        sqlite3.Error: the store can't be read, or has other tables.
    """
    # as_uri() quotes what is not plain in a path.
    beside = (store.absolute().parent / ARTIFACTS).as_uri()
    with closing(sqlite3.connect(store, timeout=20)) as tables, tables:
        experiments = "SELECT experiment_id, artifact_location FROM experiments WHERE artifact_location LIKE 'file://%'"
        for number, place in tables.execute(experiments).fetchall():
            before, _, name = place.rpartition(f"/{ARTIFACTS}/")
            there = f"{beside}/{name}"
            if not before or there == place or _path(place).exists():
                continue
            if _path(before).exists() and not _path(there).exists():
                continue  # another storage.path, where nothing has been logged yet
            tables.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (there, number))
            tables.execute(
                "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) "
                "WHERE experiment_id = ? AND substr(artifact_uri, 1, ?) = ?",
                (there, len(place) + 1, number, len(place), place),
            )


def _path(uri: str) -> Path:
    return Path(unquote(urlsplit(uri).path))
