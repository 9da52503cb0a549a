"""A run without MLflow: what stands in for a Tracker, and what it keeps for a start that has a store."""

import json
import logging
from pathlib import Path

from rotssl.config.sections import OFF
from rotssl.runs.journal import Points
from rotssl.tracking.store import short
from rotssl.tracking.writer import Tracker

log = logging.getLogger(__name__)


class Untracked(Tracker):
    """Stands in for a Tracker where there is no store: sends nothing, and keeps the tags for a start that has one.

    Args:
        folder: of the run.
    """

    NAME = "tags.json"

    def __init__(self, folder: Path) -> None:
        super().__init__(OFF, "")
        self.folder = folder

    def sync(self, points: Points) -> bool:
        """Nothing is missing: the journal has it."""
        return True

    def finish(self, status: str, reason: str, files: list[Path]) -> bool:
        """The run's folder has the files, and its record the status."""
        return True

    def tag(self, tags: dict[str, str]) -> None:
        """Add tags to those that are kept."""
        try:
            (self.folder / self.NAME).write_text(json.dumps(kept_tags(self.folder) | tags, indent=2) + "\n")
        except OSError as error:  # they only describe the run
            log.warning("%s could not be written (%s)", self.folder / self.NAME, short(error))


def kept_tags(folder: Path) -> dict[str, str]:
    """The tags of a run while it had no store; what can't be read is left out."""
    try:
        content = json.loads((folder / Untracked.NAME).read_text())
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in content.items()} if isinstance(content, dict) else {}


def tracker_of(uri: str, run_id: str | None, folder: Path) -> Tracker:
    """What follows a run: a Tracker, or what stands in for it where the store is off."""
    return Untracked(folder) if uri == OFF else Tracker(uri, str(run_id))
