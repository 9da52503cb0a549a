"""MLflow, read back: the runs of an experiment, the trials of a sweep, the evaluations of a run."""

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotssl.config.fields import ConfigError, nearest
from rotssl.runs.journal import Points
from rotssl.tracking.store import check_uri, client_of, short

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrackedRun:
    """A run as a tracking store holds it.

    Attributes:
        run_id: of the store.
        name: shown in its UI.
        status: RUNNING, FINISHED, FAILED or KILLED.
        started: milliseconds since 1970.
        params: the resolved configuration, dotted names, all values text.
        tags: facts beside it.
        points: epoch -> metrics, each epoch as it was logged first.
    """

    run_id: str
    name: str
    status: str
    started: int
    params: Mapping[str, str]
    tags: Mapping[str, str]
    points: Points

    @property
    def parent(self) -> str | None:
        """Id of the run that this one is a child of."""
        return self.tags.get("mlflow.parentRunId")


def read_runs(uri: str, experiment: str, metrics: Sequence[str]) -> list[TrackedRun]:
    """All runs of an experiment that were not deleted, with the points of some metrics; sweeps and evaluations have none.

    Args:
        uri: of the tracking store; an sqlite file that isn't there is not made.
        experiment: its name.
        metrics: names of those to read, of which a run may lack any.

    Returns:
        One record a run, the oldest first.

    Raises:
        ConfigError: the store can't be reached, or has no such experiment.
    """
    if uri.startswith("sqlite:///") and len(uri) > len("sqlite:///"):
        file = Path(uri.removeprefix("sqlite:///"))
        if not file.is_file():
            raise ConfigError(f"tracking.uri: there is no file {file}")
    else:
        check_uri(uri)
    try:
        client = client_of(uri)
        found = client.get_experiment_by_name(experiment)
        if found is None or found.lifecycle_stage != "active":
            known = sorted(entry.name for entry in _pages(client.search_experiments))
            raise ConfigError(
                f"experiment {experiment!r} is not in {uri}, which has {', '.join(known) or 'none'}"
                f"{nearest(experiment, known)}"
            )
        runs = list(_pages(client.search_runs, [found.experiment_id]))
        records = [_record(client, run, metrics) for run in runs]
    except ConfigError:
        raise
    except Exception as error:  # as in open_run
        raise ConfigError(f"tracking.uri: {uri} cannot be read ({short(error)})") from error
    return sorted(records, key=lambda record: (record.started, record.run_id))


def trial_ids(uri: str, run_id: str) -> set[str]:
    """The trials that a sweep's run lists in its artifact ``trials.json``; none where there is no such list.

    Sweeps of one experiment may share trials, of which MLflow knows one parent only.
    """
    try:
        client = client_of(uri)
        if all(item.path != "trials.json" for item in client.list_artifacts(run_id)):
            return set()
        with tempfile.TemporaryDirectory() as folder:
            found = json.loads(Path(client.download_artifacts(run_id, "trials.json", folder)).read_text())
        return {str(entry) for entry in found}
    except Exception as error:  # as in Tracker: the children are known all the same
        log.warning("the list of the sweep's trials could not be read from MLflow (%s)", short(error))
        return set()


def run_ids(uri: str, experiment: str) -> set[str] | None:
    """The ids of all runs of an experiment; None where the store can't be asked, which is said."""
    try:
        client = client_of(uri)
        known = client.get_experiment_by_name(experiment)
        return (
            set() if known is None else {str(r.info.run_id) for r in _pages(client.search_runs, [known.experiment_id])}
        )
    except Exception as error:  # whatever the store or the network raises: it is asked again another time
        log.warning("MLflow could not be asked for its runs (%s)", short(error))
        return None


def run_folder_of(uri: str, run_id: str) -> str:
    """The folder of a run.

    Raises:
        ConfigError: the store can't be used, or has no such run.
    """
    file = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite") and not file.exists():
        raise ConfigError(f"--uri: no file {file}")
    try:
        return str(client_of(uri).get_run(run_id).data.tags["run_dir"])
    except Exception as error:  # MLflow's own, or no such tag: in each case the id is of no use
        raise ConfigError(f"--run: {uri} has no run {run_id!r} with a folder") from error


def evaluations_of(uri: str, run_id: str, split: str) -> dict[str, float]:
    """What was measured before on a split with a run's encoder: the metrics of its evaluations."""
    client = client_of(uri)
    run = client.get_run(run_id)
    wanted = f"tags.`mlflow.parentRunId` = '{run_id}' and tags.kind = 'evaluation' and tags.split = '{split}'"
    found = client.search_runs([run.info.experiment_id], wanted)
    return {key: value for run in found for key, value in run.data.metrics.items()}


def _pages(search: Callable[..., Any], *args: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(*args, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _record(client: Any, run: Any, metrics: Sequence[str]) -> TrackedRun:
    points: Points = {}
    wanted = [] if run.data.tags.get("kind") in ("sweep", "evaluation") else metrics
    for key in wanted:
        if key in run.data.metrics:
            # The store is append-only and promises no order: what was logged first stands, as in the journal.
            for metric in sorted(client.get_metric_history(run.info.run_id, key), key=lambda m: m.timestamp):
                points.setdefault(metric.step, {}).setdefault(key, metric.value)
    return TrackedRun(
        run_id=run.info.run_id,
        name=run.info.run_name,
        status=run.info.status,
        started=run.info.start_time,
        params=dict(run.data.params),
        tags=dict(run.data.tags),
        points=points,
    )
