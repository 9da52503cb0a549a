"""The connection to a Ray cluster, and the check that the workers fit into it."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rotssl import config as cfg
from rotssl.config import Config
from rotssl.config.fields import ConfigError
from rotssl.data.images import DataError
from rotssl.runtimes import ray_start

# Set before Ray starts; Train passes the first one to its controller and workers.
_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # the last report waits for the controller's next poll, by default 2 s
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that outlives the connection must not start another cluster
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True)
class Workers:
    """The workers of a run; ``why`` says what keeps the batch from being shared by more, if the cluster has room for more."""

    count: int
    use_gpu: bool
    nodes: int
    why: str = ""


def import_ray() -> Any:
    """Import and return ray, after setting the environment variables that it reads on import."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    # Ray's processes inherit the environment; without bytecode each of them would compile its imports anew.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    import ray

    return ray


@contextlib.contextmanager
def connected(config: Config) -> Iterator[Workers]:
    """Connect to the cluster of RAY_ADDRESS or of ``ray start`` on this machine, or start a local one, within the body.

    Raises:
        ConfigError: there is no connection, or the workers don't fit into the cluster.
    """
    ray = import_ray()
    ours = not ray.is_initialized()
    if ours:
        address = ray_start.address()
        if address == "local":
            check_machine(config)
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody preempts a cluster of our own
        ray_start.connect(ray, address)
    try:
        yield plan_workers(config, ray.cluster_resources(), ray.nodes())
    finally:
        if ours:
            ray_start.disconnect(ray)


def check_machine(config: Config) -> None:
    """Check that the workers fit into the cores of this machine, before a cluster is started.

    Raises:
        ConfigError: there are too many workers.
    """
    asked, each, cores = config.scaling.num_workers, config.scaling.cpus_per_worker, os.cpu_count() or 1
    if asked != "auto" and asked * each > cores:
        raise ConfigError(
            f"scaling.num_workers: got {asked} with {each} CPU each, expected workers that fit into the {cores} cores here"
        )


def plan_workers(config: Config, resources: dict[str, float], nodes: list[dict[str, Any]]) -> Workers:
    """The workers for a cluster: as configured, else one per GPU, else one per core up to two.

    Args:
        config: configuration of the run.
        resources: totals of the cluster, from ray.cluster_resources().
        nodes: nodes of the cluster, from ray.nodes().

    Raises:
        ConfigError: they don't fit into the cluster.
    """
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    scaling = config.scaling
    use_gpu = gpus > 0 if scaling.use_gpu == "auto" else scaling.use_gpu
    if use_gpu and gpus == 0:
        raise ConfigError("scaling.use_gpu: got true, but the cluster has no GPU")
    alive = [node for node in nodes if node.get("Alive", True)]
    places = sum(int(node["Resources"].get("CPU", 0)) // scaling.cpus_per_worker for node in alive)
    why = ""
    if scaling.num_workers == "auto":
        most = max(1, min(gpus, places) if use_gpu else min(2, places))
        count = max((n for n in range(1, most + 1) if not cfg.unshared(config, n)), default=1)
        why = cfg.unshared(config, most)
    else:
        count = scaling.num_workers
    if use_gpu and count > gpus:
        raise ConfigError(
            f"scaling.num_workers: got {count} with a GPU each, expected at most the cluster's {gpus} GPUs"
        )
    if count > places:
        raise ConfigError(
            f"scaling.num_workers: got {count} with {scaling.cpus_per_worker} CPU each, but the cluster has {cpus} CPUs"
        )
    cfg.check_workers(config, count)
    return Workers(count, use_gpu, len({node["NodeManagerAddress"] for node in alive}), why)


def nodes() -> list[dict[str, Any]]:
    """The nodes of the cluster, from ray.nodes()."""
    return list(import_ray().nodes())


def fetch(reference: Any) -> Any:
    """The object behind a reference into Ray's object store, read in place.

    Raises:
        DataError: it stands for images that could not be read.
    """
    from ray.exceptions import RayTaskError

    try:
        return import_ray().get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, DataError):
            raise error.cause from error
        raise
