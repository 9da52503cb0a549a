"""Writing to MLflow.

The journal on disk is authoritative; a Tracker syncs MLflow with it. Metrics in MLflow are append-only, so a Tracker first asks
which ones exist: each epoch is sent once, even if a run is restarted. If the tracking server is down, there is a warning but the
run continues; the next epoch, or the next start, sends what is missing. If tracking.uri is off, MLflow is not imported, and a
later start with a store sends everything.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rotssl.base.paths import AnyPath, fetched
from rotssl.config.fields import ConfigError
from rotssl.runs.journal import Points
from rotssl.tracking.store import PARENT, client_of, short
from rotssl.tracking.system import of_epochs

log = logging.getLogger(__name__)
MOST = 1000  # metrics that MLflow takes in a request


class _Sent:
    """What this process knows of a run in MLflow.

    Attributes:
        epochs: of each metric, that MLflow has; None before it was asked, which takes a request for each metric.
        times: when each epoch was sent first, in milliseconds since 1970. Sent again it has the same time: a server that hung may
            take the earlier request later, and drops a point that it has.
    """

    def __init__(self) -> None:
        self.epochs: dict[str, set[int]] | None = None
        self.times: dict[int, int] = {}


_sent: dict[tuple[str, str], _Sent] = {}  # by store and run; between starts another process may write


def open_run(
    uri: str,
    experiment: str,
    run_name: str,
    run_id: str | None,
    params: dict[str, Any],
    tags: dict[str, str],
    artifacts: Path,
    lost: bool = False,
) -> str:
    """Create store, experiment and run, or reopen the run.

    Args:
        uri: URI of the tracking store.
        experiment: name of the experiment; created if missing.
        run_name: name shown in MLflow's UI.
        run_id: id of the run to reopen, or None for a new one.
        params: dotted name -> value; they never change.
        tags: facts that may change between starts.
        artifacts: folder for the artifacts of a new experiment on sqlite (a server has its own).
        lost: whether the id of an earlier start is lost; the run of the same folder is then reopened.

    Returns:
        The run's id.

    Raises:
        ConfigError: the store can't be reached.
    """
    try:
        client = client_of(uri, create=True)
        location = artifacts.absolute().as_uri() if uri.startswith("sqlite") else None
        found = _experiment(client, experiment, location)
        if found.lifecycle_stage != "active":
            raise ConfigError(
                f"tracking.experiment: {experiment!r} was deleted in MLflow; restore it or choose another name"
            )
        experiment_id = found.experiment_id
        if run_id is None:
            run_id = _orphan(client, experiment_id, run_name, tags, lost)
        if run_id is None or not _alive(client, run_id):
            run_id = str(client.create_run(experiment_id, run_name=run_name, tags=tags).info.run_id)
        else:
            tags = {key: value for key, value in tags.items() if key != PARENT}  # the first of two sweeps keeps it
        client.update_run(run_id, status="RUNNING")
        known = client.get_run(run_id).data.params
        from mlflow.entities import Param, RunTag

        client.log_batch(
            run_id,
            params=[Param(key, str(value)) for key, value in params.items() if key not in known],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )
        _sent.pop((uri, run_id), None)
    except ConfigError:
        raise
    except Exception as error:  # of MLflow, sqlalchemy, alembic or requests: in any case the URI is unusable
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(f"tracking.uri: {uri} cannot be used: {why}") from error
    return run_id


def _experiment(client: Any, name: str, artifacts: str | None) -> Any:
    """The experiment, created if missing; another process may create it at the same time."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            client.create_experiment(name, artifact_location=artifacts)
        except MlflowException:
            if client.get_experiment_by_name(name) is None:
                raise
        found = client.get_experiment_by_name(name)
    return found


def _orphan(client: Any, experiment_id: str, run_name: str, tags: dict[str, str], lost: bool) -> str | None:
    """The run of a start whose id was not saved, or None.

    Without ``lost`` it was killed before its first epoch; a run with metrics may be that of a folder that was deleted since.
    """
    if "'" in run_name or "run_dir" not in tags:
        return None
    wanted = f"attributes.run_name = '{run_name}'" + ("" if lost else " and attributes.status = 'RUNNING'")
    for run in client.search_runs([experiment_id], wanted):
        same = all(run.data.tags.get(key) == tags.get(key) for key in ("run_dir", "config_hash"))
        if same and (lost or not of_epochs(run.data.metrics)):
            return str(run.info.run_id)
    return None


def _alive(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException:
        return False


def log_evaluation(
    uri: str,
    run_id: str,
    split: str,
    step: int,
    metrics: dict[str, float],
    facts: dict[str, str],
    files: Sequence[AnyPath] = (),
) -> None:
    """Log an evaluation as a child run of the evaluated one.

    Args:
        uri: URI of the tracking store.
        run_id: id of the evaluated run.
        split: split of the images that were classified.
        step: epoch of the encoder.
        metrics: the measures.
        facts: the protocols, logged as parameters.
        files: logged as artifacts; a failure is a warning, for they stay in the run's folder.
    """
    from mlflow.entities import Metric, Param, RunTag

    client = client_of(uri)
    tags = {"mlflow.parentRunId": run_id, "kind": "evaluation", "split": split}
    made = client.create_run(client.get_run(run_id).info.experiment_id, run_name=f"evaluation-{split}", tags=tags)
    now = int(time.time() * 1000)
    entries = [Metric(key, value, now, step) for key, value in metrics.items()]
    for first in range(0, len(entries), MOST):
        client.log_batch(made.info.run_id, metrics=entries[first : first + MOST])
    params = [Param(key, value) for key, value in facts.items()]
    client.log_batch(made.info.run_id, params=params, tags=[RunTag("status_reason", "completed")])
    client.set_terminated(made.info.run_id, "FINISHED")
    _attach(client, made.info.run_id, files)


def _attach(client: Any, run_id: str, files: Sequence[AnyPath]) -> bool:
    """Log files as artifacts, missing ones are skipped; returns whether that worked, and logs a warning if not."""
    file: AnyPath | None = None
    try:
        for file in files:
            if file.exists():
                with fetched(file) as local:
                    client.log_artifact(run_id, str(local))
    except Exception as error:  # as in Tracker, or a library of the artifact store is missing
        log.warning("could not copy %s to MLflow's artifacts (%s); it stays in the run's folder", file, short(error))
        return False
    return True


class Tracker:
    """Syncs one MLflow run with the journal; every call is best effort and logs a warning if it fails.

    Args:
        uri: URI of the tracking store.
        run_id: from open_run().
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id
        self._client: Any = None

    def sync(self, points: Points, tags: Mapping[str, str] | None = None) -> bool:
        """Send the points that MLflow lacks; returns whether it has all of them now.

        Args:
            points: of the journal.
            tags: set with the last point, if there is something to send.
        """
        sent = _sent.setdefault((self.uri, self.run_id), _Sent())
        try:
            self._client = self._client or client_of(self.uri)
            from mlflow.entities import Metric, RunTag

            if sent.epochs is None:
                sent.epochs = self._epochs()
            now, last = int(time.time() * 1000), max(points, default=0)
            for epoch, point in sorted(points.items()):
                missing = [key for key in point if epoch not in sent.epochs.get(key, ())]
                if missing:
                    # One transaction: all metrics of the epoch or none, except those that are measured later.
                    at = sent.times.setdefault(epoch, now)
                    metrics = [Metric(key, point[key], at, epoch) for key in missing]
                    more = [RunTag(key, value) for key, value in (tags or {}).items()] if epoch == last else []
                    self._client.log_batch(self.run_id, metrics=metrics, tags=more)
                    for key in missing:
                        sent.epochs.setdefault(key, set()).add(epoch)
        except Exception as error:  # any error of the store or the network: training continues
            log.warning(
                "could not update MLflow (%s); the journal has all points, the next epoch sends them", short(error)
            )
            sent.epochs = None
            return False
        return True

    def _epochs(self) -> dict[str, set[int]]:
        """The epochs of each metric that MLflow already has, from earlier starts."""
        keys = of_epochs(self._client.get_run(self.run_id).data.metrics)
        return {key: {m.step for m in self._client.get_metric_history(self.run_id, key)} for key in keys}

    def finish(self, status: str, reason: str, files: list[AnyPath]) -> bool:
        """Log files as artifacts and close the run; returns whether that worked.

        Args:
            status: MLflow's FINISHED, FAILED or KILLED.
            reason: value of the tag status_reason.
            files: files to log; missing ones are skipped.
        """
        try:
            self._client = self._client or client_of(self.uri)
            # Before the artifacts: what they are kept in may fail alone, and a run must not stay RUNNING for that.
            self._client.set_tag(self.run_id, "status_reason", reason)
            self._client.set_terminated(self.run_id, status)
        except Exception as error:  # as above
            log.warning("could not set the status of the run to %s in MLflow (%s)", status, short(error))
            return False
        return _attach(self._client, self.run_id, files)

    def tag(self, tags: dict[str, str]) -> None:
        """Set tags."""
        try:
            self._client = self._client or client_of(self.uri)
            from mlflow.entities import RunTag

            # One request: a server with logins checks the password of each, which takes longer than all the rest of it.
            self._client.log_batch(self.run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])
        except Exception as error:  # as above
            log.warning("could not set tags in MLflow (%s)", short(error))


def log_report(uri: str, run_id: str, files: Sequence[Path]) -> bool:
    """Log files as artifacts of a run, under ``report``; returns whether that worked, and logs a warning if not."""
    try:
        client = client_of(uri)
        for file in files:
            client.log_artifact(run_id, str(file), "report")
    except Exception as error:  # as in Tracker: the files are still on disk
        log.warning("could not log the report to MLflow (%s)", short(error))
        return False
    return True
