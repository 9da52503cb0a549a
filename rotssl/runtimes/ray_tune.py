"""Ray Tune: runs the trials of a sweep.

Tune is used only for scheduling. The configuration and progress of a trial are in its own folder, so no state of Tune is kept
between starts: each trial first reports the epochs in its journal, which restores the scheduler's state.
"""

import logging
import os
import shutil
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rotssl.config import ResolvedConfig
from rotssl.config.fields import ConfigError
from rotssl.config.identity import is_baseline
from rotssl.config.sweep import SweepConfig
from rotssl.runtimes import watch
from rotssl.runtimes.attempts import MAX_FAILURES
from rotssl.runtimes.ray_cluster import import_ray

# Read by Tune when it is imported.
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the journals and MLflow have everything
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # we handle interrupts
    "RAY_AIR_NEW_OUTPUT": "0",
}
METRIC = "knn/top1"
RAY_UNITS = 10_000  # Ray's resolution: smallest units per whole resource


def _import_tune() -> Any:
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import_ray()
    from ray import tune
    from ray.tune.execution import class_cache

    # Tune would copy them into the actors' runtime environment, which Ray writes into its logs. Trials get them by their spec.
    class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
    return tune


@dataclass(frozen=True)
class Slots:
    """The number of concurrent trials and the resources of each.

    ``workers`` is 1 for trials that run in their Tune actor, else the number of Ray Train workers that each trial starts.
    ``resources`` are those that the Tune actor itself reserves.
    """

    count: int
    workers: int
    use_gpu: bool
    resources: dict[str, float]


def plan_slots(config: ResolvedConfig, settings: SweepConfig, nodes: Sequence[Mapping[str, Any]]) -> Slots:
    """Slots for trials on the nodes of a cluster.

    Args:
        config: configuration of any trial; all share the section scaling.
        settings: settings of the sweep.
        nodes: nodes of the cluster, from ray.nodes().

    Raises:
        ConfigError: a trial doesn't fit, or fewer concurrent trials fit than requested.
    """
    scaling = config.scaling
    workers = max(1, int(scaling.num_workers)) if scaling.num_workers != "auto" else 1
    alive = [node["Resources"] for node in nodes if node.get("Alive", True)]
    gpus, cpus = (sum(int(node.get(kind, 0)) for node in alive) for kind in ("GPU", "CPU"))
    use_gpu = gpus > 0 if scaling.use_gpu == "auto" else scaling.use_gpu
    if use_gpu and gpus == 0:
        raise ConfigError("scaling.use_gpu: got true, but the cluster has no GPU")
    share = 1.0 if settings.gpus_per_trial == "auto" else settings.gpus_per_trial
    units = max(1, round(share * RAY_UNITS))
    if share < 1 and workers > 1:
        raise ConfigError(
            f"sweep.gpus_per_trial: got {share}, expected auto: each of the {workers} workers uses a whole GPU"
        )

    def places(node: Mapping[str, Any]) -> int:
        """The number of workers that fit on a node."""
        room = int(node.get("CPU", 0)) // scaling.cpus_per_worker
        # A worker does not span two GPUs: count the workers per GPU, times the GPUs.
        return min(room, int(node.get("GPU", 0)) * (RAY_UNITS // units)) if use_gpu else room

    fit = sum(map(places, alive)) // workers
    each = f"{workers} x {scaling.cpus_per_worker} CPU" + (f" and {share:g} GPU" if use_gpu else "")
    if fit == 0:
        key = "scaling.num_workers" if workers > 1 else "scaling.cpus_per_worker"
        given = workers if workers > 1 else scaling.cpus_per_worker
        raise ConfigError(
            f"{key}: got {given}, but a trial of {each} does not fit into the cluster ({cpus} CPUs, {gpus} GPUs)"
        )
    asked = settings.concurrency
    if asked != "auto" and asked > fit:
        raise ConfigError(
            f"sweep.concurrency: got {asked}, expected at most {fit}: "
            f"a trial needs {each}, the cluster has {cpus} CPUs and {gpus} GPUs"
        )
    resources = {"CPU": float(scaling.cpus_per_worker), **({"GPU": share} if use_gpu else {})}
    if workers > 1:
        # A Tune actor must reserve something, which its own workers then can't use: one byte of memory.
        resources = {"memory": 1.0}
    return Slots(fit if asked == "auto" else asked, workers, use_gpu, resources)


Report = Callable[[int, Mapping[str, float]], None]
Body = Callable[[Any, Any, Report], None]


def _trial(config: dict[str, Any], body: Body, specs: Sequence[Any], shared: Any) -> None:
    """The body of a Tune actor."""
    from ray import tune

    def report(epoch: int, metrics: Mapping[str, float]) -> None:
        tune.report({"epoch": epoch, **metrics})

    body(specs[config["trial"]], shared, report)


def comparable(config: ResolvedConfig) -> Hashable:
    """A key shared by trials whose accuracies at the same epoch can be compared: method, data set, budget and evaluation.

    The evaluation includes its frequency, because a rung between two evaluations uses the next one.
    """
    return config.method.name, config.data, config.evaluation, config.train.epochs


def scheduler(settings: SweepConfig, configs: Sequence[ResolvedConfig], done: Collection[int] = ()) -> Any:
    """Tune's scheduler for the trials of these configurations, identified by their index.

    Trials are compared only within one method, data set and budget, by our epochs. Three kinds of trials report their accuracy
    but are never stopped: baselines, trials in their last epoch, and finished trials, which only replay their results.

    Args:
        settings: settings of the sweep.
        configs: configurations of the trials.
        done: indices of finished trials.
    """
    _import_tune()
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

    common = {"time_attr": "epoch", "metric": METRIC, "mode": "max"}

    def make(budget: int) -> Any:
        grace = min(settings.grace_epochs, budget)
        if settings.scheduler == "asha":
            return ASHAScheduler(**common, max_t=budget, grace_period=grace, reduction_factor=settings.reduction_factor)
        return MedianStoppingRule(**common, grace_period=grace, min_samples_required=2)

    class WithinBudget(FIFOScheduler):  # type: ignore[misc]
        """Passes each trial to the scheduler of the trials that it can be compared with."""

        def __init__(self) -> None:
            super().__init__()
            self.parts: dict[Hashable, Any] = {}
            self.seen: dict[int, int] = {}  # last epoch of each trial: a restarted trial reports its epochs again

        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            config = configs[trial.config["trial"]]
            part = self.parts.setdefault(comparable(config), make(config.train.epochs))
            part.on_trial_add(tune_controller, trial)

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            index = trial.config["trial"]
            config, epoch = configs[index], int(result["epoch"])
            if epoch <= self.seen.get(index, 0) or METRIC not in result:
                return TrialScheduler.CONTINUE  # type: ignore[no-any-return]
            self.seen[index] = epoch
            part = self.parts[comparable(config)]
            stays = index in done or is_baseline(config) or epoch >= config.train.epochs
            if stays and settings.scheduler == "median":
                # Tune's rule fails on results that follow its decision to stop, so report this one as the last.
                part.on_trial_complete(tune_controller, trial, result)
                return TrialScheduler.CONTINUE  # type: ignore[no-any-return]
            action = part.on_trial_result(tune_controller, trial, result)
            return TrialScheduler.STOP if action == TrialScheduler.STOP and not stays else TrialScheduler.CONTINUE  # type: ignore[no-any-return]

    return FIFOScheduler() if settings.scheduler == "none" else WithinBudget()


class Watcher(Protocol):
    """Receives the progress of trials, identified by their index."""

    def on_epoch(self, index: int, metrics: dict[str, Any]) -> None:
        """Handle a report of a trial: ``epoch`` and its metrics."""

    def on_retry(self, index: int) -> None:
        """Handle the death and restart of a trial's actor."""

    def on_end(self, index: int, error: str | None) -> None:
        """Handle the end of a trial, once for each; ``error`` says why its actor died for good."""


@dataclass(frozen=True)
class Work:
    """The trials for Tune to run.

    Attributes:
        body: module-level function, called in a Tune actor with a trial's spec, ``shared`` and a function that reports an epoch.
        specs: one for each trial.
        configs: configurations of the trials, for the scheduler.
        done: indices of finished trials, which only replay their results for the scheduler.
        shared: passed to every trial; may hold references into Ray's object store.
    """

    body: Body
    specs: Sequence[Any]
    configs: Sequence[ResolvedConfig]
    done: Collection[int]
    shared: Any


def run(work: Work, slots: Slots, settings: SweepConfig, scratch: Path, watcher: Watcher) -> None:
    """Run the trials in order, as many concurrently as there are slots.

    Args:
        work: the trials.
        slots: from ``plan_slots``.
        settings: settings of the sweep.
        scratch: folder of this machine for Tune's own files. It is removed at the end, but not if that is an interrupt or the
            loss of the head: then a thread of Tune's may write into it until Ray is left.
        watcher: receives the progress of the trials.

    Raises:
        HeadGone: the head of the cluster does not answer any more.
    """
    tune = _import_tune()
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the watcher reports a dead worker in one line
    shutil.rmtree(scratch, ignore_errors=True)
    trainable = tune.with_parameters(_trial, body=work.body, specs=list(work.specs), shared=work.shared)
    tuner = tune.Tuner(
        tune.with_resources(trainable, slots.resources),
        param_space={"trial": tune.grid_search(list(range(len(work.specs))))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=slots.count,
            scheduler=scheduler(settings, work.configs, work.done),
            # cuBLAS can be made deterministic only before its first use in a process.
            reuse_actors=slots.workers == 1 and not any(config.train.deterministic for config in work.configs),
        ),
        run_config=tune.RunConfig(
            name=scratch.name,
            storage_path=str(scratch.parent),
            verbose=0,
            callbacks=[_callback(watcher)],
            progress_reporter=tune.CLIReporter(),  # silent with verbose 0; Tune's own for notebooks would clear the cell
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
        ),
    )
    head = watch.Head(import_ray().get_runtime_context().gcs_address)
    try:
        head.until_done(tuner.fit)
    except watch.HeadGone:
        raise
    except Exception as error:
        if line := head.gone():
            raise watch.HeadGone(line) from error
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(scratch, ignore_errors=True)


def _callback(watcher: Watcher) -> Any:
    """A callback that passes Tune's events to a watcher; it replaces Tune's own, which prints."""
    from ray.tune.progress_reporter import TrialProgressCallback

    class Tell(TrialProgressCallback):  # type: ignore[misc]
        def __reduce__(self) -> tuple[Any, ...]:
            return TrialProgressCallback, ()  # for Tune's record of the experiment, which is never read

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
        ) -> None:
            watcher.on_epoch(trial.config["trial"], result)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            watcher.on_end(trial.config["trial"], None)

        def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            watcher.on_retry(trial.config["trial"])

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            lines = [line.strip() for line in str(trial.get_error() or "").splitlines() if line.strip()]
            watcher.on_end(trial.config["trial"], (lines or ["its worker died"])[-1][:300])

    return Tell()
