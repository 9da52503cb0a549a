"""The connection to a Ray cluster, and the check that the workers fit into it."""

import contextlib
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rotssl import config as cfg
from rotssl.config import Config
from rotssl.config.fields import ConfigError
from rotssl.data.images import DataError
from rotssl.runtimes import ray_start

log = logging.getLogger(__name__)
ASK_S = 30.0  # between wishes to the autoscaler
# Set before Ray starts; Train passes the first one to its controller and workers.
_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # the last report waits for the controller's next poll, by default 2 s
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that outlives the connection must not start another cluster
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class NoRoom(ConfigError):
    """The workers do not fit into the cluster as it is now."""


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
def connected(config: Config, batch: bool = True) -> Iterator[Workers]:
    """Connect to the cluster of RAY_ADDRESS or of ``ray start`` on this machine, or start a local one, within the body.

    Args:
        config: of the run.
        batch: whether the workers are to share its batches.

    Raises:
        ConfigError: there is no connection, or the workers don't fit into the cluster.
    """
    ray = import_ray()
    ours = not ray.is_initialized()
    asked = config.scaling.wait_minutes
    patience = 0.0 if asked == "auto" else 60 * asked
    if ours:
        address = ray_start.address()
        if address == "local":
            patience = 0  # no node will join
            check_machine(config)
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody preempts a cluster of our own
        ray_start.connect(ray, address)
    try:
        yield _wait_for_room(config, ray, patience, batch)
    finally:
        if ours:
            ray_start.disconnect(ray)


def _wait_for_room(config: Config, ray: Any, patience: float, batch: bool) -> Workers:
    """The workers for a cluster that may still grow.

    Raises:
        ConfigError: they don't fit into it, or still don't after so many seconds.
    """
    ends, told, asked = time.monotonic() + patience, "", -math.inf
    try:
        while True:
            try:
                return plan_workers(config, ray.cluster_resources(), ray.nodes(), batch)
            except NoRoom as error:
                if time.monotonic() >= ends:
                    raise
                if str(error) != told:
                    told = str(error)
                    log.warning("%s; waiting for nodes (scaling.wait_minutes %g)", error, patience / 60)
                if time.monotonic() - asked > ASK_S:  # again and again: the wish of one run replaces that of another
                    _wake_autoscaler(config)
                    asked = time.monotonic()
            time.sleep(2)
    finally:
        if asked > -math.inf:
            _wake_autoscaler(None)


def _wake_autoscaler(config: Config | None) -> None:
    """Tell the cluster's autoscaler, if there is one, what the workers need; None takes that back."""
    from ray.autoscaler.sdk import request_resources

    bundles: list[dict[str, float]] = []
    if config is not None:
        gpu = {"GPU": 1.0} if config.scaling.use_gpu is True else {}
        asked = config.scaling.num_workers
        bundles = [{"CPU": float(config.scaling.cpus_per_worker), **gpu}] * (1 if asked == "auto" else max(1, asked))
    request_resources(bundles=bundles)


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


def plan_workers(
    config: Config, resources: dict[str, float], nodes: list[dict[str, Any]], batch: bool = True
) -> Workers:
    """The workers for a cluster: as configured, else one per GPU, else one per core up to two.

    Args:
        config: configuration of the run.
        resources: totals of the cluster, from ray.cluster_resources().
        nodes: nodes of the cluster, from ray.nodes().
        batch: whether they are to share the batch.

    Raises:
        NoRoom: they don't fit into the cluster.
        ConfigError: they cannot share the batch.
    """
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    scaling = config.scaling
    use_gpu = gpus > 0 if scaling.use_gpu == "auto" else scaling.use_gpu
    if use_gpu and gpus == 0:
        raise NoRoom("scaling.use_gpu: got true, but the cluster has no GPU")
    alive = [node for node in nodes if node.get("Alive", True)]
    places = places_for(config, alive, False)
    why = ""
    if scaling.num_workers == "auto":
        most = max(1, min(gpus, places) if use_gpu else min(2, places))
        count = max((n for n in range(1, most + 1) if not cfg.unshared(config, n)), default=1) if batch else most
        why = cfg.unshared(config, most) if batch else ""
    else:
        count = scaling.num_workers
    if use_gpu and count > gpus:
        raise NoRoom(f"scaling.num_workers: got {count} with a GPU each, expected at most the cluster's {gpus} GPUs")
    if count > places:
        raise NoRoom(
            f"scaling.num_workers: got {count} with {scaling.cpus_per_worker} CPU each, but the cluster has {cpus} CPUs"
        )
    if batch:
        cfg.check_workers(config, count)
    return Workers(count, use_gpu, len({node["NodeManagerAddress"] for node in alive}), why)


def places_for(config: Config, nodes: Sequence[Mapping[str, Any]], use_gpu: bool) -> int:
    """The number of workers that the living ones among these nodes have room for."""
    total = 0
    for node in nodes:
        has = node["Resources"] if node.get("Alive", True) else {}
        cpus = int(has.get("CPU", 0)) // config.scaling.cpus_per_worker
        total += min(cpus, int(has.get("GPU", 0))) if use_gpu else cpus
    return total


def gone_from(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    """The nodes, in words, that were alive before and are not now."""
    alive = {node["NodeID"] for node in now if node.get("Alive", True)}
    return [
        f"node {node['NodeManagerAddress']}"
        for node in before
        if node.get("Alive", True) and node["NodeID"] not in alive
    ]


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
