"""The trials of a sweep: ordinary runs in folders named by their configurations."""

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rotssl import config as cfg
from rotssl import lifecycle
from rotssl.base.paths import AnyPath
from rotssl.config import ResolvedConfig
from rotssl.config.fields import ConfigError
from rotssl.config.identity import run_name
from rotssl.config.sweep import Sweep, expand
from rotssl.data import datasets
from rotssl.data.images import DataError
from rotssl.engine.events import EpochDone, Event
from rotssl.runs import journal
from rotssl.runs.state import Busy, RunState
from rotssl.runtimes.ray_cluster import Workers

log = logging.getLogger(__name__)
# An actor that lost its driver needs some seconds to notice.
PATIENCE_S = 90


@dataclass(frozen=True)
class Trial:
    """A run of the sweep: its resolved configuration, a label of the varied fields, and the number of training images."""

    config: ResolvedConfig
    label: str
    train_size: int

    @property
    def name(self) -> str:
        """The run's name, determined by its configuration."""
        return self.config.tracking.run_name

    @property
    def title(self) -> str:
        """Label and seed, for display."""
        return f"{self.label} seed={self.config.train.seed}"

    @property
    def workers(self) -> Workers | None:
        """Its Ray Train workers; None if the engine runs in Tune's worker."""
        count = self.config.scaling.num_workers
        return Workers(int(count), self.config.scaling.use_gpu is True, 1) if count else None

    @property
    def folder(self) -> AnyPath:
        """The folder of its run."""
        return self.config.run_dir

    @property
    def epochs_done(self) -> int:
        """Number of epochs in its journal now."""
        return max(journal.read(self.folder), default=0)

    def state(self) -> RunState:
        """The state of its run, read from disk."""
        return RunState.of(self.config)

    def is_done(self, prunes: bool) -> bool:
        """Whether nothing is left to do; a trial stopped by a scheduler is done for a sweep with a scheduler."""
        return self.is_trained(prunes) and not self.state().to_test(self.config)

    def is_trained(self, prunes: bool) -> bool:
        """Whether nothing is left to train; its evaluation on test may be."""
        state = self.state()
        return state.is_done or (prunes and state.status == "pruned")


def trials_of(
    sweep: Sweep, say: Callable[[str], None] = log.info, warn: Callable[[str], None] = log.warning
) -> list[Trial]:
    """The trials that a sweep expands to, each once.

    Args:
        sweep: as read from its file.
        say: called with a line for each data set about where its images will be stored.
        warn: called with a line for each size that had to be reduced.

    Raises:
        ConfigError: a configuration or its data cannot be used.
    """
    trials: dict[str, Trial] = {}
    cut, places = list[str](), list[str]()
    infos: dict[tuple[Any, float], datasets.DataInfo] = {}
    placed: set[tuple[Any, float]] = set()
    for cell in expand(sweep):
        key = cell.config.data, cell.config.evaluation.holdout
        if key not in infos:
            infos[key] = datasets.inspect(*key)
        asked = cell.config
        if asked.scaling.num_workers in ("auto", 1):  # one worker needs no Ray Train: the engine runs in Tune's worker
            asked = cfg.replace(asked, {"scaling.num_workers": 0})
            cfg.check_workers(asked, 1)
        config, info = lifecycle.prepare(asked, infos[key], cut.append)
        if key not in placed:
            placed.add(key)
            places.append(datasets.describe_storage(config.data, config.evaluation.holdout, info, here=False))
        every, epochs = config.evaluation.knn_every, config.train.epochs
        if sweep.settings.scheduler != "none" and (every == "auto" or not 0 < every <= max(1, epochs - 1)):
            raise ConfigError(
                f"evaluation.knn_every: got {every}, but {sweep.settings.scheduler} needs kNN before the last of {epochs} epochs"
            )
        if sweep.settings.scheduler != "none" and config.evaluation.holdout == 0:
            raise ConfigError(
                f"evaluation.holdout: got 0, expected more: {sweep.settings.scheduler} needs kNN on validation"
            )
        config = cfg.replace(config, {"tracking.run_name": run_name(config)})
        trials.setdefault(config.tracking.run_name, Trial(config, cell.label, info.train_size))
    for line in dict.fromkeys(cut):
        warn(line)
    for line in places:
        say(line)
    return list(trials.values())


def run_trial(spec: Mapping[str, Any], data: Mapping[str, Any], report: Any) -> None:
    """Run one trial in a Tune actor: report the epochs of earlier starts, train to the end and report the outcome.

    Errors are reported, not raised: after an exception Tune would retry at once, which is meant for actors that die.

    Args:
        spec: its configuration and tags.
        data: references to the images; None for those on disk.
        report: called with an epoch and its metrics, finally with ``outcome`` and ``reason``; ends this function if the
            scheduler stops the trial.
    """
    from rotssl.runtimes import ray_methods

    os.environ.update(spec["credentials"])
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    told = 0

    def tell(epoch: int, metrics: Mapping[str, float]) -> None:
        nonlocal told
        if epoch > told:
            told = epoch
            report(epoch, metrics)

    try:
        ray_methods.unpack(spec["methods"])
        with lifecycle.Run.held(cfg.from_dict(spec["config"]), PATIENCE_S) as run:
            outcome = _go_on(run, spec, data, tell)
    except Busy as error:
        outcome = "busy", str(error)
    except Exception as error:  # of any kind: the other trials continue, and the sweep's driver records it
        outcome = "failed", f"{type(error).__name__}: {error}"[:500]
    report(told, dict(zip(("outcome", "reason"), outcome, strict=True)))


def _go_on(
    run: lifecycle.Run,
    spec: Mapping[str, Any],
    data: Mapping[str, Any],
    tell: Callable[[int, Mapping[str, float]], None],
) -> tuple[str, str]:
    """Run the trial from its current state; returns its status and the reason."""
    from rotssl.runtimes import ray_cluster, ray_gauges

    def show(event: Event) -> None:
        if isinstance(event, EpochDone):
            tell(event.epoch, event.metrics)

    state = run.state
    done = state.is_done or (spec["prunes"] and state.status == "pruned")
    if not done:
        state.write("running")
    for epoch, metrics in sorted(run.points.items()):
        tell(epoch, metrics)
    if done:
        run.assess(None)
        return state.status, state.reason
    with contextlib.ExitStack() as stack:
        nested = run.config.scaling.num_workers != 0
        workers = stack.enter_context(ray_cluster.connected(run.config)) if nested else None
        try:
            run.track(workers, spec["tags"])
        except ConfigError as error:
            # The store may be unreachable for a moment: the journal has everything, and the driver sends it at the end.
            log.warning("%s: %s", run.name, error)
            state.uri = state.uri or spec["uri"]
        try:
            images = data[spec["data"]]  # None: on disk
            images = images if nested or images is None else ray_cluster.fetch(images)
        except DataError as error:
            return run.close("failed", str(error)), str(error)
        seen = show if nested else ray_gauges.gauged(run.config, show)  # Ray Train's driver has them itself
        return run.train(workers, seen, images), state.reason
