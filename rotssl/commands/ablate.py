"""The driver of a sweep: it selects the trials to run, checks that they can run, runs them and writes the report.

A trial is a run like those of jobs/pretrain.py, in a folder named by its configuration. A sweep that is started again finds the
finished trials there, resumes the others and adds new ones. No other state is kept.
"""

import builtins
import contextlib
import functools
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rotssl.commands import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, pretrain, say, signals
from rotssl.config.fields import ConfigError
from rotssl.config.sweep import SweepCommand
from rotssl.runs.state import check_writable
from rotssl.runtimes.ray_tune import Slots
from rotssl.runtimes.watch import HeadGone
from rotssl.sweeps.run import SweepRun, counts
from rotssl.sweeps.trial import Trial, trials_of
from rotssl.tracking import store

if TYPE_CHECKING:
    from rotssl.commands.compare import Report

# Flushed at once, also into the log of a job.
print = functools.partial(builtins.print, flush=True)


def run(command: SweepCommand) -> int:
    """Carry out jobs/ablate.py; returns the exit code. Errors are those of ``perform``."""
    return perform(command)[1]


def perform(command: SweepCommand, show: "Callable[[Report], None] | None" = None) -> tuple[SweepRun, int]:
    """Run what is missing of a sweep.

    Args:
        command: the sweep.
        show: called with the comparison of its trials; None: it is printed.

    Returns:
        The sweep, and the exit code.

    Raises:
        ConfigError: the sweep file, the cluster, the store or an earlier start does not allow it.
    """
    sweep = SweepRun(command.sweep, trials_of(command.sweep, print, say))
    if command.resume and not (sweep.folder / "run.json").exists():
        raise ConfigError(f"--resume: no sweep was started in {sweep.folder}")
    check_writable(sweep.folder)
    states = [trial.state() for trial in sweep.trials]
    for line in dict.fromkeys(state.doubt for state in states if state.doubt):
        say(line)
    changes = Counter((line, state.status == "finished") for state in states for line in state.changes)
    for (line, finished), count in changes.items():
        print(f"{line} in {count} trials" + (" (no effect: they are finished)" if finished else ""))
    todo = sweep.todo
    again = " (including failed ones)" if any(state.status == "failed" for state in states) else ""
    print(f"sweep {command.sweep.name}: {len(states)} trials: {counts(states)}; {len(todo)} to run{again}")
    if command.dry_run:
        if todo:
            _start(sweep, todo, dry_run=True)
        return sweep, EXIT_OK
    with _sigterm_interrupts(), sweep.held():
        if not todo:
            print("nothing to do: all trials are already finished")
            return sweep, _conclude(sweep, show=show)
        return sweep, _conclude(sweep, _start(sweep, todo, dry_run=False), show)


def _start(sweep: SweepRun, todo: list[Trial], dry_run: bool) -> int:
    """Check that the trials can run and, unless it is a dry run, run them; returns the exit code."""
    from rotssl.runtimes import ray_cluster, ray_tune

    settings, config = sweep.sweep.settings, todo[0].config
    with ray_cluster.connected(config) as cluster, _sigterm_interrupts():  # Ray sets a handler of its own
        slots = ray_tune.plan_slots(config, settings, ray_cluster.nodes())
        store.check_store(sweep.uri, cluster.nodes)
        kind = "in Tune's workers" if slots.workers == 1 else f"on {slots.workers} Ray Train workers"
        gpus = f" and {slots.resources.get('GPU', 1):g} GPU" if slots.use_gpu else ""
        each = f"{config.scaling.cpus_per_worker} CPU{gpus}"
        print(f"cluster: {cluster.nodes} node(s), {slots.count} concurrent trials {kind}, {each} per worker")
        print(f"working directory: {_megabytes(Path.cwd())}")
        left = _check(sweep, todo, slots, cluster.nodes)
        if dry_run:
            return EXIT_OK
        sweep.open()
        # Long trials first, so that the last ones are short. With a scheduler, finished trials first: they restore its state.
        if settings.scheduler == "none":
            chosen = sorted(todo, key=lambda trial: -left[trial.name])
        else:
            chosen = [*(trial for trial in sweep.trials if trial.name not in left), *todo]
        try:
            sweep.run(chosen, slots)
            return EXIT_OK
        # The trials are closed below, once the cluster is down and no actor holds a folder.
        except KeyboardInterrupt:
            code = EXIT_INTERRUPTED
        except HeadGone as error:
            say(f"failed: {error}")
            code = EXIT_FAILED
    sweep.close_interrupted()
    return code


def _check(sweep: SweepRun, todo: list[Trial], slots: Slots, nodes: int) -> dict[str, float]:
    """Check the nodes and print an estimate of the trials' cost; returns the remaining seconds of each trial, by name."""
    from rotssl.runtimes import preflight

    folder = sweep.folder
    if isinstance(folder, Path):  # a dry run leaves no trace: the nearest folder that is there is checked
        folder = next(path for path in (folder, *folder.parents) if path.exists())
    estimate = preflight.start_estimate([t.config for t in todo], [t.train_size for t in todo], slots)
    roots = sorted({str(trial.config.data.root) for trial in todo if trial.config.data.root})
    methods = sorted({trial.config.method.name for trial in todo})
    preflight.check_nodes(folder, sweep.uri, roots, methods)
    print(f"code, storage, data and tracking: the same on the driver and on {nodes} node(s)")
    if slots.workers > 1:
        seconds = preflight.check_collective(todo[0].config, slots)
        print(f"collective: two workers communicated, {seconds:.0f} s")
    else:
        print("collective: not needed, each trial has one worker")
    whole = preflight.estimated(estimate)
    left = [_share_left(t) * s for t, s in zip(todo, whole or [0.0] * len(todo), strict=True)]
    if whole is None:
        print("no estimate: the cluster is busy; the trials will queue")
    else:
        wall = max(sum(left) / min(slots.count, len(todo)), *left)
        devices = slots.workers * slots.resources.get("GPU", 1.0)
        print(
            f"estimate: {_duration(sum(left) * devices)} of device time, {_duration(wall)} of wall time "
            "(from a few timed steps; without start-up and communication)"
        )
    return dict(zip((trial.name for trial in todo), left, strict=True))


def _duration(seconds: float) -> str:
    for size, unit in ((1, "s"), (60, "min")):
        if seconds < 100 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"


def _share_left(trial: Trial) -> float:
    return 1 - trial.epochs_done / trial.config.train.epochs


def _megabytes(folder: Path) -> str:
    """Size of the files that a job uploads from here: all except those in .rayignore."""
    ignored = folder / ".rayignore"
    lines = [line for line in ignored.read_text().split() if line.endswith("/")] if ignored.exists() else []
    anywhere, total = {line.rstrip("/") for line in lines}, 0
    for path, folders, files in os.walk(folder):
        top = "/" if Path(path) == folder else ""  # entries that begin with a slash apply to the top folder only
        folders[:] = [name for name in folders if name not in anywhere and top + name not in anywhere]
        for name in files:
            with contextlib.suppress(OSError):  # deleted meanwhile
                total += os.lstat(os.path.join(path, name)).st_size
    return f"{total / 1e6:.1f} MB"


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signals.interrupt)  # what `ray job stop` sends
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(sweep: SweepRun, ids: Sequence[str], show: "Callable[[Report], None] | None") -> None:
    """Compare the trials, in the terminal and as a page that is also logged to the sweep's run."""
    from rotssl.commands import compare

    uri, parent = sweep.state.uri, sweep.state.run_id
    try:
        found = compare.compare(uri, sweep.experiment, sweep.folder / "report", only=set(ids), parent=parent)
    except ConfigError as error:
        say(f"no report: {error}")
        return
    (show or compare.show)(found)
    pretrain.show_mlflow(uri)


def _conclude(sweep: SweepRun, code: int = EXIT_OK, show: "Callable[[Report], None] | None" = None) -> int:
    """Report how the trials ended, compare them and close the sweep's run; returns the exit code.

    Args:
        sweep: the sweep, whose trials have ended.
        code: 130 after an interrupt, 1 if the head of the cluster is gone.
        show: called with the comparison; None: it is printed.
    """
    try:
        complete = sweep.publish()
    except ConfigError as error:
        say(f"warning: {error}")
        complete = False
    states = [trial.state() for trial in sweep.trials]
    ids = [state.run_id for state in states if state.run_id is not None]
    if code == EXIT_OK:
        _report(sweep, ids, show)
    print(f"sweep {sweep.sweep.name}: {counts(states)}")
    failed = [(trial, state) for trial, state in zip(sweep.trials, states, strict=True) if state.status == "failed"]
    for trial, state in failed:
        say(f"failed: {trial.title}: {state.reason}")
    untested = [(t, state) for t, state in zip(sweep.trials, states, strict=True) if state.to_test(t.config)]
    for trial, state in untested:
        say(f"not evaluated on test: {trial.title}: {state.untested or 'not started'}; the same command tries again")
    left = [state for state in states if state.status not in ("finished", "pruned", "failed")]
    if left and code == EXIT_OK:
        say(f"{len(left)} trials did not finish; the same command resumes them")
    if not complete:
        say("MLflow is incomplete; the same command sends the rest")
    status = "interrupted" if code else "finished" if not failed and not left and complete else "failed"
    sweep.close(status, counts(states), ids)
    if code == EXIT_INTERRUPTED:
        say("interrupted; the same command resumes from the last checkpoints")
    if code:
        return code
    return EXIT_OK if status == "finished" and not untested else EXIT_FAILED
