"""The life of a run, from its configuration to its end: checks, tracking, training, closing. Prints nothing."""

import logging
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rotssl import assessment
from rotssl import config as cfg
from rotssl.base.address import file_of, is_gone
from rotssl.base.paths import AnyPath, at, write_whole
from rotssl.config import Config, ResolvedConfig
from rotssl.config.fields import ConfigError
from rotssl.config.methods import METHODS
from rotssl.config.recipes import dump
from rotssl.config.rules import check_labels, check_saliency, labels_used
from rotssl.config.sections import OFF
from rotssl.config.tasks import TASKS
from rotssl.data import datasets
from rotssl.data.images import DataError
from rotssl.engine.events import Event, Missing, Note
from rotssl.evaluation.protocol import protocols
from rotssl.models import sides
from rotssl.runs import alive, checkpoint, health, journal
from rotssl.runs.curve import save_convergence
from rotssl.runs.journal import Points
from rotssl.runs.state import RunState, run_folder
from rotssl.runtimes import torchrun
from rotssl.runtimes.ray_cluster import Workers
from rotssl.tracking import moved, store, untracked, writer
from rotssl.tracking.follower import Follower, progress

log = logging.getLogger(__name__)
ARTIFACTS = ("config.yaml", "convergence.png", "views.png", "encoder.safetensors", "encoder.json")


def prepare(
    config: Config, info: datasets.DataInfo | None = None, say: Callable[[str], None] = log.warning
) -> tuple[ResolvedConfig, datasets.DataInfo]:
    """Check the data and resolve the configuration, reporting sizes that had to be reduced.

    Args:
        config: from ``build``.
        info: facts about its data, if already inspected.
        say: called with a line for each reduced size, each odd folder, and if MLFLOW_TRACKING_URI is not used.

    Returns:
        The resolved configuration, and the facts about its data.

    Raises:
        ConfigError: the data, the configuration, the method, the encoder, the first weights or the tracking URI is unusable.
    """
    info = info or datasets.inspect(config.data, config.evaluation.holdout)
    for line in info.warnings:
        say(line)
    check_labels(config, info.labelled)
    if config.evaluation.protocols:
        assessment.check_test(config.data, info.labelled)
    resolved = cfg.resolve(config, info.image_size, info.train_size)
    try:
        at(resolved.storage.path)
    except ValueError as error:
        raise ConfigError(f"storage.path: {error}") from error
    # One answer for all workers, regardless of their machines' memory.
    resolved = cfg.replace(resolved, {"data.store": datasets.where(config.data, info.bytes)})
    check_saliency(resolved)
    for line in cfg.cut_down(config, resolved):
        say(line)
    init = resolved.train.init_from
    started = checkpoint.found(resolved.run_dir) or (resolved.run_dir / checkpoint.WITHIN).exists()
    if init is not None and not started:  # a run that was started has its own weights
        checkpoint.source(init)
    if config.encoder.name.startswith("timm/"):  # only timm knows its encoders and their input sizes
        sides.check(resolved)
    if config.method.name in METHODS.sources:  # only its package knows whether its code can be loaded
        from rotssl.methods import outside

        outside.check(resolved)
    uri = store.chosen_uri(resolved.tracking.uri, say)
    if uri is None and not isinstance(resolved.run_dir, Path):
        raise ConfigError(
            "tracking.uri: no default with storage.path in an object store, where no sqlite file can be: "
            "give http(s)://HOST:PORT, sqlite:///FILE, or off"
        )
    return cfg.replace(resolved, {"tracking.uri": uri}), info


MLFLOW_STATUS = {"finished": "FINISHED", "failed": "FAILED"}
MLFLOW_STATUS |= dict.fromkeys(("interrupted", "stopped", "pruned"), "KILLED")


class Run:
    """A run of a resolved configuration: its folder, its state and its run in MLflow.

    Args:
        config: resolved.

    Raises:
        ConfigError: the folder holds a run of another configuration, or can't be read.
    """

    def __init__(self, config: ResolvedConfig) -> None:
        self.config, self.folder, self.name = config, config.run_dir, config.tracking.run_name
        self.state = RunState.of(config)
        self.assessed: assessment.Assessed | None = None  # what this start found out on test

    @classmethod
    @contextmanager
    def held(cls, config: ResolvedConfig, patience: float = 0) -> Iterator["Run"]:
        """Lock the run for this process; ``patience`` and errors are those of ``run_folder``."""
        with run_folder(config.run_dir, patience):
            yield cls(config)

    @property
    def points(self) -> Points:
        """Epoch -> metrics, read from the journal now."""
        return journal.read(self.folder)

    @property
    def tracker(self) -> writer.Tracker:
        """The tracker that syncs MLflow with the journal."""
        return untracked.tracker_of(self.state.uri, self.state.run_id, self.folder)

    def track(self, workers: Workers | None, more: Mapping[str, str] | None = None) -> None:
        """Create or reopen the run in MLflow and save its id; if MLflow is off, save the tags in the run's folder.

        Args:
            workers: Ray workers that train, or None for this process.
            more: additional tags.

        Raises:
            ConfigError: the store can't be used.
        """
        config, state = self.config, self.state
        uri = store.store_of(config)
        tags = {
            "method": config.method.name,
            "method.source": METHODS.sources.get(config.method.name, "rotssl"),
            "data": config.data.name,
            "data.store": config.data.store,
            **{name: "on" if name in config.active() else "off" for name in TASKS},
            "git_commit": git_commit(),
            "config_hash": cfg.fingerprint(config),
            "world_size": str(workers.count if workers else 1),
            "status_reason": "running",
            "run_dir": str(self.folder),
            **protocols(config.evaluation),
            **({"labels_in_pretraining": how} if (how := labels_used(config)) else {}),
            **({"changed": "; ".join(state.changes)} if state.changes else {}),
            **{f"scaling.{key}": str(value) for key, value in cfg.to_dict(config)["scaling"].items()},
            **(more or {}),
        }
        if uri != OFF:
            try:
                open_in_mlflow(state, uri, config.tracking.experiment, self.folder, cfg.described(config), tags)
                return
            except ConfigError as error:
                if config.tracking.required:
                    raise
                log.warning("%s; the run goes on without it, and the same command sends it later", error)
        untracked.Untracked(self.folder).tag(tags)
        state.uri = OFF  # the run's id is kept: a later start with its store continues that run

    def train(self, workers: Workers | None, show: Callable[[Event], None], splits: Any = None) -> str:
        """Train from the current state of the run and close it.

        Args:
            workers: Ray workers to train on, or None for this process.
            show: called with each event.
            splits: the images, if the caller has them: in memory for this process, in Ray's object store for workers. None also
                if they are on disk, where the training process maps them.

        Returns:
            The new status.

        Raises:
            KeyboardInterrupt: the training was finished, and then its evaluation interrupted.
        """
        try:
            status, reason = self._train(workers, show, splits)
        except KeyboardInterrupt:
            status, reason = "interrupted", "interrupted"
        except OSError as error:
            status, reason = "failed", f"{type(error).__name__}: {error}"
        except Exception as error:  # unexpected: record it and raise it with its traceback
            self.close("failed", f"{type(error).__name__}: {error}"[:500])
            raise
        self.close(status, reason)
        self.assess(workers, lambda line: show(Note(line)))
        return status

    def assess(self, workers: Workers | None, say: Callable[[str], None] = log.info) -> None:
        """Evaluate a finished run on test by ``evaluation.protocols``, unless that is done; see ``assessment.at_end``."""
        self.assessed = assessment.at_end(self.state, self.config, workers, say) or self.assessed

    def _train(self, workers: Workers | None, show: Callable[[Event], None], splits: Any) -> tuple[str, str]:
        """Train; returns the status of the run and the reason for it."""
        state = self.state
        state.write("running")
        (self.folder / checkpoint.ASKED).unlink(missing_ok=True)
        write_whole(self.folder / "config.yaml", dump(self.config))
        with (
            alive.kept(self.folder),
            Follower(self.tracker, self.folder, self.config.train.epochs) as follower,
        ):

            def handle(event: Event) -> None:
                if isinstance(event, Missing):
                    state.missing = event.names
                follower.handle(event)
                show(event)

            try:
                failed = _train(self.config, workers, handle, splits)
            except KeyboardInterrupt:
                state.write("interrupted", "interrupted")  # first: `ray job stop` leaves three seconds
                raise
        points = self.points
        done = max(points, default=0)
        if failed is None and done == 0:
            failed = f"{self.folder / journal.Journal.NAME} is missing"
        if failed is not None:
            return "failed", failed
        if done < self.config.train.epochs:
            return "stopped", "stop_after"
        reason = health.ill(points) or "completed"
        if state.missing:
            reason += f", but {' and '.join(state.missing)} could not be measured; the same command tries again"
        return "finished", reason

    def close(self, status: str, reason: str) -> str:
        """Finish a start: plot the curve, sync MLflow with the journal, save the status. Write errors are logged, not raised.

        Returns:
            The status.
        """
        state, tracker = self.state, self.tracker
        files = [self.folder / name for name in ARTIFACTS]
        state.synced, sent = False, False

        def sync() -> None:
            nonlocal sent
            points = self.points
            if points:
                # Without validation there is only one accuracy, at the end.
                metric = "knn/top1" if any("knn/top1" in point for point in points.values()) else "loss/total"
                save_convergence({self.name: points}, self.folder / "convergence.png", metric)
            sent = tracker.sync(points, progress(points, self.config.train.epochs))

        def finish() -> None:
            state.synced = tracker.finish(MLFLOW_STATUS[status], reason, files) and sent

        failures = []

        def save() -> None:
            state.write(status, reason)

        # The status first: the others may take long, and whoever stops this process may not wait. A disk that fails at one step
        # may fail at the others too: each is tried, so that MLflow hears of the end at least.
        for step in (save, sync, finish, save, lambda: checkpoint.prune(self.folder)):
            try:
                step()
            except OSError as error:
                failures.append(error)
        state.status, state.reason = status, reason
        if failures:
            log.warning("could not update %s: %s", self.folder, failures[0])
        return status


def _train(config: ResolvedConfig, workers: Workers | None, show: Callable[[Event], None], splits: Any) -> str | None:
    """Run the engine; returns the reason for a failure that a retry would not change, or None."""
    if workers is not None:
        from rotssl.runtimes import ray_train

        return ray_train.fit(config, workers, show, splits)
    if (group := torchrun.group()) is not None:
        return torchrun.work(config, group, show)
    return _run_here(config, show, splits)


def open_in_mlflow(
    state: RunState, uri: str, experiment: str, folder: AnyPath, params: Mapping[str, Any], tags: Mapping[str, str]
) -> None:
    """Create or reopen the MLflow run of a folder with these parameters and tags, and save its id in the state."""
    # The id belongs to the store last used, even if the run continued without MLflow; another store does not know it.
    # So does a store that was moved: its id is looked for in the one that is used now.
    known = state.run_id if state.uri in (uri, OFF) or is_gone(state.uri) else None
    above = folder.parent.parent if isinstance(folder, Path) else (file_of(uri) or Path()).parent
    artifacts = above / moved.ARTIFACTS / experiment
    lost = known is None and bool(state.doubt)
    state.run_id = writer.open_run(uri, experiment, folder.name, known, dict(params), dict(tags), artifacts, lost)
    state.uri = uri


def git_commit() -> str:
    """The git commit of this checkout, or ``unknown``."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"  # an uploaded or installed copy


def _run_here(config: ResolvedConfig, show: Callable[[Event], None], splits: datasets.Splits | None) -> str | None:
    import torch

    from rotssl.engine import hardware, usage
    from rotssl.engine.runtime import LocalRuntime, RunFailed
    from rotssl.engine.trainer import Trainer

    device = torch.device("cuda" if hardware.uses_gpu(config) else "cpu")
    runtime = LocalRuntime(config.run_dir, device, show)
    try:
        with usage.sampled(config, runtime.device, show):
            splits = splits or datasets.load(config.data, config.evaluation.holdout, lambda line: show(Note(line)))
            Trainer(config, splits, runtime, journal.Journal(config.run_dir)).run()
    except (RunFailed, DataError) as error:
        return str(error)
    return None
