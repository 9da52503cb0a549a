"""Shards made by processes of this machine."""

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from rotssl.config.fields import ConfigError
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
    # After Ctrl-C this process says what there is to say.
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, signal.signal, (signal.SIGINT, signal.SIG_IGN))
    with pool:
        futures = [pool.submit(make, task, options, address) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise ConfigError(
                "a process was ended from outside, perhaps for lack of memory: give fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
