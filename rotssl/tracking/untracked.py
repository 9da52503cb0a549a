"""Runs without MLflow: a stand-in for the Tracker, which keeps the tags for a later start with a store."""

import json
import logging
from collections.abc import Mapping

from rotssl.base.paths import AnyPath, write_whole
from rotssl.config.sections import OFF
from rotssl.runs.journal import Points
from rotssl.tracking.store import short
from rotssl.tracking.writer import Tracker

log = logging.getLogger(__name__)


class Untracked(Tracker):
    """Replaces a Tracker if there is no store: sends nothing, and keeps the tags for a later start with a store.

    Args:
        folder: folder of the run.
    """

    NAME = "tags.json"

    def __init__(self, folder: AnyPath) -> None:
        super().__init__(OFF, "")
        self.folder = folder

    def sync(self, points: Points, tags: Mapping[str, str] | None = None) -> bool:
        """Do nothing: the journal has everything."""
        return True

    def finish(self, status: str, reason: str, files: list[AnyPath]) -> bool:
        """Do nothing: the run's folder has the files, and run.json the status."""
        return True

    def tag(self, tags: dict[str, str]) -> None:
        """Add tags to the saved ones."""
        try:
            write_whole(self.folder / self.NAME, json.dumps(kept_tags(self.folder) | tags, indent=2) + "\n")
        except OSError as error:  # not fatal: tags only describe the run
            log.warning("could not write %s (%s)", self.folder / self.NAME, short(error))


def kept_tags(folder: AnyPath) -> dict[str, str]:
    """The saved tags of a run that had no store; empty if they can't be read."""
    try:
        content = json.loads((folder / Untracked.NAME).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return {str(key): str(value) for key, value in content.items()} if isinstance(content, dict) else {}


def tracker_of(uri: str, run_id: str | None, folder: AnyPath) -> Tracker:
    """The Tracker of a run, or its replacement if the store is off."""
    return Untracked(folder) if uri == OFF else Tracker(uri, str(run_id))
