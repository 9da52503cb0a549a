"""The command that runs one configuration, up to its final table."""

import shlex
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from rotssl.base.address import is_gone
from rotssl.commands import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, budget, evaluate, say, signals
from rotssl.config import ResolvedConfig
from rotssl.config.cli import Command
from rotssl.config.fields import ConfigError, require
from rotssl.config.methods import METHODS
from rotssl.config.recipes import dump
from rotssl.config.sections import OFF
from rotssl.data import datasets
from rotssl.lifecycle import Run, prepare
from rotssl.reports import terminal
from rotssl.reports.progress import ProgressView
from rotssl.runs import checkpoint, journal
from rotssl.runs.state import RunState, check_writable
from rotssl.runtimes import torchrun
from rotssl.tracking import store, untracked

LEAVE_S = 60.0  # for a run that is told to leave to save its state


Conclude = Callable[[Run, str], int]


def run(command: Command, conclude: Conclude | None = None) -> int:
    """Carry out jobs/pretrain.py; returns the exit code. ``conclude`` is that of ``pretrain``."""
    config, info = prepare(command.config, say=say)
    with ExitStack() as stack:
        if config.train.budget is not None:
            require(
                torchrun.group() is None,
                "train.budget",
                config.train.budget,
                "train.epochs: each process of torchrun would plan",
            )
            here = command.dry_run or command.print_config or config.scaling.num_workers == 0
            config = budget.planned(command.config, config, info, None if here else stack)
        return _run(command, config, info, conclude)


def _run(command: Command, config: ResolvedConfig, info: datasets.DataInfo, conclude: Conclude | None) -> int:
    told = _recommended(command)
    if command.print_config or command.dry_run:
        if told:
            say(told)
        print(dump(config), end="")
    here = config.scaling.num_workers == 0
    images = (
        datasets.describe_storage(config.data, config.evaluation.holdout, info, here) if command.dry_run or here else ""
    )
    if command.dry_run:
        check_writable(config.run_dir)
        RunState.of(config)
        from rotssl.engine import estimate, flops

        print(f"# {images}")
        print(flops.estimate(config, info.train_size))
        print(estimate.report(config, info.train_size, info.labelled))
    if command.print_config or command.dry_run:
        return EXIT_OK
    return pretrain(config, told, conclude)


def _recommended(command: Command) -> str:
    """A line about the fields that come from the registry of methods; empty if there are none."""
    name, fields = command.config.method.name, command.recommended
    shown = ", ".join(f"{key} {value}" for key, value in fields.items())
    return f"{name} without a recipe: {shown} ({METHODS[name].gain})" if fields else ""


def pretrain(config: ResolvedConfig, told: str = "", conclude: Conclude | None = None) -> int:
    """Start or resume the run of a resolved configuration; returns the exit code.

    Args:
        config: resolved.
        told: a line to print before the training.
        conclude: called with the run, which is still held, and its new status; empty if nothing was left to do. Returns the exit
            code. None: it prints the result.

    Raises:
        ConfigError: the machine, the cluster, the store or an earlier start does not allow it.
    """
    require(
        config.train.budget is None, "train.budget", config.train.budget, "none here: only jobs/pretrain.py plans it"
    )
    group = torchrun.group()
    if group is not None:
        torchrun.check(config, group)
        if group.rank > 0:
            return _follow(config, group)
    with ExitStack() as stack:
        run = stack.enter_context(Run.held(config))
        if run.state.doubt:
            say(run.state.doubt)
        for line in run.state.changes:
            say(f"{line}{' (no effect: the run is finished)' if run.state.is_done else ' from now on'}")
        if run.state.is_done:
            _catch_up(run)
            run.assess(None, say)
            return (conclude or _conclude)(run, "")
        workers = None
        if threading.current_thread() is threading.main_thread():  # also while a cluster's nodes are waited for
            signals.handle(stack, signal.SIGTERM, signals.interrupt)
        if group is not None:
            say(f"training in {group.count} processes of torchrun")
        elif config.scaling.num_workers == 0:
            _check_local_gpu(config)
        else:
            from rotssl.runtimes import ray_cluster

            workers = stack.enter_context(ray_cluster.connected(config))
            say(f"training on {workers.count} {'GPU' if workers.use_gpu else 'CPU'} workers")
            if workers.why:
                say(f"more workers cannot share the batch: {workers.why}")
        if threading.current_thread() is threading.main_thread():
            # What `ray job stop` sends; again, since Ray has set a handler of its own.
            signals.handle(stack, signal.SIGTERM, signals.interrupt)
            # What cluster/slurm sends when a job's time is up.
            patience = LEAVE_S if config.train.save_minutes else 0.0  # without it no state is saved within an epoch
            signals.handle(stack, signal.SIGUSR1, lambda *_: signals.leave(run.folder, patience))
        if told:
            say(told)
        run.track(workers, None if group is None else {"world_size": str(group.count)})
        with ProgressView(config.train.epochs, run.name) as view:
            status = run.train(workers, view.handle)
        return (conclude or _conclude)(run, status)


def _follow(config: ResolvedConfig, group: torchrun.Group) -> int:
    """Train in a process of torchrun that is not the first; returns the exit code."""
    if RunState.of(config).is_done:  # the first one prints its table
        return EXIT_OK
    return EXIT_OK if torchrun.work(config, group, lambda event: None) is None else EXIT_FAILED


def _conclude(run: Run, status: str) -> int:
    """Report how a start ended; returns the exit code."""
    if not status:
        print(f"run {run.name} is already finished:")
    if status == "interrupted":
        say("interrupted; the same command resumes from the last checkpoint")
        return EXIT_INTERRUPTED
    if status == "failed":
        say(f"error: the run failed: {run.state.reason}")
        return EXIT_FAILED
    if status == "stopped":
        epochs = run.config.train.epochs
        print(f"stopped after epoch {max(run.points)} of {epochs} as requested; without stop_after the command resumes")
    report(run)
    if run.assessed is not None:
        evaluate.show(run.assessed)
    # Whoever asked for numbers on test and goes on by the exit code must not take them as there; the run itself is finished.
    return EXIT_FAILED if run.state.untested and run.state.to_test(run.config) else EXIT_OK


def _catch_up(run: Run) -> None:
    """Send a finished run to its store if MLflow was off or unreachable when it ended."""
    if store.store_of(run.config) == OFF:
        return
    state = run.state
    if state.uri == OFF or state.moved or is_gone(state.uri):
        # Use the run's saved tags, but its current folder, which may have moved.
        run.track(None, untracked.kept_tags(run.folder) | {"run_dir": str(run.folder)})
        state.synced = False
        state.write(state.status, state.reason)
    if not state.synced:
        run.close(state.status, state.reason)


def _check_local_gpu(config: ResolvedConfig) -> None:
    import torch

    if config.scaling.use_gpu is True and not torch.cuda.is_available():
        raise ConfigError("scaling.use_gpu: got true, but torch finds no usable GPU on this machine")


def report(run: Run) -> None:
    """Print the result table of a run and the paths of its files to stdout."""
    points, folder, state = run.points, run.folder, run.state
    if state.status == "finished" and state.reason != "completed":
        say(f"warning: {run.name}: {state.reason}")
    if points:
        terminal.show(terminal.result(run.name, points))
    checkpoints = checkpoint.found(folder)
    print(f"checkpoint   {checkpoints[0] if checkpoints else 'none'}")
    for label, file in (("encoder", "encoder.safetensors"), ("views", "views.png"), ("plot", "convergence.png")):
        if (folder / file).exists():
            print(f"{label:<12} {folder / file}")
    if run.state.uri == OFF:
        print(f"metrics      {folder / journal.Journal.NAME}")
    else:
        show_mlflow(run.state.uri)


def show_mlflow(uri: str) -> None:
    """Print how to open the curves in MLflow."""
    if uri.startswith("http"):
        print(f"MLflow       {uri}")
    else:
        program = Path(sys.executable).with_name("mlflow")
        print(f"MLflow       {shlex.join([str(program), 'ui', '--backend-store-uri', uri])}")
