"""The trials of a sweep handed to Ray Tune, and how they go."""

import contextlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rotssl import config as cfg
from rotssl import lifecycle
from rotssl.config import Config
from rotssl.config.fields import ConfigError
from rotssl.config.sweep import Sweep
from rotssl.runs import journal
from rotssl.runs.state import RunState, run_folder
from rotssl.sweeps.trial import Trial, run_trial
from rotssl.tracking import store

CLOSING_S = 5  # what an actor that has just died may still need

# Of the runs in MLflow's charts, one for each thing that is compared, whatever its budget and seed.
COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")


def run_trials(
    sweep: Sweep, whole: Config, parent: RunState, chosen: list[Trial], tags: list[dict[str, str]], slots: Any
) -> None:
    """Hand the trials to Tune and show how they go."""
    from rotssl.runtimes import ray_train, ray_tune

    prunes = sweep.settings.scheduler != "none"
    data: dict[str, Any] = {}
    specs = []
    for trial, own in zip(chosen, tags, strict=True):
        key = repr((trial.config.data, trial.config.evaluation.holdout))
        if key not in data and not trial.is_done(prunes):
            data[key] = ray_train.load(trial.config)
        spec = {"tags": own, "uri": parent.uri, "data": key, "prunes": prunes}
        specs.append({"config": cfg.to_dict(trial.config), **spec})
    done = [max(journal.read(trial.config.run_dir), default=0) for trial in chosen]
    silent = {index for index, trial in enumerate(chosen) if trial.is_done(prunes)}  # they only tell the scheduler
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs")
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
    ended = 0
    outcomes: dict[int, tuple[str, str]] = {}

    def on_epoch(index: int, metrics: dict[str, Any]) -> None:
        if "outcome" in metrics:
            outcomes[index] = metrics["outcome"], metrics["reason"]
        epoch = int(metrics["epoch"])
        if epoch > done[index]:
            bar.advance(task, epoch - done[index])
            done[index] = epoch

    def on_retry(index: int) -> None:
        console.print(f"{chosen[index].title}: its worker died; going on after epoch {done[index]}", markup=False)

    def on_end(index: int, error: str | None) -> None:
        nonlocal ended
        if index in silent:
            return
        ended += 1
        trial = chosen[index]
        # While a scheduler judges an epoch the trial may finish the next one, which is in its journal.
        last = max([done[index], *journal.read(trial.config.run_dir)])
        status, reason = outcomes.get(index, ("pruned", f"stopped by {sweep.settings.scheduler} after epoch {last}"))
        if error is not None or (index not in outcomes and not prunes):
            status, reason = "failed", error or "it ended without a word"
        if status in ("pruned", "failed") and trial.record().status != status:
            # Of a trial that a scheduler stopped, the actor still waits with the lock; of one that is lost, nobody may have it.
            reason = close_trial(trial, status, reason, locked=status == "failed")
        line = _line(trial) if status == "finished" else f"{trial.title}: {status}: {reason}"
        console.print(f"[{ended}/{len(chosen) - len(silent)}] {line}", markup=False)

    with bar:
        task = bar.add_task(sweep.name, total=sum(t.config.train.epochs for t in chosen), completed=sum(done))
        ray_tune.run(
            run_trial,
            specs,
            [trial.config for trial in chosen],
            silent,
            slots,
            sweep.settings,
            data,
            whole.run_dir / "tune",
            on_epoch,
            on_retry,
            on_end,
        )


def tags_of(sweep: Sweep, parent: RunState, trials: Sequence[Trial]) -> list[dict[str, str]]:
    """What MLflow's pages can sort and colour the trials by."""
    arms = list(dict.fromkeys(_arm(trial) for trial in trials))
    return [
        {
            store.PARENT: str(parent.run_id),
            "kind": "trial",
            "sweep": sweep.name,
            "cell": trial.label,
            "seed": str(trial.config.train.seed),
            "budget": str(trial.config.train.epochs),
            "mlflow.runColor": COLORS[arms.index(_arm(trial)) % len(COLORS)],
        }
        for trial in trials
    ]


def _arm(trial: Trial) -> str:
    return " ".join(part for part in trial.label.split(" ") if not part.startswith("train.epochs="))


def close_trial(trial: Trial, status: str, reason: str, locked: bool) -> str:
    """Record how a trial ended that could not do so itself; returns the reason, or why that was not possible."""
    try:
        with run_folder(trial.config, CLOSING_S) if locked else contextlib.nullcontext():
            record = trial.record()
            if record.run_id is not None:
                lifecycle.close(trial.config, record, status, reason)
            else:  # it never came to be a run
                record.write(status, reason)
    except (ConfigError, OSError) as error:
        return f"{reason} ({error})"
    return reason


def _line(trial: Trial) -> str:
    points, record = journal.read(trial.config.run_dir), trial.record()
    last = points[max(points)]
    knn = f"kNN {last['knn/top1']:.1%}, " if "knn/top1" in last else ""
    also = "" if record.reason == "completed" else f"; {record.reason}"
    return f"{trial.title}: {knn}{last['cost/train_seconds']:.1f} s{also}"
