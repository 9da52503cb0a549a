"""One run, from its configuration to its final table."""

import shlex
import signal
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

from rotssl.commands import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, say
from rotssl.config import Config
from rotssl.config.cli import Command
from rotssl.config.fields import ConfigError
from rotssl.config.recipes import dump
from rotssl.config.sections import OFF
from rotssl.data import datasets
from rotssl.lifecycle import close, execute, interrupt, open_tracking, prepare
from rotssl.reports import terminal
from rotssl.reports.progress import ProgressView
from rotssl.runs import checkpoint, journal
from rotssl.runs.state import RunState, check_writable, run_folder
from rotssl.tracking import store, untracked


def run(command: Command) -> int:
    """What jobs/pretrain.py does; returns the exit code."""
    config, info = prepare(command.config, say=say)
    if command.print_config or command.dry_run:
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
    return pretrain(config)


def pretrain(config: Config) -> int:
    """Run a resolved configuration to its end, or go on with it; returns the exit code.

    Raises:
        ConfigError: what the machine, the cluster, the store or an earlier start forbid.
    """
    with ExitStack() as stack:
        stack.enter_context(run_folder(config))
        record = RunState.of(config)
        for line in record.changes:
            end = ", which has no effect: the run is finished" if record.is_done else ", from here on"
            print(f"{line}{end}", file=sys.stderr)
        if record.is_done:
            _catch_up(config, record)
            print(f"run {config.tracking.run_name} is finished already:")
            report(config, record)
            return EXIT_OK
        workers = None
        if config.scaling.num_workers == 0:
            _check_local_gpu(config)
        else:
            from rotssl.runtimes import ray_cluster

            workers = stack.enter_context(ray_cluster.connected(config))
            print(f"training on {workers.count} {'GPU' if workers.use_gpu else 'CPU'} workers", file=sys.stderr)
            if workers.why:
                print(f"not on more: {workers.why}", file=sys.stderr)
        if threading.current_thread() is threading.main_thread():
            stack.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
            signal.signal(signal.SIGTERM, interrupt)  # what `ray job stop` sends
        open_tracking(config, record, workers)
        with ProgressView(config.train.epochs, str(config.tracking.run_name)) as view:
            status = execute(config, record, workers, view.handle)
        if status == "interrupted":
            print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
            return EXIT_INTERRUPTED
        if status == "failed":
            print(f"error: the run failed: {record.reason}", file=sys.stderr)
            return EXIT_FAILED
        if status == "stopped":
            done = max(journal.read(config.run_dir))
            print(f"stopped after epoch {done} of {config.train.epochs}, as asked; without stop_after it goes on")
        report(config, record)
        return EXIT_OK


def _catch_up(config: Config, record: RunState) -> None:
    """Send a finished run to its store, if MLflow was away when it ended, or off."""
    if store.store_of(config) == OFF:
        return
    if record.uri == OFF:
        # The tags are those of the run; its folder may have moved.
        tags = untracked.kept_tags(config.run_dir) | {"run_dir": str(config.run_dir)}
        open_tracking(config, record, None, tags)
        record.synced = False
        record.write(record.status, record.reason)
    if not record.synced:
        close(config, record, record.status, record.reason)


def _check_local_gpu(config: Config) -> None:
    import torch

    if config.scaling.use_gpu is True and not torch.cuda.is_available():
        raise ConfigError("scaling.use_gpu: got true, but this machine has no GPU that torch can use")


def report(config: Config, record: RunState) -> None:
    """Print the table of a run and where everything is, to stdout."""
    folder = config.run_dir
    points = journal.read(folder)
    if points:
        terminal.show(terminal.result(str(config.tracking.run_name), points))
    checkpoints = checkpoint.found(folder)
    print(f"checkpoint   {checkpoints[0] if checkpoints else 'none'}")
    for label, file in (("encoder", "encoder.safetensors"), ("views", "views.png"), ("plot", "convergence.png")):
        if (folder / file).exists():
            print(f"{label:<12} {folder / file}")
    if record.uri == OFF:
        print(f"metrics      {folder / journal.Journal.NAME}")
    else:
        show_mlflow(record.uri)


def show_mlflow(uri: str) -> None:
    """Print how to see the curves."""
    if uri.startswith("http"):
        print(f"MLflow       {uri}")
    else:
        program = Path(sys.executable).with_name("mlflow")
        print(f"MLflow       {shlex.join([str(program), 'ui', '--backend-store-uri', uri])}")
