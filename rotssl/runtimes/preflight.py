"""What is looked at on the cluster before a sweep starts: code, storage, data, tracking, a collective, the time of a step."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import rotssl
from rotssl import config as cfg
from rotssl.config import ResolvedConfig
from rotssl.config.fields import ConfigError
from rotssl.runtimes.ray_cluster import fetch, import_ray, nodes
from rotssl.runtimes.ray_train import COLLECTIVE_TIMEOUT_S
from rotssl.runtimes.ray_tune import Slots
from rotssl.tracking import store

ESTIMATE_PATIENCE_S = 300  # others may have the cluster


def _probe(folder: str, word: str, uri: str, version: str, roots: Sequence[str]) -> str:
    """What keeps a node from running trials; empty if nothing does."""
    if rotssl.__version__ != version:
        return f"it has rotssl {rotssl.__version__}, the driver {version}"
    try:
        if (Path(folder) / "word").read_text() != word:
            return f"storage.path: {folder} holds something else there"
        (Path(folder) / f"from-{os.getpid()}").write_text(word)
    except OSError as error:
        return f"storage.path: {folder} is not the driver's there ({error.strerror})"
    for root in roots:
        if not os.access(root, os.R_OK):
            return f"data.root: {root} cannot be read there"
    return store.reachable(uri)


def check_nodes(folder: Path, uri: str, roots: Sequence[str]) -> None:
    """See from every node that code, storage, data and tracking are what the driver has.

    Args:
        folder: an existing folder below storage.path.
        uri: of the tracking store.
        roots: folders of images.

    Raises:
        ConfigError: the first node that can't run trials, and why.
    """
    ray = import_ray()
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in nodes() if node["Alive"]]
    with _scratch(folder) as scratch:
        word = os.urandom(8).hex()
        (scratch / "word").write_text(word)
        task = ray.remote(num_cpus=0, max_retries=0)(_probe)
        asked = [
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                str(scratch), word, uri, rotssl.__version__, list(roots)
            )
            for node in alive
        ]
        for node, answer in zip(alive, asked, strict=True):
            try:
                reason = ray.get(answer, timeout=120)
            except Exception as error:  # whatever Ray raises there: no rotssl, a broken environment, a node that hangs
                reason = f"{type(error).__name__}: {_last_line(error)}"
            if reason:
                raise ConfigError(f"node {node['NodeManagerAddress']}: {reason}")


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    scratch = folder / f"check-{os.getpid()}"
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_collective(config: ResolvedConfig, slots: Slots, folder: Path) -> float:
    """Add up a number over two Ray Train workers; returns the seconds that this took, start included.

    Args:
        config: of any trial.
        slots: from ``plan_slots``.
        folder: an existing one that all nodes see.

    Raises:
        ConfigError: they can't talk to each other.
    """
    import_ray()
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    started = time.monotonic()
    with _scratch(folder) as scratch:
        trainer = TorchTrainer(
            _add_up,
            torch_config=TorchConfig(timeout_s=min(60, COLLECTIVE_TIMEOUT_S)),
            scaling_config=ScalingConfig(
                num_workers=2,
                use_gpu=slots.use_gpu,
                resources_per_worker={"CPU": config.scaling.cpus_per_worker, **({"GPU": 1} if slots.use_gpu else {})},
                placement_strategy="SPREAD",
            ),
            run_config=RunConfig(
                name="collective",
                storage_path=str(scratch),
                failure_config=FailureConfig(controller_failure_limit=1),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            total = trainer.fit().return_value
        except SystemExit as error:
            raise KeyboardInterrupt from error
        except Exception as error:  # whatever Ray Train makes of it
            raise ConfigError(
                f"scaling.num_workers: two workers cannot talk to each other ({_last_line(error)})"
            ) from error
    if total != 3.0:
        raise ConfigError(f"scaling.num_workers: 1 + 2 over two workers gave {total}")
    return time.monotonic() - started


def _add_up() -> float:
    import ray.train
    import ray.train.torch
    import torch

    rank = ray.train.get_context().get_world_rank()
    value = torch.tensor([rank + 1.0], device=ray.train.torch.get_device())
    torch.distributed.all_reduce(value)
    return float(value)


def start_estimate(configs: Sequence[ResolvedConfig], train_sizes: Sequence[int], slots: Slots) -> Any:
    """A reference to the seconds of each trial on its own, from a few steps that are timed on a worker meanwhile."""
    ray = import_ray()
    share = {"num_gpus": slots.resources.get("GPU", 1.0)} if slots.use_gpu else {}
    task = ray.remote(num_cpus=configs[0].scaling.cpus_per_worker, max_retries=0, **share)(_estimate)
    return task.remote([cfg.to_dict(config) for config in configs], train_sizes, slots)


def estimated(reference: Any) -> list[float] | None:
    """The answer to ``start_estimate``; None where the cluster has no room for it in five minutes.

    Raises:
        ConfigError: the steps can't be run: too little memory, ...
    """
    ray = import_ray()
    from ray.exceptions import RayError

    ready, _ = ray.wait([reference], timeout=ESTIMATE_PATIENCE_S)
    if not ready:
        ray.cancel(reference, force=True)
        return None
    try:
        found: list[float] = fetch(reference)
    except RayError as error:
        if isinstance(cause := getattr(error, "cause", None), ConfigError):
            raise ConfigError(str(cause)) from error
        raise ConfigError(f"a few steps could not be run on a worker: {_last_line(error)}") from error
    return found


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:200]


def _estimate(configs: Sequence[dict[str, Any]], train_sizes: Sequence[int], slots: Slots) -> list[float]:
    from rotssl.engine import estimate

    built = [cfg.from_dict(config) for config in configs]
    return estimate.estimate_runs(built, train_sizes, slots.workers, slots.use_gpu)
