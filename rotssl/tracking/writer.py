"""MLflow, written to.

The journal on disk holds the truth; a Tracker brings MLflow up to it. Metrics in MLflow are append-only, so what it already has
is asked for before anything is sent: each epoch arrives once, however often a run is started again. A tracking server that is
down costs a warning, never the run: the next epoch, or the next start, sends what is missing. Where tracking.uri is off, nothing
imports MLflow, and a start that has a store sends everything.
"""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from rotssl.config.fields import ConfigError
from rotssl.engine.events import EpochDone, Event, Facts
from rotssl.runs import journal
from rotssl.runs.journal import Points
from rotssl.tracking.store import PARENT, client_of, short

log = logging.getLogger(__name__)


def open_run(
    uri: str,
    experiment: str,
    run_name: str,
    run_id: str | None,
    params: dict[str, Any],
    tags: dict[str, str],
    artifacts: Path,
) -> str:
    """Make store, experiment and run, or take up the run again.

    A store or an experiment that is new must be made by one process, before others come to it.

    Args:
        uri: of the tracking store.
        experiment: its name; made if need be.
        run_name: shown in the UI.
        run_id: of the run to go on with, or None for a new one.
        params: dotted name -> value; they never change.
        tags: facts that may change from start to start.
        artifacts: folder for the artifacts of a new experiment on sqlite (a server has its own place).

    Returns:
        The run's id.

    Raises:
        ConfigError: the store can't be reached.
    """
    try:
        client = client_of(uri)
        found = client.get_experiment_by_name(experiment)
        if found is not None and found.lifecycle_stage != "active":
            raise ConfigError(
                f"tracking.experiment: {experiment!r} was deleted in MLflow; restore it or choose another name"
            )
        if found is None:
            location = artifacts.absolute().as_uri() if uri.startswith("sqlite") else None
            experiment_id = client.create_experiment(experiment, artifact_location=location)
        else:
            experiment_id = found.experiment_id
        if run_id is None:
            run_id = _orphan(client, experiment_id, run_name, tags)
        if run_id is None or not _alive(client, run_id):
            run_id = str(client.create_run(experiment_id, run_name=run_name, tags=tags).info.run_id)
        else:
            tags = {key: value for key, value in tags.items() if key != PARENT}  # of two sweeps the first one has it
        client.update_run(run_id, status="RUNNING")
        known = client.get_run(run_id).data.params
        from mlflow.entities import Param, RunTag

        client.log_batch(
            run_id,
            params=[Param(key, str(value)) for key, value in params.items() if key not in known],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )
    except ConfigError:
        raise
    except Exception as error:  # MLflow's, sqlalchemy's, alembic's, requests': in each case the address is of no use
        raise ConfigError(f"tracking.uri: {uri} cannot be used: {str(error).splitlines()[0][:200]}") from error
    return run_id


def _orphan(client: Any, experiment_id: str, run_name: str, tags: dict[str, str]) -> str | None:
    """The run of a start that was killed before it could note the id, and before the first epoch."""
    if "'" in run_name or "run_dir" not in tags:
        return None
    running = f"attributes.run_name = '{run_name}' and attributes.status = 'RUNNING'"
    for run in client.search_runs([experiment_id], running):
        same = all(run.data.tags.get(key) == tags.get(key) for key in ("run_dir", "config_hash"))
        if same and not run.data.metrics:
            return str(run.info.run_id)
    return None


def _alive(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException:
        return False


def log_evaluation(
    uri: str, run_id: str, split: str, step: int, metrics: dict[str, float], facts: dict[str, str]
) -> None:
    """A run below the one that was evaluated.

    Args:
        uri: of the tracking store.
        run_id: of the run whose encoder it was.
        split: of the images that were classified.
        step: epoch of the encoder.
        metrics: what was measured.
        facts: the protocols, as parameters.
    """
    from mlflow.entities import Metric, Param, RunTag

    client = client_of(uri)
    tags = {"mlflow.parentRunId": run_id, "kind": "evaluation", "split": split}
    made = client.create_run(client.get_run(run_id).info.experiment_id, run_name=f"evaluation-{split}", tags=tags)
    now = int(time.time() * 1000)
    client.log_batch(
        made.info.run_id,
        metrics=[Metric(key, value, now, step) for key, value in metrics.items()],
        params=[Param(key, value) for key, value in facts.items()],
        tags=[RunTag("status_reason", "completed")],
    )
    client.set_terminated(made.info.run_id, "FINISHED")


class Tracker:
    """Brings one MLflow run up to the journal; every call is best effort and warns where it fails.

    Args:
        uri: of the tracking store.
        run_id: from open_run().
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id
        self._known: dict[str, set[int]] | None = None  # the epochs of each metric
        self._client: Any = None

    def sync(self, points: Points) -> bool:
        """Send what MLflow doesn't have yet; returns whether it has all of it now."""
        try:
            self._client = self._client or client_of(self.uri)
            from mlflow.entities import Metric

            if self._known is None:
                self._known = self._sent()
            now = int(time.time() * 1000)
            for epoch, point in sorted(points.items()):
                missing = [key for key in point if epoch not in self._known.get(key, ())]
                if missing:
                    # One transaction: the epoch arrives whole or not at all, but for what could be measured only later.
                    metrics = [Metric(key, point[key], now, epoch) for key in missing]
                    self._client.log_batch(self.run_id, metrics=metrics)
                    for key in missing:
                        self._known.setdefault(key, set()).add(epoch)
        except Exception as error:  # whatever the store or the network raises, training goes on
            log.warning(
                "MLflow could not be updated (%s); the journal has every point, the next epoch sends it", short(error)
            )
            self._known = None
            return False
        return True

    def _sent(self) -> dict[str, set[int]]:
        """The epochs that MLflow has of each metric, as an earlier start may have sent some."""
        keys = self._client.get_run(self.run_id).data.metrics
        return {key: {m.step for m in self._client.get_metric_history(self.run_id, key)} for key in keys}

    def finish(self, status: str, reason: str, files: list[Path]) -> bool:
        """Log the files as artifacts and close the run; returns whether that worked.

        Args:
            status: MLflow's FINISHED, FAILED or KILLED.
            reason: for the tag status_reason.
            files: those that exist are logged.
        """
        try:
            self._client = self._client or client_of(self.uri)
            for file in files:
                if file.exists():
                    self._client.log_artifact(self.run_id, str(file))
            self._client.set_tag(self.run_id, "status_reason", reason)
            self._client.set_terminated(self.run_id, status)
        except Exception as error:  # as above
            log.warning("MLflow could not be told that the run is %s (%s)", status, short(error))
            return False
        return True

    def tag(self, tags: dict[str, str]) -> None:
        """Set tags."""
        try:
            self._client = self._client or client_of(self.uri)
            for key, value in tags.items():
                self._client.set_tag(self.run_id, key, value)
        except Exception as error:  # as above
            log.warning("MLflow tags could not be set (%s)", short(error))


class Follower:
    """Keeps a run in MLflow up with its journal, in a thread of its own, so that no training waits for the store.

    One look at the journal at a time: what comes to it meanwhile goes with the next one, or with the Tracker that closes the
    run. Leaving the context waits for the look that is under way.

    Args:
        tracker: of the run; this thread's alone.
        folder: of the run.
    """

    def __init__(self, tracker: Tracker, folder: Path) -> None:
        self.tracker, self.folder = tracker, folder
        self._pool = ThreadPoolExecutor(1, "tracking")
        self._look: Future[bool] | None = None

    def __enter__(self) -> "Follower":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if kind is None and self._look is not None:
            self._look.result()  # a journal that could not be read

    def handle(self, event: Event) -> None:
        """Take an event of the engine: its facts become tags; at the end of an epoch there is something to send."""
        if isinstance(event, Facts):
            self._pool.submit(self.tracker.tag, dict(event.tags))
        if isinstance(event, EpochDone) and (self._look is None or self._look.done()):
            self._look = self._pool.submit(lambda: self.tracker.sync(journal.read(self.folder)))


def log_report(uri: str, run_id: str, files: Sequence[Path]) -> bool:
    """Log files as artifacts of a run, under ``report``; returns whether that worked, and warns where it did not."""
    try:
        client = client_of(uri)
        for file in files:
            client.log_artifact(run_id, str(file), "report")
    except Exception as error:  # as in Tracker: the files are on disk all the same
        log.warning("the report could not be logged to MLflow (%s)", short(error))
        return False
    return True
