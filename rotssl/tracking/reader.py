"""Reading from MLflow: the runs of an experiment, the trials of a sweep, the evaluations of a run."""

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rotssl.base.address import file_of, is_gone
from rotssl.base.paths import AnyPath, at
from rotssl.config.fields import ConfigError, nearest
from rotssl.runs.journal import Points
from rotssl.tracking.store import check_uri, client_of, short

log = logging.getLogger(__name__)


class FolderGone(ConfigError):
    """The folder of a run is not where the store says it is.

    Args:
        run_id: of the run.
        folder: where it was.
    """

    def __init__(self, run_id: str, folder: AnyPath) -> None:
        super().__init__(f"--run: the folder of {run_id} is not there any more: {folder}; use --checkpoint DIR")
        self.folder = folder


@dataclass(frozen=True)
class TrackedRun:
    """A run in a tracking store.

    Attributes:
        run_id: id in the store.
        name: name shown in MLflow's UI.
        status: RUNNING, FINISHED, FAILED or KILLED.
        started: milliseconds since 1970.
        params: the resolved configuration, dotted names, all values as text.
        tags: additional facts.
        points: epoch -> metrics; the first logged value of each metric counts.
        values: metrics of an evaluation.
    """

    run_id: str
    name: str
    status: str
    started: int
    params: Mapping[str, str]
    tags: Mapping[str, str]
    points: Points
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def parent(self) -> str | None:
        """Id of its parent run, or None."""
        return self.tags.get("mlflow.parentRunId")


def read_runs(uri: str, experiment: str, metrics: Sequence[str]) -> list[TrackedRun]:
    """All runs of an experiment that were not deleted, with the points of some metrics; sweeps and evaluations have none.

    Args:
        uri: URI of the tracking store; a missing sqlite file is not created.
        experiment: name of the experiment.
        metrics: names of the metrics to read; a run may lack some of them.

    Returns:
        One record per run, oldest first.

    Raises:
        ConfigError: the store can't be reached, or has no such experiment.
    """
    file = file_of(uri)
    if file is None:
        check_uri(uri)
    elif not file.is_file():
        raise ConfigError(f"tracking.uri: no file {file}: nothing has been recorded there yet")
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
    """The ids of the trials listed in the artifact ``trials.json`` of a sweep's run; empty if there is no such list.

    Sweeps of one experiment may share trials, for which MLflow records only one parent.
    """
    try:
        client = client_of(uri)
        if all(item.path != "trials.json" for item in client.list_artifacts(run_id)):
            return set()
        with tempfile.TemporaryDirectory() as folder:
            found = json.loads(Path(client.download_artifacts(run_id, "trials.json", folder)).read_text())
        return {str(entry) for entry in found}
    except Exception as error:  # as in Tracker: the child runs are still known
        log.warning("could not read the list of the sweep's trials from MLflow (%s)", short(error))
        return set()


def run_ids(uri: str, experiment: str) -> set[str] | None:
    """The ids of all runs of an experiment; None, with a warning, if the store can't be read."""
    if is_gone(uri):
        return set()
    try:
        client = client_of(uri)
        known = client.get_experiment_by_name(experiment)
        return (
            set() if known is None else {str(r.info.run_id) for r in _pages(client.search_runs, [known.experiment_id])}
        )
    except Exception as error:  # any error of the store or the network: a later start reads it again
        log.warning("could not read the runs from MLflow (%s)", short(error))
        return None


def run_folder_of(uri: str, run_id: str) -> str:
    """The folder of a run.

    Raises:
        FolderGone: it is not there any more.
        ConfigError: the store can't be used, or has no such run.
    """
    file = file_of(uri)
    if file is not None and not file.exists():
        raise ConfigError(f"--uri: no file {file}")
    try:
        folder = at(client_of(uri).get_run(run_id).data.tags["run_dir"])
    except Exception as error:  # MLflow's own, or the tag is missing: in either case the id is unusable
        raise ConfigError(f"--run: {uri} has no run {run_id!r} with a folder") from error
    if file is not None and isinstance(folder, Path) and not folder.exists():
        moved = file.absolute().parent / folder.parent.name / folder.name  # together with the store
        folder = moved if moved.exists() else folder
    if not folder.exists():
        raise FolderGone(run_id, folder)
    return str(folder)


def evaluations_of(uri: str, run_id: str, split: str) -> dict[str, float]:
    """The metrics of all earlier evaluations of a run's encoder on a split.

    Raises:
        ConfigError: the store has no such run.
    """
    client = client_of(uri)
    try:
        run = client.get_run(run_id)
    except Exception as error:  # MLflow's own
        raise ConfigError(
            f"--checkpoint: {uri} does not have the run ({short(error)}); the command that trained it, started again, sends it"
        ) from error
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
            # The store is append-only and guarantees no order: the first logged value counts, as in the journal.
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
        values=dict(run.data.metrics) if run.data.tags.get("kind") == "evaluation" else {},
    )
