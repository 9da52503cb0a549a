"""Shards made by processes of this machine."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from rotssl.packing.shards import Options, Record, Task, make


def in_processes(tasks: Sequence[Task], options: Options, address: str, workers: int) -> Iterator[Record]:
    """Make shards in so many processes; yields their records as they come.

    Raises:
        OSError: one cannot be written; no further ones are started.
    """
    if not tasks:
        return
    # Spawned: a forked process would inherit threads' locks. What is imported takes a tenth of a second.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(tasks)), context) as pool:
        futures = [pool.submit(make, task, options, address) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
