"""Ray Train: runs the engine on several workers.

The driver connects to a cluster, checks that the workers fit, loads the data into Ray's object store (one copy per node, read
in place by all its workers; images on disk are mapped by the workers themselves) and passes the training loop to a TorchTrainer.
A worker group that dies is started again (attempts.py); it resumes from the newest checkpoint in storage.path.
"""

import contextlib
import logging
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from rotssl import config as cfg
from rotssl.base.errors import in_a_line, last_line
from rotssl.base.paths import AnyPath
from rotssl.base.place import credentials
from rotssl.config import ResolvedConfig
from rotssl.config.fields import ConfigError
from rotssl.config.resolved import ResolvedData
from rotssl.data import datasets
from rotssl.data.images import DataError
from rotssl.engine.events import Alert, Event, Note
from rotssl.runs import checkpoint
from rotssl.runs.journal import Journal
from rotssl.runtimes import ray_methods, ray_start, watch
from rotssl.runtimes.attempts import Attempts
from rotssl.runtimes.ray_cluster import Workers, import_ray
from rotssl.runtimes.ray_gauges import gauged

log = logging.getLogger(__name__)
COLLECTIVE_TIMEOUT_S = 600


class RayRuntime:
    """The engine's Runtime inside a Ray Train worker.

    Args:
        run_dir: folder for checkpoints.
        queue: receives the events of rank 0.
    """

    def __init__(self, run_dir: AnyPath, queue: Any) -> None:
        import ray.train.torch

        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.run_dir, self.queue = run_dir, queue

    def wrap(self, model: Any) -> Any:
        """The model to call: wrapped in DDP if there are several workers."""
        from rotssl.base.distributed import data_parallel

        return data_parallel(model, self.device)

    def report(self, metrics: dict[str, float]) -> None:
        """Report to Ray Train; waits for the other workers."""
        import ray.train

        ray.train.report(metrics)

    def prune(self) -> None:
        """Keep the newest checkpoints only."""
        # A worker of an earlier start, cut off from the driver, may be writing still, or this one may be it.
        checkpoint.prune(self.run_dir, parts=False)

    def progress(self, event: Event) -> None:
        """Send an event to the driver without waiting."""
        if self.rank == 0 and self.queue is not None:
            self.queue.actor.put_nowait.remote(event)


class _Forward(logging.Handler):
    """Forwards a worker's warnings to the driver's terminal."""

    def __init__(self, runtime: RayRuntime) -> None:
        super().__init__(logging.WARNING)
        self.runtime = runtime

    def emit(self, record: logging.LogRecord) -> None:
        self.runtime.progress(Alert(record.getMessage()))


def _work(task: dict[str, Any]) -> dict[str, Any]:
    """The body of each worker; returns {"failed": reason} for failures that a retry would not change."""
    import ray
    from ray.exceptions import RayTaskError

    from rotssl.engine.runtime import RunFailed
    from rotssl.engine.trainer import Trainer
    from rotssl.methods import outside

    os.environ.update(task["credentials"])
    try:
        ray_methods.unpack(task["methods"])
        config = cfg.from_dict(task["config"])
        outside.load(config.method.name)
    except ConfigError as error:  # a method from outside that this node does not have
        return {"failed": str(error)}
    logging.disable(logging.INFO)  # Ray Train would print every report
    warnings.filterwarnings(
        "ignore", message="The given NumPy array is not writable"
    )  # of arrays in the object store, which are only read
    try:
        runtime = RayRuntime(config.run_dir, task["queue"])
        if runtime.rank == 0:
            logging.getLogger("rotssl").addHandler(_Forward(runtime))
        task["queue"].actor.put_nowait.remote(watch.Joined.here(runtime.rank))
        with watch.signs_of_life(task["queue"], config.scaling.hang_minutes), _sampled(config, runtime):
            splits = ray.get(task["data"]) if task["data"] is not None else _map_images(config, runtime)
            Trainer(config, splits, runtime, Journal(config.run_dir)).run()
    except (RunFailed, DataError) as error:
        return {"failed": str(error)}
    except RayTaskError as error:
        if isinstance(error.cause, DataError):
            return {"failed": str(error.cause)}
        raise
    return {}


def _sampled(config: ResolvedConfig, runtime: RayRuntime) -> contextlib.AbstractContextManager[None]:
    """Send the driver samples of this node, from its first worker."""
    import ray.train

    from rotssl.engine import usage

    context = ray.train.get_context()
    if context.get_local_rank() > 0:
        return contextlib.nullcontext()
    here = context.get_local_world_size()
    node = context.get_node_rank() if here < runtime.world_size else None
    return usage.sampled(config, runtime.device, runtime.queue.actor.put_nowait.remote, here, node)


def _map_images(config: ResolvedConfig, runtime: RayRuntime) -> datasets.Splits:
    """The images on this node's disk, decoded first if necessary.

    Raises:
        DataError: one of the workers can't read them; raised on all workers.
    """
    import ray.train.collective

    from rotssl.base import distributed

    splits, reason = None, ""
    try:
        splits = datasets.load(config.data, config.evaluation.holdout, lambda line: runtime.progress(Note(line)))
    except (ConfigError, DataError) as error:
        reason = str(error)
    # Decoding may take long: a collective of torch would time out on the other nodes, this barrier does not.
    ray.train.collective.barrier()
    reason = distributed.first_nonempty(reason, runtime.device)
    if splits is None or reason:
        raise DataError(reason)
    return splits


def fit(
    config: ResolvedConfig,
    workers: Workers,
    show: Callable[[Event], None],
    data: Any = None,
) -> str | None:
    """Run the engine on Ray Train workers; returns None, or the reason why the run failed.

    Args:
        config: resolved.
        workers: from connected().
        show: called with each event, in a separate thread.
        data: the images in Ray's object store; loaded if None, unless the workers map them from disk.
    """
    ray = import_ray()
    from ray.exceptions import RayActorError
    from ray.train.v2.api.exceptions import TrainingFailedError

    def say(line: str) -> None:
        show(Alert(line))

    queue = _queue(ray)
    data = data or load(config, queue)
    guard = watch.Watch(
        config.scaling.hang_minutes,
        kill=ray.kill,
        ready=lambda: data is None or bool(ray.wait([data], timeout=0, fetch_local=False)[0]),
        say=say,
    )
    head = watch.Head(ray.get_runtime_context().gcs_address)
    starts = Attempts(config, workers, ray.nodes, guard, say)
    with (
        tempfile.TemporaryDirectory(prefix="rotssl-ray-", ignore_cleanup_errors=True) as scratch,
        _rendering(queue, starts.heard(gauged(config, show)), guard),
        guard.on(),
    ):
        while True:
            starts.start()
            try:
                outcome = head.until_done(_trainer(config, starts.workers, data, queue, scratch).fit, starts.look)
                return (outcome.return_value or {}).get("failed")
            except watch.HeadGone as error:
                ray_start.disconnect(ray)  # before Ray ends this process
                return str(error)
            except (TrainingFailedError, RayActorError) as error:
                if ended := head.gone() or starts.again(guard.to_blame or last_line(error), _timed_out(error)):
                    return ended
            except KeyboardInterrupt:
                guard.stop()
                raise


def _queue(ray: Any) -> Any:
    """The queue of events, on the driver's own node: with another one the driver would lose it, and all that is in it."""
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Queue(actor_options={"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here})


def _timed_out(error: BaseException) -> bool:
    """Whether the workers did not start in time."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError)


def _trainer(config: ResolvedConfig, workers: Workers, data: Any, queue: Any, scratch: str) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    from rotssl.runtimes.ray_group import GroupConfig, Tell

    return TorchTrainer(
        _work,
        train_loop_config={
            **{"config": cfg.to_dict(config), "data": data, "queue": queue},
            "credentials": credentials(),
            "methods": ray_methods.packed([config.method.name]),
        },
        torch_config=GroupConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=workers.count, use_gpu=workers.use_gpu, resources_per_worker=_resources(config, workers)
        ),
        run_config=RunConfig(
            name=config.run_dir.name,
            # A place of this machine: the engine writes its checkpoints itself, and finds the newest one, wherever it was made.
            storage_path=scratch,
            # Which failure is one too many, starts.failed decides.
            failure_config=FailureConfig(max_failures=-1, controller_failure_limit=0, max_preemption_failures=0),
            callbacks=[Tell(queue)],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def load(config: ResolvedConfig, queue: Any = None) -> Any:
    """A reference to the images of a run, which some node of the cluster loads; None if each node has them on disk.

    The queue receives its signs of life.
    """
    if config.data.store == "disk":
        return None
    minutes = config.scaling.hang_minutes if queue is not None else 0.0
    # However often nodes go that hold the only copy.
    return (
        import_ray()
        .remote(num_cpus=0, max_retries=-1)(_load)
        .remote(config.data, config.evaluation.holdout, queue, minutes)
    )


def _load(data: ResolvedData, holdout: float, queue: Any, minutes: float) -> datasets.Splits:
    with watch.signs_of_life(queue, minutes):
        return datasets.load(data, holdout)


def data_lines(data: Any) -> Future[tuple[str, ...]]:
    """What there is to say about images that ``load`` reads, once it has; the images stay where they are."""
    future: Future[tuple[str, ...]] = import_ray().remote(num_cpus=0)(_lines).remote(data).future()
    return future


def _lines(splits: datasets.Splits) -> tuple[str, ...]:
    return splits.lines


def _resources(config: ResolvedConfig, workers: Workers) -> dict[str, float]:
    return {"CPU": config.scaling.cpus_per_worker, **({"GPU": 1} if workers.use_gpu else {})}


@contextlib.contextmanager
def _rendering(queue: Any, show: Callable[[Event], None], guard: watch.Watch) -> Iterator[None]:
    """Show the workers' events in another thread, because fit() blocks the driver's main thread."""
    from queue import Empty

    done = threading.Event()

    def draw() -> None:
        while True:
            finished = done.is_set()
            try:
                event = queue.get(block=not finished, timeout=0.5)
            except Empty:
                if finished:
                    return
                continue
            except Exception:  # of any kind: without a head or a connection Ray raises plain ones
                if finished:
                    return
                done.wait(0.5)  # whatever is wrong may pass, and the run's lines must not end before the run
                continue
            try:
                if not guard.see(event):
                    show(event)
            except Exception as error:  # of any kind, a disk's or Ray's: the lines must not end before the run
                log.warning("an event of the run is lost (%s)", in_a_line(error))

    thread = threading.Thread(target=draw, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=10)
        if import_ray().is_initialized():
            queue.shutdown(grace_period_s=0)
