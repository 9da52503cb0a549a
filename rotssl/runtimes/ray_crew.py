"""The tasks of an evaluation on workers of a Ray cluster, each with the encoder and the images of its own or of its node.

A worker that dies is started again, on another node if need be, and does its task again: a task's result does not depend on
where it is computed.
"""

import contextlib
import functools
import logging
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rotssl import config as cfg
from rotssl.base.place import credentials
from rotssl.config.evaluating import WorkerOptions
from rotssl.config.fields import ConfigError
from rotssl.data.images import DataError, ImageSet
from rotssl.evaluation.crew import Task, WorkersGone
from rotssl.evaluation.setting import Setting
from rotssl.evaluation.subject import Subject
from rotssl.runtimes import ray_methods
from rotssl.runtimes.ray_cluster import connected, import_ray

RETRIES = 3  # of a worker, and of a task whose worker has died


@contextlib.contextmanager
def crew_of(
    options: WorkerOptions, setting: Setting, images: tuple[ImageSet, ImageSet], say: Callable[[str], None]
) -> Iterator["RayCrew"]:
    """Workers of the cluster, of this machine's if there is none, within the body.

    Args:
        options: how many, and what each gets.
        setting: what is measured.
        images: of ``setting``: those in memory are sent, others are read by each worker.
        say: called with the titles of tasks.

    Raises:
        ConfigError: there is no connection, or the workers don't fit into the cluster.
    """
    asked = {f"scaling.{key}": value for key, value in vars(options).items()}
    with connected(cfg.replace(setting.config, asked), batch=False) as workers:
        ray = import_ray()
        config = setting.config
        about = {
            **{"config": cfg.to_dict(config), "methods": ray_methods.packed([config.method.name])},
            **{"folder": setting.folder, "network": setting.network, "epoch": setting.epoch, "other": setting.other},
        }
        in_memory = all(type(each.images) is np.ndarray for each in images)  # neither lazy nor mapped from a file
        sent = ray.put(images) if in_memory else None
        share = {"num_cpus": options.cpus_per_worker, "num_gpus": 1 if workers.use_gpu else 0}
        again = {"max_restarts": RETRIES, "max_task_retries": RETRIES, "scheduling_strategy": "SPREAD"}
        actors = [
            ray.remote(Worker).options(**share, **again).remote(about, credentials(), workers.use_gpu, sent)
            for _ in range(workers.count)
        ]
        say(f"evaluating on {workers.count} {'GPU' if workers.use_gpu else 'CPU'} workers")
        try:
            yield RayCrew(actors, say)
        finally:
            for actor in actors:
                ray.kill(actor)


class RayCrew:
    """A crew of Ray actors.

    Args:
        actors: of ``Worker``.
        say: called with the title of each task when it starts.
    """

    def __init__(self, actors: Sequence[Any], say: Callable[[str], None]) -> None:
        self.actors, self.count, self.say = actors, len(actors), say

    def share(self, value: Any) -> Any:
        """A reference to the value in Ray's object store."""
        return import_ray().put(_on_cpu(value))

    def run(self, tasks: Sequence[Task]) -> list[Any]:
        """What the tasks return, in their order; tensors are on the CPU.

        Raises:
            ConfigError, DataError: a worker cannot read the encoder or an image.
            WorkersGone: a task's workers have died again and again.
        """
        ray = import_ray()
        from ray.exceptions import RayActorError, RayTaskError

        waiting, free = deque(enumerate(tasks)), list(self.actors)
        busy: dict[Any, tuple[int, Any]] = {}
        found: list[Any] = [None] * len(tasks)
        while waiting or busy:
            while waiting and free:
                index, task = waiting.popleft()
                if task.title:
                    self.say(task.title)
                actor = free.pop()
                busy[actor.work.remote(task.name, *task.args)] = index, actor
            for ready in ray.wait(list(busy))[0]:
                index, actor = busy.pop(ready)
                free.append(actor)
                try:
                    found[index] = ray.get(ready)
                except RayTaskError as error:
                    if isinstance(error.cause, ConfigError | DataError):
                        raise error.cause from error
                    raise
                except RayActorError as error:
                    raise WorkersGone(f"a worker of the evaluation has died {RETRIES + 1} times") from error
        return found


class Worker:
    """The body of an actor.

    Args:
        about: of the setting.
        login: for the environment.
        use_gpu: whether it has a GPU.
        images: of the setting; None: it reads them.
    """

    def __init__(
        self,
        about: Mapping[str, Any],
        login: Mapping[str, str],
        use_gpu: bool,
        images: tuple[ImageSet, ImageSet] | None,
    ) -> None:
        os.environ.update(login)
        logging.disable(logging.INFO)
        # Of arrays in the object store, which are only read.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self.about, self.images, self.use_gpu = about, images, use_gpu

    @functools.cached_property
    def subject(self) -> Subject:
        """The encoder and the images, read by the first task: what goes wrong is an error of that task, not of the start."""
        import torch

        from rotssl.engine.runtime import indexed

        about = dict(self.about)
        ray_methods.unpack(about.pop("methods"))
        setting = Setting(**about | {"config": cfg.from_dict(about["config"])})
        device = indexed(torch.device("cuda" if self.use_gpu else "cpu"))
        return Subject(*setting.loaded(*(self.images or setting.images()), device))

    def work(self, name: str, *args: Any) -> Any:
        """Do a task of this name and arguments."""
        return _on_cpu(self.subject.work(Task(name, args)))


def _on_cpu(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_on_cpu, value))
    return value.to("cpu") if hasattr(value, "to") else value
