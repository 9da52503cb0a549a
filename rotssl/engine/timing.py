"""Timing of steps on this machine."""

import contextlib
import dataclasses
import functools
import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from rotssl import config as cfg
from rotssl.base import memory
from rotssl.base.precision import HALF
from rotssl.base.step import StepContext
from rotssl.config import ResolvedConfig
from rotssl.config.datasets import DATASETS
from rotssl.config.fields import ConfigError
from rotssl.config.methods import METHODS
from rotssl.data import datasets
from rotssl.data.augment import Augment
from rotssl.data.datasets import Splits
from rotssl.data.decoding import MARGIN
from rotssl.data.images import ImageSet
from rotssl.engine import hardware
from rotssl.engine.flops import count_mean, period, samples
from rotssl.engine.runtime import LocalRuntime, RunFailed, indexed
from rotssl.engine.trainer import Trainer
from rotssl.evaluation.measure import encode_share
from rotssl.models.norm import exchanges
from rotssl.runs import journal

TIMED = 3  # timed steps of each size, after one warm-up step

DECODED = 128  # pictures whose decoding is timed

ENOUGH_S = 1.0  # no larger batches are timed once a step takes longer

# Assumed, in bytes per second: gloo between processes of one machine (0.7 to 0.9 GB/s measured), NCCL between GPUs on PCIe.
BANDWIDTH = {"cpu": 0.8e9, "cuda": 10e9}

# Assumed, in seconds: wait of the workers for one exchange of a layer's statistics; on CPUs measured by benchmarks/workers.py.
WAIT = {"cpu": 2e-3, "cuda": 5e-5}


@dataclass(frozen=True)
class Speed:
    """The speed of one worker on this machine.

    Attributes:
        device: ``cpu`` or ``cuda``.
        threads: number of threads of a CPU worker.
        precision: precision of its steps.
        fixed: seconds per step, regardless of its size.
        each: additional seconds per image.
        encode: seconds per image that is encoded for evaluation.
        matmul: FLOPs per second in the product of two large matrices, at this precision.
        flops: FLOPs of a training step per image.
        gradient: bytes that the workers reduce per step.
        exchanges: number of small exchanges per step, of BatchNorm's statistics and of gradient norms, rounded.
        decode: seconds per image for decoding a packed set's pictures and cutting the views; 0: they are in memory.
        too_many: smallest number of images per step that did not fit into memory; None: all tried sizes fitted.
    """

    device: str
    threads: int
    precision: str
    fixed: float
    each: float
    encode: float
    matmul: float
    flops: float
    gradient: float
    exchanges: int
    decode: float = 0.0
    too_many: int | None = None

    def step(self, images: int) -> float:
        """Seconds of a step on a number of images, without communication and decoding."""
        return self.fixed + self.each * images

    def with_decoding(self, seconds: float, images: float) -> float:
        """Seconds of some work on a number of images, with their decoding: beside a GPU's work, and on CPUs on the same cores."""
        decoding = self.decode * images
        return max(seconds, decoding) if self.device == "cuda" else seconds + decoding

    def communication(self, workers: int) -> float:
        """Seconds of communication per step: a ring all-reduce of gradients after the backward pass, and BatchNorm statistics."""
        gradients = 2 * (workers - 1) / workers * self.gradient / BANDWIDTH[self.device]
        return gradients + (self.exchanges * WAIT[self.device] if workers > 1 else 0.0)

    def utilization(self, images: int) -> float:
        """Share of the matrix multiplication rate that a step on a number of images reaches, in counted FLOPs."""
        return self.flops * images / self.step(images) / self.matmul


def matmul_rate(device: torch.device, kind: torch.dtype) -> float:
    """Median FLOPs per second of a product of two square matrices; fp32 on GPUs uses TF32, as convolutions do.

    Raises:
        ConfigError: there is not enough memory for the matrices.
    """
    before = torch.get_float32_matmul_precision()
    for side in (8192, 4096, 2048) if device.type == "cuda" else (1024,):
        try:
            a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
            if device.type == "cuda":
                torch.set_float32_matmul_precision("high")
            taken = statistics.median(_seconds(functools.partial(torch.matmul, a, b), device, 7)[2:])
            return 2 * side**3 / taken
        except RuntimeError as error:
            if not memory.is_exhausted(error):
                raise
        finally:
            torch.set_float32_matmul_precision(before)
    raise ConfigError(f"scaling.use_gpu: this {device.type} has too little free memory to multiply two matrices")


def _seconds(call: Callable[[], object], device: torch.device, count: int) -> list[float]:
    taken = []
    for _ in range(count):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return taken


@contextlib.contextmanager
def _threads(config: ResolvedConfig) -> Iterator[int]:
    """Within the body, torch uses as many threads as a worker of the run; without Ray, its default number."""
    before = torch.get_num_threads()
    torch.set_num_threads(config.scaling.cpus_per_worker if config.scaling.num_workers != 0 else before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def time_steps(config: ResolvedConfig, workers: int = 1) -> Speed:
    """Time steps of growing batches, up to a worker's share of the run's, until one takes a second or does not fit into memory.

    The images are synthetic, of the run's size. Times are means over the run, whose steps differ in the sides of views and in the
    tasks' work.

    Args:
        config: resolved.
        workers: number of workers that share the batch.

    Raises:
        ConfigError: the engine rejects the step, or not even the smallest batch fits.
    """
    gpu = hardware.uses_gpu(config)
    device = indexed(torch.device("cuda" if gpu else "cpu"))
    sizes = _sizes(config, workers)
    times: dict[int, float] = {}
    found: Speed | None = None
    with tempfile.TemporaryDirectory(prefix="rotssl-prediction-") as folder, _threads(config) as threads:
        for size in sizes:
            gc.collect()  # a Trainer refers to itself; the previous one must not occupy memory
            try:
                times[size], found = _time(config, size, folder, device, threads)
            except RunFailed as error:
                raise ConfigError(str(error)) from error
            except (RuntimeError, MemoryError) as error:
                if not memory.is_exhausted(error):
                    raise
                reason = str(error).splitlines()[0][:160]
            else:
                if times[size] > ENOUGH_S:
                    break
                continue
            # Outside the handler, whose traceback keeps the allocated memory alive.
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if found is None:
                raise ConfigError(
                    f"train.batch_size: got {config.train.batch_size}, but a step of {size} images does not fit into the "
                    f"memory here ({reason})"
                )
            found = dataclasses.replace(found, too_many=size)
            break
        assert found is not None
        fixed, each = fit_line(times)
        rate = matmul_rate(device, HALF.get(found.precision, torch.float32))
    flops = count_mean(config) / config.train.batch_size
    return dataclasses.replace(found, fixed=fixed, each=each, matmul=rate, flops=flops)


def _sizes(config: ResolvedConfig, workers: int) -> list[int]:
    """Numbers of images of the steps to time, up to a worker's share of the run's batch."""
    passes = config.train.accumulate
    parts = max(2, config.train.share(workers) // passes)
    share = min([task.least_share for task in config.active().values()], default=1.0)
    least = min(parts, math.ceil(2 / share))  # two images per pass, as a task's head normalises over them
    return sorted({max(least, parts >> k) * passes for k in range(max(1, parts.bit_length() - 2))})


def _time(config: ResolvedConfig, size: int, folder: str, device: torch.device, threads: int) -> tuple[float, Speed]:
    """Seconds of a step of a number of images, as a mean over the run, and a Speed with the other facts but no rates yet."""
    trainer = _trainer(config, size, folder, device)
    images, ctx = next(trainer.batches(1))  # the run's first step writes a picture, and compares gradients
    seconds = exchanged = 0.0
    for sample in samples(config):
        at = dataclasses.replace(ctx, progress=sample.progress, step=period(config) + sample.step)
        at = trainer.loader.prepare(at, images)
        step = functools.partial(trainer.step, images, at)
        with _exchanges(trainer, config.model.norm) as exchanges:
            taken = _seconds(step, device, 1)  # warms up
        taken = _seconds(step, device, 1 if taken[0] > 1 else TIMED)
        seconds += sample.share * statistics.median(taken)
        exchanged += sample.share * (sum(exchanges) + bool(trainer.model.balance.auto))
    part, encoder = trainer.splits.train, trainer.model.encoder
    encoding = functools.partial(
        encode_share, encoder, part, trainer.augment, device, trainer.layout, HALF.get(trainer.evaluator.precision)
    )
    seen = Speed(
        device.type,
        threads,
        trainer.precision,
        fixed=0.0,
        each=0.0,
        encode=statistics.median(_seconds(encoding, device, 3)[1:]) / len(part),
        matmul=math.nan,
        flops=math.nan,
        gradient=sum(4.0 * p.numel() for p in trainer.model.parameters() if p.requires_grad),
        exchanges=round(exchanged),
        decode=_decoding(config, trainer.augment, ctx),
    )
    return seconds, seen


def _decoding(config: ResolvedConfig, augment: Augment, ctx: StepContext) -> float:
    """Seconds per image, see Speed."""
    if DATASETS[config.data.name].kind != "packed":
        return 0.0
    images = datasets.load(config.data, config.evaluation.holdout).train.images
    if isinstance(images, np.ndarray):
        return 0.0
    index = np.arange(min(len(images), DECODED))
    cuts = augment.cuts(dataclasses.replace(ctx, positions=index), *images.sizes(index))
    work = functools.partial(images.cuts, index, cuts)
    return statistics.median(_seconds(work, torch.device("cpu"), 3)[1:]) / len(index)


@contextlib.contextmanager
def _exchanges(trainer: Trainer, norm: str) -> Iterator[list[int]]:
    """The exchanges that several workers would make within the body: one per forward, one more per backward with gradients."""
    found: list[int] = []
    layers = [m for m in trainer.model.modules() if norm == "sync" and isinstance(m, nn.modules.batchnorm._BatchNorm)]
    hooks = [
        m.register_forward_hook(lambda m, _, out: found.append((1 + out.requires_grad) * exchanges(m))) for m in layers
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def fit_line(times: dict[int, float]) -> tuple[float, float]:
    """Fixed seconds per step and seconds per image, from the two largest sizes; with one size, the fixed part is 0."""
    sizes = sorted(times)[-2:]
    each = times[sizes[-1]] / sizes[-1]
    if len(sizes) == 2:
        slope = (times[sizes[1]] - times[sizes[0]]) / (sizes[1] - sizes[0])
        each = min(each, max(slope, 0.0)) or each
    return times[sizes[-1]] - each * sizes[-1], each


def _trainer(config: ResolvedConfig, size: int, folder: str, device: torch.device) -> Trainer:
    """A Trainer with a given number of synthetic images per step, of the run's size; it reads and compiles nothing."""
    small = {"train.batch_size": size, "storage.path": folder, "scaling.num_workers": 0, "train.compile": False}
    small |= {"oracle.false_negatives": 0.0, "oracle.log": False}  # synthetic images have no labels
    small |= {"method.queue_size": size} if getattr(config.method, "queue_size", 0) else {}
    probe = cfg.replace(config, small)
    spec = DATASETS[config.data.name]
    side = spec.side or round(MARGIN * config.data.image_size)  # as images of mixed sizes are stored
    shape = size, spec.channels, side, side
    labels = np.zeros(size, np.int64) if METHODS[config.method.name].labels else None
    images = ImageSet(np.random.default_rng(0).integers(0, 256, shape, np.uint8), labels)
    return Trainer(probe, Splits(images, None, ()), LocalRuntime(probe.run_dir, device), journal.Journal(probe.run_dir))
