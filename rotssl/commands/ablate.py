"""The driver of a sweep: what is to be run, whether it can be, running it, and the report at the end.

A trial is a run like those of jobs/pretrain.py, in a folder that its configuration names: a sweep that is started again finds
there what is finished, goes on with what is not, and adds what is new. Nothing else is remembered.
"""

import builtins
import contextlib
import functools
import json
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from rotssl import config as cfg
from rotssl import lifecycle
from rotssl.commands import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, pretrain, say
from rotssl.config import Config
from rotssl.config.fields import ConfigError
from rotssl.config.sections import OFF
from rotssl.config.sweep import Sweep, SweepCommand
from rotssl.runs import journal
from rotssl.runs.state import RunState, check_writable, run_folder
from rotssl.sweeps.run import close_trial, run_trials, tags_of
from rotssl.sweeps.trial import Trial, trials_of
from rotssl.tracking import reader, store, writer

# At once, also into the log of a job.
print = functools.partial(builtins.print, flush=True)


def run(command: SweepCommand) -> int:
    """What jobs/ablate.py does; returns the exit code.

    Raises:
        ConfigError: what the sweep file, the cluster, the stores or an earlier start forbid.
    """
    sweep, prunes = command.sweep, command.sweep.settings.scheduler != "none"
    trials = trials_of(sweep, print, say)
    whole = cfg.replace(trials[0].config, {"tracking.run_name": sweep.name})  # the sweep's own folder
    if command.resume and not (whole.run_dir / "run.json").exists():
        raise ConfigError(f"--resume: {whole.run_dir} holds no sweep that was started")
    check_writable(whole.run_dir)
    records = [trial.record() for trial in trials]
    statuses = [record.status for record in records]
    changes = Counter((line, record.status == "finished") for record in records for line in record.changes)
    for (line, finished), count in changes.items():
        print(f"{line} in {count} trials" + (", which are finished: no effect on them" if finished else ""))
    todo = [trial for trial in trials if not trial.is_done(prunes)]
    print(
        f"sweep {sweep.name}: {len(trials)} trials: {_counts(statuses)}; {len(todo)} to run"
        + (" (what failed is tried again)" if "failed" in statuses else "")
    )
    if command.dry_run and not todo:
        return EXIT_OK
    with contextlib.ExitStack() as stack:
        stack.enter_context(_sigterm_interrupts())
        if not command.dry_run:
            stack.enter_context(run_folder(whole))
        parent = RunState.read(whole.run_dir / "run.json", {})
        if not todo:
            print("nothing to do: all trials are finished already")
            return _conclude(sweep, whole, parent, trials)
        code = _start(sweep, whole, parent, trials, todo, command.dry_run)
        return EXIT_OK if command.dry_run else _conclude(sweep, whole, parent, trials, code)


def _counts(statuses: Sequence[str]) -> str:
    words = {"running": "cut short", "pruned": "stopped early"}
    return ", ".join(f"{count} {words.get(status, status)}" for status, count in sorted(Counter(statuses).items()))


def _start(
    sweep: Sweep, whole: Config, parent: RunState, trials: list[Trial], todo: list[Trial], dry_run: bool
) -> int | None:
    """Check, and unless it is a dry run, run; returns 130 if interrupted."""
    from rotssl.runtimes import preflight, ray_cluster, ray_tune

    settings, config = sweep.settings, todo[0].config
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(ray_cluster.connected(config))
        slots = ray_tune.plan_slots(config, settings, ray_cluster.nodes())
        uri = store.store_of(whole)
        store.check_store(uri, cluster.nodes)
        kind = "in Tune's workers" if slots.workers == 1 else f"on {slots.workers} Ray Train workers"
        each = f"{config.scaling.cpus_per_worker} CPU" + (
            f" and {slots.resources.get('GPU', 1):g} GPU" if slots.use_gpu else ""
        )
        print(f"cluster: {cluster.nodes} node(s), {slots.count} trials at a time {kind}, each worker {each}")
        print(f"working directory: {_megabytes(Path.cwd())}")
        # A dry run leaves no trace: without a folder yet, the nodes are asked about the one above it.
        folder = whole.run_dir
        while not folder.exists():
            folder = folder.parent
        estimate = preflight.start_estimate([t.config for t in todo], [t.train_size for t in todo], slots)
        roots = sorted({str(trial.config.data.root) for trial in todo if trial.config.data.root})
        preflight.check_nodes(folder, uri, roots)
        print(f"code, storage, data and tracking: as the driver has them, on {cluster.nodes} node(s)")
        if slots.workers > 1:
            print(f"collective: two workers added up, {preflight.check_collective(whole, slots, folder):.0f} s")
        else:
            print("collective: none, a trial has one worker")
        seconds = preflight.estimated(estimate)
        left = [_share_left(t) * s for t, s in zip(todo, seconds or [0.0] * len(todo), strict=True)]
        if seconds is None:
            print("estimate: none, the cluster is busy; the trials wait for it too")
        else:
            wall = max(sum(left) / min(slots.count, len(todo)), *left)
            devices = slots.workers * slots.resources.get("GPU", 1.0)
            print(
                f"estimate: {_duration(sum(left) * devices)} of device time, {_duration(wall)} by the clock "
                "(a few steps timed; without start-up and communication)"
            )
        if dry_run:
            return None
        _open(sweep, whole, parent, uri)
        longest = dict(zip((t.name for t in todo), left, strict=True))
        # Long ones first: the last to end are short. A scheduler learns what it knew from those that are done.
        if settings.scheduler == "none":
            chosen = sorted(todo, key=lambda trial: -longest[trial.name])
        else:
            chosen = [*(t for t in trials if t.name not in longest), *todo]
        # Colours are those of the whole sweep, whichever part of it this start runs.
        tags = dict(zip((t.name for t in trials), tags_of(sweep, parent, trials), strict=True))
        interrupted = False
        try:
            run_trials(sweep, whole, parent, chosen, [tags[trial.name] for trial in chosen], slots)
        except KeyboardInterrupt:
            interrupted = True
    for trial in chosen if interrupted else []:
        if trial.record().status == "running":  # its actor is gone by now
            close_trial(trial, "interrupted", "interrupted", locked=True)
    return EXIT_INTERRUPTED if interrupted else None


def _duration(seconds: float) -> str:
    for size, unit in ((1, "s"), (60, "min")):
        if seconds < 100 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"


def _share_left(trial: Trial) -> float:
    return 1 - max(journal.read(trial.config.run_dir), default=0) / trial.config.train.epochs


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


def _open(sweep: Sweep, whole: Config, parent: RunState, uri: str) -> None:
    """The sweep's own run in MLflow, made or taken up again."""
    axes = {**sweep.grid, **{key: {kind: values} for key, (kind, values) in sweep.distributions.items()}}
    lines = [f"- `{key}`: {values}" for key, values in axes.items()]
    tags = {
        "kind": "sweep",
        "sweep": sweep.name,
        "git_commit": lifecycle.git_commit(),
        "status_reason": "running",
        "run_dir": str(whole.run_dir),
        "mlflow.note.content": "\n".join(
            [f"Sweep of `{sweep.file.name}`, {sweep.settings.seeds} seed(s):", "", *lines]
        ),
        **{f"sweep.{key}": str(value) for key, value in vars(sweep.settings).items()},
    }
    lifecycle.open_in_mlflow(whole, parent, uri, {}, tags)
    parent.write("running")


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


def _report(whole: Config, parent: RunState, ids: Sequence[str]) -> None:
    """Compare the trials, in the terminal and as a page that the sweep's run has too."""
    from rotssl.commands import compare

    try:
        found = compare.compare(
            parent.uri, whole.tracking.experiment, whole.run_dir / "report", only=set(ids), parent=parent.run_id
        )
    except ConfigError as error:
        print(f"no report: {error}", file=sys.stderr)
        return
    compare.show(found)
    pretrain.show_mlflow(parent.uri)


def _publish(sweep: Sweep, whole: Config, parent: RunState, trials: Sequence[Trial]) -> bool:
    """Bring MLflow up to the folders, where it was away or was lost; returns whether it has all of them."""
    uri = store.store_of(whole)
    known = reader.run_ids(uri, whole.tracking.experiment) if not store.reachable(uri) else None
    if known is None:
        return False
    if parent.run_id not in known:
        _open(sweep, whole, parent, uri)
    complete = True
    for trial, tags in zip(trials, tags_of(sweep, parent, trials), strict=True):
        record = trial.record()
        lost = record.run_id not in known or not record.synced or record.uri == OFF  # jobs/pretrain.py went on with it
        if record.status in ("finished", "pruned", "failed") and lost and journal.read(trial.config.run_dir):
            lifecycle.open_tracking(trial.config, record, trial.workers, tags)
            lifecycle.close(trial.config, record, record.status, record.reason)
            complete = complete and record.synced
    return complete


def _conclude(sweep: Sweep, whole: Config, parent: RunState, trials: Sequence[Trial], code: int | None = None) -> int:
    """Say how all trials ended, compare them, close the sweep's run; returns the exit code."""
    try:
        complete = _publish(sweep, whole, parent, trials)
    except ConfigError as error:
        print(f"warning: {error}", file=sys.stderr)
        complete = False
    records = [trial.record() for trial in trials]
    counts = _counts([record.status for record in records])
    ids = [record.run_id for record in records if record.run_id is not None]
    if code is None:
        _report(whole, parent, ids)
    print(f"sweep {sweep.name}: {counts}")
    failed = [(t, r) for t, r in zip(trials, records, strict=True) if r.status == "failed"]
    for trial, record in failed:
        print(f"failed: {trial.title}: {record.reason}", file=sys.stderr)
    left = [record for record in records if record.status not in ("finished", "pruned", "failed")]
    if left and not code:
        print(f"not run to the end: {len(left)} trials; the same command goes on with them", file=sys.stderr)
    if not complete:
        print("MLflow does not have everything; the same command sends it", file=sys.stderr)
    status = "interrupted" if code else "finished" if not failed and not left and complete else "failed"
    listed = whole.run_dir / "trials.json"  # sweeps may share trials, of which MLflow knows one parent only
    listed.write_text(json.dumps(ids) + "\n")
    tracker = writer.Tracker(parent.uri, str(parent.run_id))
    parent.synced = tracker.finish(lifecycle.MLFLOW_STATUS[status], counts, [sweep.file, listed])
    parent.write(status, counts)
    if code:
        print("interrupted; the same command goes on from the last checkpoints", file=sys.stderr)
        return code
    return EXIT_OK if status == "finished" else EXIT_FAILED
