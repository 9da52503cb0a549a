"""Batches of an epoch for one worker, prepared in a background thread during the previous step.

Order and content are functions of seed, epoch and step (rotssl.base.rng), so they are the same with and without the thread.
"""

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from rotssl.base import rng
from rotssl.base.step import StepContext
from rotssl.config import ResolvedConfig
from rotssl.data.augment import Augment
from rotssl.data.images import Labels, Lazy, Pixels

AHEAD = 2  # batches that the thread prepares in advance
Batch = TypeVar("Batch")


def prefetch(
    make: Callable[[int], Batch], count: int, ahead: int, start: Callable[[], object] | None = None, threads: int = 1
) -> Iterator[Batch]:
    """``make(0)`` to ``make(count - 1)`` in order, made in background threads, at most ``ahead`` items in advance.

    An exception in ``make`` is raised in place of its item. Each thread calls ``start`` first, and ends when the iterator is
    exhausted, closed or dropped.
    """
    thread = ThreadPoolExecutor(threads, "input", start)
    try:
        waiting: deque[Future[Batch]] = deque(thread.submit(make, i) for i in range(min(ahead, count)))
        for i in range(count):
            batch = waiting.popleft().result()
            if i + ahead < count:
                waiting.append(thread.submit(make, i + ahead))
            yield batch
    finally:
        thread.shutdown(wait=False, cancel_futures=True)  # no wait: garbage collection may run in this very thread


def classes_of(labels: Labels, seed: int) -> rng.Floats:
    """Class of each image and a number in [0, 1) of its own, for an oracle; (N, 2).

    The numbers are evenly spread, so that exactly a share f of the images has one below f, and functions of the seed.
    """
    own = (rng.permutation(rng.key(seed, "oracle"), len(labels)) + 0.5) / len(labels)
    return np.stack([labels, own], 1)


def input_threads(images: Pixels | Lazy) -> int:
    """Threads that prepare batches: two where images are decoded, so that a batch's last ones do not hold up the next batch."""
    return 1 if isinstance(images, np.ndarray) else 2


class Loader:
    """This worker's batches.

    A thread is used only if there is something to wait for: a copy to a GPU, with what is drawn for the views, or images that may
    have to be read from a disk. Copying a batch from memory takes about a thousandth of even a small encoder's step on CPUs
    (benchmarks/input_wait.py), which is all that a thread could save.

    Args:
        config: resolved.
        images: (N, C, H, W) uint8, or lazy.
        device: device of the batches.
        rank: rank of this worker.
        world_size: number of workers that share each batch.
        augment: draws for the views of the batches, in the thread.
        labels: of the images, (N,), if the training reads them.

    Attributes:
        steps_per_epoch: number of full batches; remaining images are dropped.
        total_steps: number of steps of the run.
        ahead: batches prepared in advance; 0: none, and no thread.
        waited: seconds that the consumer has waited for batches so far, without the time a GPU waits for a copy.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        images: Pixels | Lazy,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        augment: Augment | None = None,
        labels: Labels | None = None,
    ) -> None:
        self.config, self.images, self.augment = config, images, augment
        self.device, self.rank, self.world_size = device, rank, world_size
        self.steps_per_epoch = len(images) // config.train.batch_size
        self.total_steps = self.steps_per_epoch * config.train.epochs
        on_gpu = device.type == "cuda"
        in_memory = type(images) is np.ndarray
        self.ahead = AHEAD if on_gpu or not in_memory else 0
        self.stream = torch.cuda.Stream(device) if on_gpu else None
        self.waited = 0.0
        self.classes = None if labels is None else classes_of(labels, config.train.seed)

    def batches(self, epoch: int, begin: int = 0) -> Iterator[tuple[Tensor, StepContext]]:
        """The uint8 images of each step on the device, (B, C, H, W), with the step's context, from the step ``begin``."""
        started = time.perf_counter()
        size, steps = self.config.train.batch_size, self.steps_per_epoch
        order = rng.permutation(rng.key(self.config.train.seed, epoch, "order"), len(self.images))
        each = self.config.train.share(self.world_size)

        def make(i: int) -> tuple[Tensor, torch.cuda.Event | None, StepContext]:
            i += begin
            first = i * size + self.rank * each
            index = order[first : first + each]
            ctx = self._context(epoch, i, np.arange(first, first + each), index)
            return self._send(self._cut(index, ctx), ctx)

        if not isinstance(self.images, np.ndarray):
            self.images.begin()
        device = self.device  # a new thread would use the first GPU of the node and create a context there
        start = functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        left = steps - begin
        found = (
            prefetch(make, left, self.ahead, start, input_threads(self.images))
            if self.ahead
            else map(make, range(left))
        )
        try:
            for images, copied, ctx in found:
                if copied is not None:
                    stream = torch.cuda.current_stream(self.device)
                    stream.wait_event(copied)
                    told = [] if ctx.classes is None else [ctx.classes]
                    for tensor in (images, *told, *(drawn.numbers for drawn in ctx.draws)):
                        tensor.record_stream(stream)
                self.waited += time.perf_counter() - started
                yield images, ctx
                started = time.perf_counter()
        finally:
            if not isinstance(self.images, np.ndarray):
                self.images.end()

    def _cut(self, index: rng.Positions, ctx: StepContext) -> Tensor:
        """The images with these indices; of lazy ones the views, cut."""
        if isinstance(self.images, np.ndarray):
            return torch.from_numpy(np.take(self.images, index, axis=0))
        assert self.augment is not None
        return torch.from_numpy(self.images.cuts(index, self.augment.cuts(ctx, *self.images.sizes(index))))

    def _send(self, images: Tensor, ctx: StepContext) -> tuple[Tensor, torch.cuda.Event | None, StepContext]:
        """The images and what is drawn for them on the device, and on GPUs the event after the copies, which overlap a step."""
        if self.stream is None:
            return images, None, self.prepare(ctx, images)
        with torch.cuda.stream(self.stream):
            stored, images = images, images.pin_memory().to(self.device, non_blocking=True)
            if ctx.classes is not None:
                ctx = replace(ctx, classes=ctx.classes.pin_memory().to(self.device, non_blocking=True))
            ctx = self.prepare(ctx, stored)
            return images, self.stream.record_event(), ctx

    def prepare(self, ctx: StepContext, images: Tensor) -> StepContext:
        """The context with the draws for the views of each pass, on the device, if batches are prepared in advance."""
        if self.augment is None or not self.ahead:
            return replace(ctx, draws=())
        each = len(ctx.positions) // ctx.passes
        spans = [slice(first, first + each) for first in range(0, len(ctx.positions), each)]
        drawn = [self.augment.draw(replace(ctx, positions=ctx.positions[span]), images[span]) for span in spans]
        return replace(ctx, draws=tuple(part.to(self.device) for part in drawn))

    def _context(self, epoch: int, i: int, positions: rng.Positions, index: rng.Positions) -> StepContext:
        step, train = epoch * self.steps_per_epoch + i, self.config.train
        return StepContext(
            seed=train.seed,
            epoch=epoch,
            step=step,
            progress=step / self.total_steps,
            positions=positions,
            batch_start=i * train.batch_size,
            batch_size=train.batch_size,
            global_views=self.config.views.global_count,
            passes=train.accumulate,
            classes=None if self.classes is None else torch.from_numpy(self.classes[index]),
        )
