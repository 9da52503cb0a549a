"""torchrun: runs the engine in the processes that torchrun, or Kubeflow's trainer, has started.

Every process has the same command line. The first one is the driver, too: it holds the run's lock, and sends its curve to MLflow.
Images are read by each process, from data.cache where the set is kept on disk. torchrun itself starts the group again after a
failure (--max-restarts); the run resumes from its newest checkpoint.
"""

import datetime
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from rotssl import config as cfg
from rotssl.base.paths import AnyPath
from rotssl.config import ResolvedConfig
from rotssl.config.fields import ConfigError
from rotssl.engine.events import Event, Usage

TIMEOUT_S = 600  # of a collective, and for the last process to arrive


@dataclass(frozen=True)
class Group:
    """The processes that torchrun has started.

    Attributes:
        rank: number of this one.
        count: of all of them.
        local: number of this one on its machine.
    """

    rank: int
    count: int
    local: int


def group() -> Group | None:
    """The group that this process was started in; None if torchrun has not started it.

    Ray Train, too, sets ranks and addresses in its workers, and so do some platforms everywhere.
    """
    found = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if not os.environ.get("TORCHELASTIC_RUN_ID") or not all(value.isdecimal() for value in found):
        return None
    rank, count, local = map(int, found)
    return Group(rank, count, local)


def check(config: ResolvedConfig, group: Group) -> None:
    """Check that the group fits the configuration.

    Raises:
        ConfigError: it has another number of processes than asked for, or they cannot share the batch.
    """
    asked = config.scaling.num_workers
    if asked not in ("auto", 0, group.count):
        raise ConfigError(f"scaling.num_workers: got {asked}, but torchrun has started {group.count} processes")
    cfg.check_workers(config, group.count)


@contextmanager
def joined(config: ResolvedConfig, group: Group) -> Iterator[tuple[str, Any]]:
    """The process group of all processes within the body, which gets the name of the device of this one, and their store.

    Raises:
        ConfigError: a GPU is asked for and torch finds none for this process.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    from rotssl.engine import hardware

    gpu = hardware.uses_gpu(config)
    if gpu and group.local >= torch.cuda.device_count():
        raise ConfigError(
            f"scaling.use_gpu: process {group.local} of this machine has no GPU: torch finds {torch.cuda.device_count()}"
        )
    device = f"cuda:{group.local}" if gpu else "cpu"
    if gpu:
        torch.cuda.set_device(group.local)
    else:
        torch.set_num_threads(config.scaling.cpus_per_worker)
    patience = datetime.timedelta(seconds=TIMEOUT_S)
    store, rank, count = next(rendezvous("env://", group.rank, group.count, timeout=patience))
    # torchrun keeps its store over restarts, with the addresses of processes that are dead.
    store = PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank, world_size=count, timeout=patience)
    yield device, store.clone()  # a connection of its own, so that nobody waits for another's answer
    dist.destroy_process_group()  # not after an error, when the others may no longer answer


def machines(group: Group) -> tuple[int, int, int]:
    """The number of this machine, that of all of them, and that of the processes here, as torchrun has set them."""
    names = {"GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": group.count}
    node, nodes, here = (int(os.environ.get(name, default)) for name, default in names.items())
    return node, nodes, here


def passed_on(store: Any, node: int, nodes: int, show: Callable[[Event], None]) -> Callable[[Usage], None]:
    """What takes a machine's samples: the first machine shows them, and those that the others leave in the store for it.

    Args:
        store: of the process group.
        node: number of this machine.
        nodes: of all of them.
        show: called on the first machine.
    """

    def leave(sample: Usage) -> None:
        store.set(f"usage-{node}", json.dumps(sample.metrics))

    def collect(sample: Usage) -> None:
        show(sample)
        for key in (f"usage-{other}" for other in range(1, nodes)):
            if store.check([key]):
                show(Usage(json.loads(store.get(key))))
                store.delete_key(key)

    return leave if node else collect


def work(config: ResolvedConfig, group: Group, show: Callable[[Event], None]) -> str | None:
    """Train in this process of the group; returns None, or the reason why the run failed, which all processes return.

    Args:
        config: resolved.
        group: of ``group()``.
        show: called with each event; only the first process has any.
    """
    import torch

    from rotssl.base import distributed
    from rotssl.data import datasets
    from rotssl.data.images import DataError
    from rotssl.engine import usage
    from rotssl.engine.events import Note
    from rotssl.engine.runtime import LocalRuntime, RunFailed
    from rotssl.engine.trainer import Trainer
    from rotssl.runs.journal import Journal

    class Runtime(LocalRuntime):
        def __init__(self, run_dir: AnyPath, device: torch.device) -> None:
            super().__init__(run_dir, device, show if group.rank == 0 else lambda event: None)
            self.rank, self.world_size = group.rank, group.count

        def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
            return distributed.data_parallel(model, self.device)

    with ExitStack() as stack:
        name, store = stack.enter_context(joined(config, group))
        runtime = Runtime(config.run_dir, torch.device(name))
        if group.local == 0:
            node, nodes, here = machines(group)
            tell = passed_on(store, node, nodes, show)
            device, number = runtime.device, node if nodes > 1 else None
            stack.enter_context(usage.sampled(config, device, tell, here, number))
        splits, reason = None, ""
        try:
            splits = datasets.load(config.data, config.evaluation.holdout, lambda line: runtime.progress(Note(line)))
        except (ConfigError, DataError) as error:
            reason = str(error)
        if group.count > 1:
            reason = distributed.first_nonempty(reason, runtime.device)
        if splits is None or reason:
            return reason
        try:
            Trainer(config, splits, runtime, Journal(config.run_dir)).run()
        except (RunFailed, DataError) as error:
            return str(error)
    return None
