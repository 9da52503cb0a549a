"""Shards made by the nodes of a Ray cluster."""

from collections.abc import Iterator, Sequence

from rotssl.packing.shards import Options, Record, Task, make
from rotssl.runtimes import ray_start
from rotssl.runtimes.ray_cluster import import_ray


def on_cluster(tasks: Sequence[Task], options: Options, address: str) -> Iterator[Record]:
    """Make shards on all cores of a cluster; yields their records as they come.

    Raises:
        OSError: one cannot be written.
    """
    ray = import_ray()
    ours = not ray.is_initialized()
    if ours:
        ray_start.connect(ray, ray_start.address())
    try:
        # A task whose node is lost is made again by another one.
        work = ray.remote(num_cpus=1, max_retries=3, scheduling_strategy="SPREAD")(make)
        waiting = [work.remote(task, options, address) for task in tasks]
        while waiting:
            done, waiting = ray.wait(waiting)
            yield from ray.get(done)
    finally:
        if ours:
            ray_start.disconnect(ray)
