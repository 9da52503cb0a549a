"""The driver of a run: checks, run folder, tracking, workers, and what is printed at the end."""

import functools
import logging
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from rotssl import config as cfg
from rotssl.config import Config
from rotssl.config.cli import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, Command
from rotssl.config.fields import ConfigError
from rotssl.config.sections import OFF, EncoderConfig
from rotssl.data import datasets
from rotssl.data.images import DataError
from rotssl.evaluation import KNN_PROTOCOL, LINEAR_PROTOCOL
from rotssl.reports import terminal
from rotssl.reports.progress import ProgressView
from rotssl.runs import checkpoint, journal
from rotssl.runs.state import Record, check_writable, run_folder
from rotssl.tracking import untracked, writer

log = logging.getLogger(__name__)
ARTIFACTS = ("config.yaml", "convergence.png", "views.png", "encoder.safetensors", "encoder.json")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def prepare(
    config: Config, info: datasets.DataInfo | None = None, say: Callable[[str], None] = _say
) -> tuple[Config, datasets.DataInfo]:
    """Check the data and resolve what was left open, saying what had to be cut; also returns what is known of the data.

    Args:
        config: as built.
        info: of its data, if they were looked at already.
        say: takes what had to be cut, in lines.

    Raises:
        ConfigError: as the parts do.
    """
    info = info or datasets.inspect(config.data, config.evaluation.holdout)
    asked, config = config, cfg.resolve(config, info.image_size, info.train_size)
    # One answer for all workers, whatever their machines have.
    config = cfg.replace(config, {"data.store": datasets.where(config.data, info.bytes)})
    for line in cfg.cut_down(asked, config):
        say(line)
    if config.encoder.name.startswith("timm/"):  # only timm knows what it has, and what that takes
        _check_encoder(config)
    if config.tracking.uri is not None:
        writer.check_uri(config.tracking.uri)
    return config, info


def _check_encoder(config: Config) -> None:
    from rotssl.tasks.jigsaw import tile_side

    sides = {"data.image_size": config.data.image_size}
    sides |= {"views.local_size": config.views.local_size} if config.views.local_count else {}
    if config.rotation.weight > 0 and config.rotation.mode == "four_way":
        sides["rotation.crop_size"] = config.rotation.crop_size
    if config.rotation.weight > 0 and config.rotation.mode == "extra":
        sides["rotation.resolution"] = config.rotation.extra_side(int(config.data.image_size))
    if config.jigsaw.weight > 0:
        sides["jigsaw.grid"] = tile_side(int(config.data.image_size), config.jigsaw.grid)
    for key, side in sides.items():
        if reason := _objection(config.encoder, int(config.data.image_size), int(side)):
            raise ConfigError(f"{key}: {config.encoder.name} does not take images of {side} pixels ({reason})")


@functools.cache  # a sweep asks for every trial
def _objection(encoder: EncoderConfig, image_size: int, side: int) -> str:
    """Why an encoder built for one size of images does not take another; empty if it does."""
    import torch

    from rotssl.models.encoders import build_encoder

    with torch.device("meta"):
        model, _ = build_encoder(image_size=image_size, **vars(encoder))
        try:
            model(torch.empty(2, 3, side, side))
        except (AssertionError, RuntimeError, ValueError) as error:
            return str(error)
    return ""


def run(command: Command) -> int:
    """What jobs/pretrain.py does; returns the exit code."""
    config, info = prepare(command.config)
    if command.print_config or command.dry_run:
        print(dump(config), end="")
    here = config.scaling.num_workers == 0
    images = datasets.place(config.data, config.evaluation.holdout, info, here) if command.dry_run or here else ""
    if command.dry_run:
        check_writable(config.run_dir)
        Record.of(config)
        from rotssl.engine import estimate, flops

        print(f"# {images}")
        print(flops.estimate(config, info.train_size))
        print(estimate.report(config, info.train_size, info.labelled))
    if command.print_config or command.dry_run:
        return EXIT_OK
    return pretrain(config)


def dump(config: Config) -> str:
    """The configuration as a recipe."""
    return yaml.safe_dump(cfg.to_dict(config), sort_keys=False)


def pretrain(config: Config) -> int:
    """Run a resolved configuration to its end, or go on with it; returns the exit code.

    Raises:
        ConfigError: what the machine, the cluster, the store or an earlier start forbid.
    """
    with ExitStack() as stack:
        stack.enter_context(run_folder(config))
        record = Record.of(config)
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
            from rotssl.runtimes import ray_train

            workers = stack.enter_context(ray_train.connected(config))
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


def execute(
    config: Config, record: Record, workers: Any, show: Callable[[dict[str, Any]], None], splits: Any = None
) -> str:
    """Train from where the run is, and close it; returns the record's new status.

    Args:
        config: resolved.
        record: of the run, with its place in MLflow (``open_tracking``).
        workers: of ``ray_runtime.connected``, or None to train in this process.
        show: takes the progress events.
        splits: the images, if the caller has them: in memory for this process, in Ray's object store for workers. None also
            where they are on disk, from where whoever trains maps them.
    """
    folder = config.run_dir
    record.write("running")
    (folder / "config.yaml").write_text(dump(config))
    try:
        with writer.Follower(untracked.tracker_of(record.uri, record.run_id, folder), folder) as follower:

            def handle(event: dict[str, Any]) -> None:
                record.missing = event.get("missing", record.missing)
                follower.handle(event)
                show(event)

            if workers is None:
                failed = _run_here(config, handle, splits)
            else:
                from rotssl.runtimes import ray_train

                failed = ray_train.fit(config, workers, handle, splits)
    except KeyboardInterrupt:
        return close(config, record, "interrupted", "interrupted")
    except OSError as error:
        failed = f"{type(error).__name__}: {error}"
    except Exception as error:  # not foreseen: recorded, and raised with its traceback
        close(config, record, "failed", f"{type(error).__name__}: {error}"[:500])
        raise
    done = max(journal.read(folder), default=0)
    if failed is None and done == 0:
        failed = f"{folder / journal.Journal.NAME} is gone"
    if failed is not None:
        return close(config, record, "failed", failed)
    if done < config.train.epochs:
        return close(config, record, "stopped", "stop_after")
    from rotssl.reports.curves import collapsed

    reason = collapsed(journal.read(folder)) or "completed"
    if record.missing:
        reason += f", but {' and '.join(record.missing)} could not be measured; the same command tries again"
    return close(config, record, "finished", reason)


MLFLOW_STATUS = {
    "finished": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
    "stopped": "KILLED",
    "pruned": "KILLED",
}


def close(config: Config, record: Record, status: str, reason: str) -> str:
    """Draw the curve, bring MLflow up to the journal, and record how this start ended; what can't be written is said."""
    folder = config.run_dir
    points = journal.read(folder)
    try:
        if points:
            _plot(config)
        tracker = untracked.tracker_of(record.uri, record.run_id, folder)
        done = tracker.sync(points)
        record.synced = tracker.finish(MLFLOW_STATUS[status], reason, [folder / name for name in ARTIFACTS]) and done
        record.write(status, reason)
        checkpoint.prune(folder, keep=2)
    except OSError as error:
        record.status, record.reason = status, reason
        print(f"warning: {folder} could not be brought up to date: {error}", file=sys.stderr)
    return status


def _catch_up(config: Config, record: Record) -> None:
    """Send a finished run to its store, if MLflow was away when it ended, or off."""
    if writer.store_of(config) == OFF:
        return
    if record.uri == OFF:
        # The tags are those of the run; its folder may have moved.
        tags = untracked.kept_tags(config.run_dir) | {"run_dir": str(config.run_dir)}
        open_tracking(config, record, None, tags)
        record.synced = False
        record.write(record.status, record.reason)
    if not record.synced:
        close(config, record, record.status, record.reason)


def interrupt(*_: object) -> None:
    """A signal handler that ends what runs as Ctrl-C does."""
    raise KeyboardInterrupt


def open_tracking(config: Config, record: Record, workers: Any, more: Mapping[str, str] | None = None) -> None:
    """Make the run in MLflow, or take it up again, and note its place in the record; where that is off, keep the tags.

    Args:
        config: resolved.
        record: of the run.
        workers: of ``ray_runtime.connected``, or None.
        more: further tags.

    Raises:
        ConfigError: the store can't be used, or not from the cluster's nodes.
    """
    uri = writer.store_of(config)
    writer.check_store(uri, workers.nodes if workers is not None else 1)
    tags = {
        "method": config.method.name,
        "data": config.data.name,
        "data.store": config.data.store,
        "rotation": "on" if config.rotation.weight > 0 else "off",
        "jigsaw": "on" if config.jigsaw.weight > 0 else "off",
        "git_commit": git_commit(),
        "config_hash": cfg.fingerprint(config),
        "world_size": str(workers.count if workers else 1),
        "status_reason": "running",
        "run_dir": str(config.run_dir),
        "knn_protocol": KNN_PROTOCOL,
        "linear_protocol": LINEAR_PROTOCOL,
        **({"changed": "; ".join(record.changes)} if record.changes else {}),
        **{f"scaling.{key}": str(value) for key, value in cfg.to_dict(config)["scaling"].items()},
        **(more or {}),
    }
    if uri == OFF:
        untracked.Untracked(config.run_dir).tag(tags)
        record.uri = uri  # the run's id stays: a start that has its store goes on with it
    else:
        open_in_mlflow(config, record, uri, cfg.described(config), tags)


def open_in_mlflow(
    config: Config, record: Record, uri: str, params: Mapping[str, Any], tags: Mapping[str, str]
) -> None:
    """Make the record's run with these parameters and tags, or take it up again, and note its place."""
    # Of a run that went on without MLflow the id is that of the store before; another store knows no such run.
    known = record.run_id if record.uri in (uri, OFF) else None
    artifacts = Path(str(config.storage.path)) / "mlartifacts" / config.tracking.experiment
    name = str(config.tracking.run_name)
    record.run_id = writer.open_run(uri, config.tracking.experiment, name, known, dict(params), dict(tags), artifacts)
    record.uri = uri


def git_commit() -> str:
    """The commit of this checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"  # an uploaded or installed copy


def _check_local_gpu(config: Config) -> None:
    import torch

    if config.scaling.use_gpu is True and not torch.cuda.is_available():
        raise ConfigError("scaling.use_gpu: got true, but this machine has no GPU that torch can use")


def _run_here(config: Config, show: Callable[[dict[str, Any]], None], splits: datasets.Splits | None) -> str | None:
    import torch

    from rotssl.engine.runtime import LocalRuntime, RunFailed
    from rotssl.engine.trainer import Trainer

    use_gpu = torch.cuda.is_available() if config.scaling.use_gpu == "auto" else config.scaling.use_gpu
    runtime = LocalRuntime(config.run_dir, torch.device("cuda" if use_gpu else "cpu"), show)
    try:
        splits = splits or datasets.load(config.data, config.evaluation.holdout, lambda line: show({"note": line}))
        Trainer(config, splits, runtime, journal.Journal(config.run_dir)).run()
    except (RunFailed, DataError) as error:
        return str(error)
    return None


def _plot(config: Config) -> None:
    from rotssl.reports.pictures import save_convergence

    folder = config.run_dir
    points = journal.read(folder)
    # Without validation there is one accuracy, in the end.
    metric = "knn/top1" if any("knn/top1" in point for point in points.values()) else "loss/total"
    save_convergence({str(config.tracking.run_name): points}, folder / "convergence.png", metric)


def report(config: Config, record: Record) -> None:
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
