"""Checks on the cluster before a sweep starts: code, storage, data, tracking, a collective, the time of a step."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import rotssl
from rotssl import config as cfg
from rotssl.base.paths import AnyPath, at, remove_tree, write_whole
from rotssl.config import ResolvedConfig
from rotssl.config.fields import ConfigError
from rotssl.config.methods import METHODS
from rotssl.runtimes import ray_methods
from rotssl.runtimes.ray_cluster import fetch, import_ray, nodes
from rotssl.runtimes.ray_train import COLLECTIVE_TIMEOUT_S
from rotssl.runtimes.ray_tune import Slots
from rotssl.tracking import store

ESTIMATE_PATIENCE_S = 300  # the cluster may be busy


def _probe(
    folder: str,
    word: str,
    uri: str,
    login: Mapping[str, str],
    version: str,
    roots: Sequence[str],
    methods: Mapping[str, Mapping[str, bytes]],
) -> str:
    """Why a node cannot run trials; empty if it can."""
    from rotssl.methods import outside

    os.environ.update(login)
    if rotssl.__version__ != version:
        return f"it has rotssl {rotssl.__version__}, the driver has {version}"
    try:
        place = at(folder)
        if (place / "word").read_text() != word:
            return f"storage.path: {folder} has other content on this node than on the driver"
        write_whole(place / f"from-{os.getpid()}", word)
    except OSError as error:
        return f"storage.path: {folder} is not shared with this node ({error.strerror})"
    for name, sent in methods.items():
        try:
            ray_methods.unpack(sent)
            cfg.build({"method.name": name})
            outside.load(name)
        except ConfigError as error:
            return str(error)
    for root in roots:
        if not os.access(root, os.R_OK):
            return f"data.root: {root} cannot be read on this node"
    return store.reachable(uri)


def check_nodes(folder: AnyPath, uri: str, roots: Sequence[str], methods: Iterable[str] = ()) -> None:
    """Check on every node that code, storage, data and tracking are the same as on the driver.

    Args:
        folder: an existing folder below storage.path.
        uri: URI of the tracking store.
        roots: folders of images.
        methods: names of the trials' methods.

    Raises:
        ConfigError: a node can't run trials; the message names the first one and the reason.
    """
    ray = import_ray()
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in nodes() if node["Alive"]]
    theirs = {name: ray_methods.packed([name]) for name in methods if name in METHODS.sources}
    with _scratch(folder) as scratch:
        word = os.urandom(8).hex()
        write_whole(scratch / "word", word)
        task = ray.remote(num_cpus=0, max_retries=0)(_probe)
        asked = [
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                str(scratch), word, uri, store.credentials(), rotssl.__version__, list(roots), theirs
            )
            for node in alive
        ]
        for node, answer in zip(alive, asked, strict=True):
            try:
                reason = ray.get(answer, timeout=120)
            except Exception as error:  # of any kind: rotssl is missing, the environment is broken, the node hangs
                reason = f"{type(error).__name__}: {_last_line(error)}"
            if reason:
                raise ConfigError(f"node {node['NodeManagerAddress']}: {reason}")


@contextlib.contextmanager
def _scratch(folder: AnyPath) -> Iterator[AnyPath]:
    scratch = folder / f"check-{os.getpid()}"
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        yield scratch
    finally:
        with contextlib.suppress(OSError):
            remove_tree(scratch)


def check_collective(config: ResolvedConfig, slots: Slots) -> float:
    """Add up a number over two Ray Train workers; returns the seconds that this took, including their start.

    Args:
        config: configuration of any trial.
        slots: from ``ray_tune.plan_slots``.

    Raises:
        ConfigError: the workers can't communicate.
    """
    import_ray()
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rotssl-ray-") as scratch:
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
                storage_path=scratch,
                failure_config=FailureConfig(controller_failure_limit=1),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            total = trainer.fit().return_value
        except SystemExit as error:
            raise KeyboardInterrupt from error
        except Exception as error:  # of any kind
            raise ConfigError(f"scaling.num_workers: two workers cannot communicate ({_last_line(error)})") from error
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
    """Start timing a few steps on a worker; returns a reference to the seconds that each trial would take alone."""
    ray = import_ray()
    share = {"num_gpus": slots.resources.get("GPU", 1.0)} if slots.use_gpu else {}
    task = ray.remote(num_cpus=configs[0].scaling.cpus_per_worker, max_retries=0, **share)(_estimate)
    methods = ray_methods.packed(config.method.name for config in configs)
    return task.remote([cfg.to_dict(config) for config in configs], train_sizes, slots, methods)


def estimated(reference: Any) -> list[float] | None:
    """The result of ``start_estimate``; None if the cluster has no room for it within five minutes.

    Raises:
        ConfigError: the steps can't be run, for example for lack of memory.
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
        raise ConfigError(f"timing a few steps on a worker failed: {_last_line(error)}") from error
    return found


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:200]


def _estimate(
    configs: Sequence[dict[str, Any]], train_sizes: Sequence[int], slots: Slots, methods: dict[str, bytes]
) -> list[float]:
    from rotssl.engine import estimate

    ray_methods.unpack(methods)
    built = [cfg.from_dict(config) for config in configs]
    return estimate.estimate_runs(built, train_sizes, slots.workers, slots.use_gpu)
