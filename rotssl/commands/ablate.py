"""The driver of a sweep: what is to be run, whether it can be, running it, and the report at the end.

A trial is a run like those of jobs/pretrain.py, in a folder that its configuration names: a sweep that is started again finds
there what is finished, goes on with what is not, and adds what is new. Nothing else is remembered.
"""

import builtins
import contextlib
import functools
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from rotssl import lifecycle
from rotssl.commands import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, pretrain, say
from rotssl.config.fields import ConfigError
from rotssl.config.sweep import SweepCommand
from rotssl.runs.state import check_writable
from rotssl.runtimes.ray_tune import Slots
from rotssl.sweeps.run import SweepRun, counts
from rotssl.sweeps.trial import Trial, trials_of
from rotssl.tracking import store

# At once, also into the log of a job.
print = functools.partial(builtins.print, flush=True)


def run(command: SweepCommand) -> int:
    """What jobs/ablate.py does; returns the exit code.

    Raises:
        ConfigError: what the sweep file, the cluster, the stores or an earlier start forbid.
    """
    sweep = SweepRun(command.sweep, trials_of(command.sweep, print, say))
    if command.resume and not (sweep.folder / "run.json").exists():
        raise ConfigError(f"--resume: {sweep.folder} holds no sweep that was started")
    check_writable(sweep.folder)
    states = [trial.state() for trial in sweep.trials]
    changes = Counter((line, state.status == "finished") for state in states for line in state.changes)
    for (line, finished), count in changes.items():
        print(f"{line} in {count} trials" + (", which are finished: no effect on them" if finished else ""))
    todo = sweep.todo
    again = " (what failed is tried again)" if any(state.status == "failed" for state in states) else ""
    print(f"sweep {command.sweep.name}: {len(states)} trials: {counts(states)}; {len(todo)} to run{again}")
    if command.dry_run:
        if todo:
            _start(sweep, todo, dry_run=True)
        return EXIT_OK
    with _sigterm_interrupts(), sweep.held():
        if not todo:
            print("nothing to do: all trials are finished already")
            return _conclude(sweep)
        return _conclude(sweep, _start(sweep, todo, dry_run=False))


def _start(sweep: SweepRun, todo: list[Trial], dry_run: bool) -> int:
    """Check whether the trials can run, and unless it is a dry run, run them; returns 130 if that was interrupted, else 0."""
    from rotssl.runtimes import ray_cluster, ray_tune

    settings, config = sweep.sweep.settings, todo[0].config
    with ray_cluster.connected(config) as cluster:
        slots = ray_tune.plan_slots(config, settings, ray_cluster.nodes())
        store.check_store(sweep.uri, cluster.nodes)
        kind = "in Tune's workers" if slots.workers == 1 else f"on {slots.workers} Ray Train workers"
        gpus = f" and {slots.resources.get('GPU', 1):g} GPU" if slots.use_gpu else ""
        each = f"{config.scaling.cpus_per_worker} CPU{gpus}"
        print(f"cluster: {cluster.nodes} node(s), {slots.count} trials at a time {kind}, each worker {each}")
        print(f"working directory: {_megabytes(Path.cwd())}")
        left = _check(sweep, todo, slots, cluster.nodes)
        if dry_run:
            return EXIT_OK
        sweep.open()
        # Long ones first: the last to end are short. A scheduler learns what it knew from those that are done.
        if settings.scheduler == "none":
            chosen = sorted(todo, key=lambda trial: -left[trial.name])
        else:
            chosen = [*(trial for trial in sweep.trials if trial.name not in left), *todo]
        try:
            sweep.run(chosen, slots)
            return EXIT_OK
        except KeyboardInterrupt:
            pass  # without a cluster no trial's actor has its folder any more
    sweep.close_interrupted()
    return EXIT_INTERRUPTED


def _check(sweep: SweepRun, todo: list[Trial], slots: Slots, nodes: int) -> dict[str, float]:
    """Ask the nodes what they see, and say what the trials will take; returns the seconds that each has left, by name."""
    from rotssl.runtimes import preflight

    # A dry run leaves no trace: without a folder yet, the nodes are asked about the one above it.
    folder = next(path for path in (sweep.folder, *sweep.folder.parents) if path.exists())
    estimate = preflight.start_estimate([t.config for t in todo], [t.train_size for t in todo], slots)
    roots = sorted({str(trial.config.data.root) for trial in todo if trial.config.data.root})
    preflight.check_nodes(folder, sweep.uri, roots)
    print(f"code, storage, data and tracking: as the driver has them, on {nodes} node(s)")
    if slots.workers > 1:
        seconds = preflight.check_collective(todo[0].config, slots, folder)
        print(f"collective: two workers added up, {seconds:.0f} s")
    else:
        print("collective: none, a trial has one worker")
    whole = preflight.estimated(estimate)
    left = [_share_left(t) * s for t, s in zip(todo, whole or [0.0] * len(todo), strict=True)]
    if whole is None:
        print("no estimate: the cluster is busy; the trials will wait as well")
    else:
        wall = max(sum(left) / min(slots.count, len(todo)), *left)
        devices = slots.workers * slots.resources.get("GPU", 1.0)
        print(
            f"estimate: {_duration(sum(left) * devices)} of device time, {_duration(wall)} by the clock "
            "(a few steps timed; without start-up and communication)"
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
    """The size of what a job uploads from here: all but what .rayignore names."""
    ignored = folder / ".rayignore"
    lines = [line for line in ignored.read_text().split() if line.endswith("/")] if ignored.exists() else []
    anywhere, total = {line.rstrip("/") for line in lines}, 0
    for path, folders, files in os.walk(folder):
        top = "/" if Path(path) == folder else ""  # what begins with a slash is meant here only
        folders[:] = [name for name in folders if name not in anywhere and top + name not in anywhere]
        for name in files:
            with contextlib.suppress(OSError):  # it went away meanwhile
                total += os.lstat(os.path.join(path, name)).st_size
    return f"{total / 1e6:.1f} MB"


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lifecycle.interrupt)  # what `ray job stop` sends
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(sweep: SweepRun, ids: Sequence[str]) -> None:
    """Compare the trials, in the terminal and as a page that the sweep's run has too."""
    from rotssl.commands import compare

    uri, parent = sweep.state.uri, sweep.state.run_id
    try:
        found = compare.compare(uri, sweep.experiment, sweep.folder / "report", only=set(ids), parent=parent)
    except ConfigError as error:
        say(f"no report: {error}")
        return
    compare.show(found)
    pretrain.show_mlflow(uri)


def _conclude(sweep: SweepRun, code: int = EXIT_OK) -> int:
    """Say how all trials ended, compare them, close the sweep's run; returns the exit code.

    Args:
        sweep: whose trials have ended.
        code: 130 after an interrupt.
    """
    try:
        complete = sweep.publish()
    except ConfigError as error:
        say(f"warning: {error}")
        complete = False
    states = [trial.state() for trial in sweep.trials]
    ids = [state.run_id for state in states if state.run_id is not None]
    if code == EXIT_OK:
        _report(sweep, ids)
    print(f"sweep {sweep.sweep.name}: {counts(states)}")
    failed = [(trial, state) for trial, state in zip(sweep.trials, states, strict=True) if state.status == "failed"]
    for trial, state in failed:
        say(f"failed: {trial.title}: {state.reason}")
    left = [state for state in states if state.status not in ("finished", "pruned", "failed")]
    if left and code == EXIT_OK:
        say(f"not run to the end: {len(left)} trials; the same command goes on with them")
    if not complete:
        say("MLflow does not have everything; the same command sends it")
    status = "interrupted" if code else "finished" if not failed and not left and complete else "failed"
    sweep.close(status, counts(states), ids)
    if code:
        say("interrupted; the same command goes on from the last checkpoints")
        return code
    return EXIT_OK if status == "finished" else EXIT_FAILED
