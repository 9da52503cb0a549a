"""A sweep on disk and in MLflow, and its trials on Ray Tune."""

import contextlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from rotssl import config as cfg
from rotssl import lifecycle
from rotssl.base import show
from rotssl.base.address import without_login
from rotssl.base.paths import AnyPath, at, write_whole
from rotssl.config.fields import ConfigError
from rotssl.config.sections import OFF
from rotssl.config.sweep import Sweep
from rotssl.config.tasks import WEIGHTS
from rotssl.runs.state import RunState, run_folder
from rotssl.runtimes.ray_tune import Slots
from rotssl.sweeps.trial import Trial, run_trial
from rotssl.tracking import reader, store, writer

CLOSING_S = 5  # seconds that a dying actor may still hold its folder
# Colours of the runs in MLflow's charts, one for each variant, regardless of budget and seed.
COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")


class SweepRun:
    """A started sweep: its trials, its folder and its run in MLflow.

    Args:
        sweep: as read from its file.
        trials: all its trials.

    Raises:
        ConfigError: its state can't be read.
    """

    def __init__(self, sweep: Sweep, trials: Sequence[Trial]) -> None:
        config = trials[0].config
        self.sweep, self.trials = sweep, trials
        self.experiment = config.tracking.experiment
        self.folder = at(config.storage.path) / self.experiment / sweep.name
        self._tune = Path(tempfile.gettempdir()) / f"rotssl-tune-{os.getpid()}"
        self.uri = store.store_of(config)
        self.prunes = sweep.settings.scheduler != "none"
        self.state = RunState.read(self.folder / "run.json", {})

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Lock the sweep for this process within the body."""
        with run_folder(self.folder):
            self.state = RunState.read(self.folder / "run.json", {})
            yield

    @property
    def todo(self) -> list[Trial]:
        """The trials that are not done."""
        return [trial for trial in self.trials if not trial.is_done(self.prunes)]

    def open(self) -> None:
        """Create or reopen the sweep's run in MLflow.

        Raises:
            ConfigError: the store can't be used.
        """
        sweep = self.sweep
        axes = {**sweep.grid, **{key: {kind: values} for key, (kind, values) in sweep.distributions.items()}}
        lines = [f"- `{key}`: {values}" for key, values in axes.items()]
        tags = {
            "kind": "sweep",
            "sweep": sweep.name,
            "git_commit": lifecycle.git_commit(),
            "status_reason": "running",
            "run_dir": str(self.folder),
            "sweep.axes": json.dumps(list(dict.fromkeys([*axes, *WEIGHTS]))),  # a baseline differs in the weights
            "mlflow.note.content": "\n".join(
                [f"Sweep of `{sweep.file.name}`, {sweep.settings.seeds} seed(s):", "", *lines]
            ),
            **{f"sweep.{key}": str(value) for key, value in vars(sweep.settings).items()},
        }
        lifecycle.open_in_mlflow(self.state, self.uri, self.experiment, self.folder, {}, tags)
        self.state.write("running")

    def tags(self) -> dict[str, dict[str, str]]:
        """The MLflow tags of each trial, by name, for sorting and colouring in its UI."""
        arms = list(dict.fromkeys(_arm(trial) for trial in self.trials))
        return {
            trial.name: {
                store.PARENT: str(self.state.run_id),
                "kind": "trial",
                "sweep": self.sweep.name,
                "cell": trial.label,
                "seed": str(trial.config.train.seed),
                "budget": str(trial.config.train.epochs),
                "mlflow.runColor": COLORS[arms.index(_arm(trial)) % len(COLORS)],
            }
            for trial in self.trials
        }

    def run(self, chosen: Sequence[Trial], slots: Slots) -> None:
        """Run trials with Tune and show their progress.

        Args:
            chosen: trials in the order in which they start; finished ones only replay their results for the scheduler.
            slots: from ``ray_tune.plan_slots``.
        """
        from rotssl.runtimes import ray_methods, ray_train, ray_tune

        methods = ray_methods.packed(trial.config.method.name for trial in chosen)
        data: dict[str, Any] = {}
        specs, tags = [], self.tags()
        for trial in chosen:
            key = repr((trial.config.data, trial.config.evaluation.holdout))
            if key not in data and not trial.is_trained(self.prunes):
                data[key] = ray_train.load(trial.config)
            spec = {"tags": tags[trial.name], "uri": self.state.uri, "data": key, "prunes": self.prunes}
            spec |= {"credentials": store.credentials(), "methods": methods}
            specs.append({"config": cfg.to_dict(trial.config), **spec})
        with SweepProgress(self.sweep, chosen, self.prunes) as progress:
            for ref in filter(None, data.values()):
                ray_train.data_lines(ref).add_done_callback(progress.on_data)
            trained = {index for index, trial in enumerate(chosen) if trial.is_trained(self.prunes)}
            work = ray_tune.Work(run_trial, specs, [trial.config for trial in chosen], trained, data)
            ray_tune.run(work, slots, self.sweep.settings, self._tune, progress)

    def close_interrupted(self) -> None:
        """Close the trials that were running when ``run`` was interrupted; call this only once their actors are gone."""
        shutil.rmtree(self._tune, ignore_errors=True)
        for trial in self.trials:
            if trial.state().status == "running":
                close_trial(trial, "interrupted", "interrupted", locked=True)

    def publish(self) -> bool:
        """Send MLflow the trials that it lacks because it was unreachable or lost them; returns whether it has all of them.

        Raises:
            ConfigError: the store can't be used.
        """
        known = reader.run_ids(self.uri, self.experiment) if not store.reachable(self.uri) else None
        if known is None:
            return False
        if self.state.run_id not in known:
            self.open()
        complete, tags = True, self.tags()
        for trial in self.trials:
            run = lifecycle.Run(trial.config)
            state = run.state
            lost = state.run_id not in known or not state.synced or state.uri == OFF  # off: resumed by jobs/pretrain.py
            if state.status in ("finished", "pruned", "failed") and lost and run.points:
                run.track(trial.workers, tags[trial.name])
                run.close(state.status, state.reason)
                complete = complete and state.synced
        return complete

    def close(self, status: str, reason: str, ids: Sequence[str]) -> None:
        """Close the sweep's own run.

        Args:
            status: a status of a run.
            reason: text that explains it.
            ids: ids of its trials in MLflow, which records only one parent for trials shared by sweeps.
        """
        listed = self.folder / "trials.json"
        write_whole(listed, json.dumps(ids) + "\n")
        tracker = writer.Tracker(self.state.uri, str(self.state.run_id))
        self.state.synced = tracker.finish(lifecycle.MLFLOW_STATUS[status], reason, [self._file(), listed])
        self.state.write(status, reason)

    def _file(self) -> AnyPath:
        """The sweep's file, or a copy without logins: a flag may have replaced an address that has one."""
        text = self.sweep.file.read_text()
        if without_login(text) == text:
            return self.sweep.file
        copy = self.folder / self.sweep.file.name
        write_whole(copy, without_login(text))
        return copy


def counts(states: Sequence[RunState]) -> str:
    """The number of trials with each status, in words."""
    words = {"running": "cut short", "pruned": "stopped early"}
    found = Counter(state.status for state in states)
    return ", ".join(f"{count} {words.get(status, status)}" for status, count in sorted(found.items()))


def _arm(trial: Trial) -> str:
    return " ".join(part for part in trial.label.split(" ") if not part.startswith("train.epochs="))


class SweepProgress:
    """Shows the progress of trials and closes those that could not close themselves; a context manager, called by Tune's driver.

    Args:
        sweep: as read from its file.
        trials: the trials, in the order of Tune's indices.
        prunes: whether a scheduler may stop trials.

    Attributes:
        silent: indices of finished trials, which only replay their results for the scheduler.
    """

    def __init__(self, sweep: Sweep, trials: Sequence[Trial], prunes: bool) -> None:
        self.sweep, self.trials, self.prunes = sweep, trials, prunes
        self.done = [trial.epochs_done for trial in trials]
        self.silent = {index for index, trial in enumerate(trials) if trial.is_done(prunes)}
        self.ended, self.left, self.said = 0, False, set[str]()
        self.outcomes: dict[int, tuple[str, str]] = {}
        self.console = show.progress_console()
        self.bar = show.bar(self.console, "epochs")
        epochs = sum(trial.config.train.epochs for trial in trials)
        self.task = self.bar.add_task(sweep.name, total=epochs, completed=sum(self.done))

    def __enter__(self) -> "SweepProgress":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.left = True  # a thread of Tune's may go on: to lose its cluster is no failure of a trial
        self.bar.stop()

    def on_data(self, lines: Future[tuple[str, ...]]) -> None:
        """Show what there is to say about the images; of those that cannot be read each trial reports the error."""
        if not self.left and lines.exception() is None:
            for line in lines.result():
                if line not in self.said:
                    self.said.add(line)
                    self._print(line)

    def on_epoch(self, index: int, metrics: dict[str, Any]) -> None:
        """Handle a finished epoch of a trial, or its outcome."""
        if "outcome" in metrics:
            self.outcomes[index] = metrics["outcome"], metrics["reason"]
        epoch = int(metrics["epoch"])
        if epoch > self.done[index]:
            self.bar.advance(self.task, epoch - self.done[index])
            self.done[index] = epoch

    def on_retry(self, index: int) -> None:
        """Report that a trial's actor died and is restarted."""
        if not self.left:
            self._print(f"{self.trials[index].title}: its worker died; resuming after epoch {self.done[index]}")

    def on_end(self, index: int, error: str | None) -> None:
        """Handle the end of a trial; ``error`` says why its actor died for good."""
        if self.left or index in self.silent:
            return
        self.ended += 1
        trial = self.trials[index]
        # While a scheduler judges an epoch, the trial may finish the next one, which is then in its journal.
        last = max(self.done[index], trial.epochs_done)
        stopped = "pruned", f"stopped by {self.sweep.settings.scheduler} after epoch {last}"
        status, reason = self.outcomes.get(index, stopped)
        if error is not None or (index not in self.outcomes and not self.prunes):
            status, reason = "failed", error or "the trial ended without reporting an outcome"
        if status in ("pruned", "failed") and trial.state().status != status:
            # The actor of a stopped trial still holds the lock while it waits; nobody may hold the lock of a lost trial.
            reason = close_trial(trial, status, reason, locked=status == "failed")
        line = _line(trial) if status == "finished" else f"{trial.title}: {status}: {reason}"
        self._print(f"[{self.ended}/{len(self.trials) - len(self.silent)}] {line}")

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False)


def close_trial(trial: Trial, status: str, reason: str, locked: bool) -> str:
    """Save the outcome of a trial that could not save it itself; returns the reason, extended by an error if that failed.

    Args:
        trial: the trial, whose actor is gone or waits.
        status: status to save.
        reason: text that explains it.
        locked: whether to lock the trial's folder for that.
    """
    try:
        with run_folder(trial.folder, CLOSING_S) if locked else contextlib.nullcontext():
            run = lifecycle.Run(trial.config)
            if run.state.run_id is not None:
                run.close(status, reason)
            else:  # it died before it was opened in MLflow
                run.state.write(status, reason)
    except (ConfigError, OSError) as error:
        return f"{reason} ({error})"
    return reason


def _line(trial: Trial) -> str:
    run = lifecycle.Run(trial.config)
    last = run.points[max(run.points)]
    knn = f"kNN {last['knn/top1']:.1%}, " if "knn/top1" in last else ""
    also = "" if run.state.reason == "completed" else f"; {run.state.reason}"
    return f"{trial.title}: {knn}{last['cost/train_seconds']:.1f} s{also}"
