"""A run from its configuration to its end: checks, tracking, training, closing. Prints nothing."""

import functools
import logging
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rotssl import config as cfg
from rotssl.config import Config
from rotssl.config.fields import ConfigError
from rotssl.config.recipes import dump
from rotssl.config.sections import OFF, EncoderConfig
from rotssl.data import datasets
from rotssl.data.images import DataError
from rotssl.engine.events import Event, Missing, Note
from rotssl.evaluation.protocol import KNN_PROTOCOL, LINEAR_PROTOCOL
from rotssl.runs import checkpoint, journal
from rotssl.runs.state import RunState
from rotssl.tracking import store, untracked, writer

log = logging.getLogger(__name__)
ARTIFACTS = ("config.yaml", "convergence.png", "views.png", "encoder.safetensors", "encoder.json")


def prepare(
    config: Config, info: datasets.DataInfo | None = None, say: Callable[[str], None] = log.warning
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
        store.check_uri(config.tracking.uri)
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


def execute(config: Config, record: RunState, workers: Any, show: Callable[[Event], None], splits: Any = None) -> str:
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

            def handle(event: Event) -> None:
                if isinstance(event, Missing):
                    record.missing = event.names
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
    from rotssl.runs.journal import collapsed

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


def close(config: Config, record: RunState, status: str, reason: str) -> str:
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
        log.warning("%s could not be brought up to date: %s", folder, error)
    return status


def interrupt(*_: object) -> None:
    """A signal handler that ends what runs as Ctrl-C does."""
    raise KeyboardInterrupt


def open_tracking(config: Config, record: RunState, workers: Any, more: Mapping[str, str] | None = None) -> None:
    """Make the run in MLflow, or take it up again, and note its place in the record; where that is off, keep the tags.

    Args:
        config: resolved.
        record: of the run.
        workers: of ``ray_runtime.connected``, or None.
        more: further tags.

    Raises:
        ConfigError: the store can't be used, or not from the cluster's nodes.
    """
    uri = store.store_of(config)
    store.check_store(uri, workers.nodes if workers is not None else 1)
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
    config: Config, record: RunState, uri: str, params: Mapping[str, Any], tags: Mapping[str, str]
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


def _run_here(config: Config, show: Callable[[Event], None], splits: datasets.Splits | None) -> str | None:
    import torch

    from rotssl.engine.runtime import LocalRuntime, RunFailed
    from rotssl.engine.trainer import Trainer

    use_gpu = torch.cuda.is_available() if config.scaling.use_gpu == "auto" else config.scaling.use_gpu
    runtime = LocalRuntime(config.run_dir, torch.device("cuda" if use_gpu else "cpu"), show)
    try:
        splits = splits or datasets.load(config.data, config.evaluation.holdout, lambda line: show(Note(line)))
        Trainer(config, splits, runtime, journal.Journal(config.run_dir)).run()
    except (RunFailed, DataError) as error:
        return str(error)
    return None


def _plot(config: Config) -> None:
    from rotssl.runs.curve import save_convergence

    folder = config.run_dir
    points = journal.read(folder)
    # Without validation there is one accuracy, in the end.
    metric = "knn/top1" if any("knn/top1" in point for point in points.values()) else "loss/total"
    save_convergence({str(config.tracking.run_name): points}, folder / "convergence.png", metric)
