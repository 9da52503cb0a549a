"""How long runs will take on any number of workers, from a few timed steps of one and the FLOPs that torch counts."""

import contextlib
import dataclasses
import functools
import gc
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from rotssl import config as cfg
from rotssl.base import memory
from rotssl.config import ResolvedConfig
from rotssl.config.fields import ConfigError
from rotssl.config.sections import NATIVE_SIDE
from rotssl.data.datasets import Splits
from rotssl.data.images import ImageSet
from rotssl.engine.flops import count_step
from rotssl.engine.runtime import LocalRuntime, RunFailed, indexed
from rotssl.engine.trainer import Trainer
from rotssl.evaluation.measure import extract
from rotssl.runs import journal

WORKERS = (1, 2, 4, 8)
MIDDLE = 0.5  # of the run, where a share of rotated images that changes along a cosine has its mean
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of a precision; of fp32 none
TIMED = 3  # steps of each size, after one that warms up
ENOUGH_S = 1.0  # no larger batches are timed once a step takes so long
# Assumed, in bytes a second: gloo between processes of one machine (0.7 to 0.9 were measured), NCCL between GPUs on PCIe.
BANDWIDTH = {"cpu": 0.8e9, "cuda": 10e9}
# Assumed, in seconds: what an exchange of a layer's statistics keeps workers waiting; on CPUs as benchmarks/workers.py found.
WAIT = {"cpu": 2e-3, "cuda": 5e-5}


@dataclass(frozen=True)
class Speed:
    """What one worker does, on this machine.

    Attributes:
        device: ``cpu`` or ``cuda``.
        threads: of a CPU worker.
        precision: of its steps.
        fixed: seconds of a step whatever its size.
        each: further seconds for each image.
        encode: seconds for each image that is encoded for evaluation.
        matmul: FLOPs a second in the product of two large matrices, at that precision.
        flops: of a training step, for each image.
        gradient: bytes that the workers add up in a step.
        exchanges: of BatchNorm's statistics in a step.
        too_many: the fewest images a step that did not fit into its memory; None: all that were tried did.
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
    too_many: int | None = None

    def step(self, images: int) -> float:
        """Seconds of a step on so many images, without communication."""
        return self.fixed + self.each * images

    def communication(self, workers: int) -> float:
        """Seconds in which so many workers add up a step's gradients, in a ring after the backward pass, and its statistics."""
        gradients = 2 * (workers - 1) / workers * self.gradient / BANDWIDTH[self.device]
        return gradients + (self.exchanges * WAIT[self.device] if workers > 1 else 0.0)

    def utilization(self, images: int) -> float:
        """Share of the matrix-multiply rate that a step on so many images reaches, in counted FLOPs."""
        return self.flops * images / self.step(images) / self.matmul


def matmul_rate(device: torch.device, kind: torch.dtype) -> float:
    """FLOPs a second in a product of two square matrices, the median of some; of fp32 on GPUs in TF32, as convolutions are.

    Raises:
        ConfigError: there is no memory for the matrices.
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
    raise ConfigError(f"scaling.use_gpu: this {device.type} has no memory left for a product of two matrices")


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
    """As many as a worker of the run has; without Ray, all that torch takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(config.scaling.cpus_per_worker if config.scaling.num_workers != 0 else before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def time_steps(config: ResolvedConfig, workers: int = 1) -> Speed:
    """Time steps of growing batches, up to a worker's share of the run's, until one takes a second or does not fit into memory.

    The images are made up, of the run's size.

    Args:
        config: resolved.
        workers: among which its batch is divided.

    Raises:
        ConfigError: the engine refuses the step, or not even the smallest fits.
    """
    gpu = torch.cuda.is_available() if config.scaling.use_gpu == "auto" else config.scaling.use_gpu
    device = indexed(torch.device("cuda" if gpu else "cpu"))
    sizes = _sizes(config, workers)
    times: dict[int, float] = {}
    found: Speed | None = None
    with tempfile.TemporaryDirectory(prefix="rotssl-prediction-") as folder, _threads(config) as threads:
        for size in sizes:
            gc.collect()  # an engine refers to itself; the one before must not count
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
            # Out of the handler, whose traceback held on to what did fit.
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
        rate = matmul_rate(device, DTYPES.get(found.precision, torch.float32))
    flops = count_step(config, MIDDLE) / config.train.batch_size
    return dataclasses.replace(found, fixed=fixed, each=each, matmul=rate, flops=flops)


def _sizes(config: ResolvedConfig, workers: int) -> list[int]:
    """Numbers of images of the steps to be timed, up to what a worker has in one of the run's."""
    passes, rotation = config.train.accumulate, config.rotation
    parts = max(2, config.train.batch_size // (passes * max(1, workers)))
    share = min(rotation.fraction, rotation.fraction_end or 1.0) if rotation.weight > 0 else 1.0
    least = min(parts, math.ceil(2 / share))  # two rotated images a pass, as the task's head normalises over them
    return sorted({max(least, parts >> k) * passes for k in range(max(1, parts.bit_length() - 2))})


def _time(config: ResolvedConfig, size: int, folder: str, device: torch.device, threads: int) -> tuple[float, Speed]:
    """Seconds of a step of so many images, and what else is to be seen of the engine that took it; no rates yet."""
    trainer = _trainer(config, size, folder, device)
    images, ctx = next(trainer.batches(1))  # the run's first step writes a picture, and compares gradients
    ctx = dataclasses.replace(ctx, progress=MIDDLE)
    with _exchanges(trainer, config.model.norm) as exchanges:
        taken = _seconds(functools.partial(trainer.step, images, ctx), device, 1)  # warms up
    taken = _seconds(functools.partial(trainer.step, images, ctx), device, 1 if taken[0] > 1 else TIMED)
    part, encoder = trainer.splits.train, trainer.model.encoder
    encoding = functools.partial(extract, encoder, part, trainer.augment, device, trainer.layout)
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
        exchanges=sum(exchanges),
    )
    return statistics.median(taken), seen


@contextlib.contextmanager
def _exchanges(trainer: Trainer, norm: str) -> Iterator[list[int]]:
    """What several workers would exchange within the body: one forward, and one backward where there are gradients."""
    found: list[int] = []
    layers = [m for m in trainer.model.modules() if norm == "sync" and isinstance(m, nn.modules.batchnorm._BatchNorm)]
    hooks = [m.register_forward_hook(lambda _, args, out: found.append(1 + out.requires_grad)) for m in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def fit_line(times: dict[int, float]) -> tuple[float, float]:
    """Seconds of a step whatever its size, and for each image, by its two largest sizes; of one alone, nothing is fixed."""
    sizes = sorted(times)[-2:]
    each = times[sizes[-1]] / sizes[-1]
    if len(sizes) == 2:
        slope = (times[sizes[1]] - times[sizes[0]]) / (sizes[1] - sizes[0])
        each = min(each, max(slope, 0.0)) or each
    return times[sizes[-1]] - each * sizes[-1], each


def _trainer(config: ResolvedConfig, size: int, folder: str, device: torch.device) -> Trainer:
    """An engine whose steps have so many images, made up but of the run's size: nothing is read, nor compiled."""
    small = {"train.batch_size": size, "storage.path": folder, "scaling.num_workers": 0, "train.compile": False}
    small |= {"method.queue_size": size} if getattr(config.method, "queue_size", 0) else {}
    probe = cfg.replace(config, small)
    name = config.data.name
    side = NATIVE_SIDE.get(name, round(1.15 * config.data.image_size))  # as pictures of all sizes are stored
    shape = size, 1 if name.startswith("fashion-mnist") else 3, side, side
    images = ImageSet(np.random.default_rng(0).integers(0, 256, shape, np.uint8), None)
    return Trainer(probe, Splits(images, None, ()), LocalRuntime(probe.run_dir, device), journal.Journal(probe.run_dir))


def epoch_seconds(
    config: ResolvedConfig, speed: Speed, train_size: int, workers: int, labelled: bool = True
) -> tuple[float, float]:
    """Seconds of training and of evaluation in an epoch.

    The latter is the encoding of the images, validation taken as the share ``evaluation.holdout``; the classification is small
    beside it. Where nothing is held out there is one evaluation, at the end, of whose images test is not counted.

    Args:
        config: resolved.
        speed: of a worker.
        train_size: number of training images.
        workers: among which batches and images to be encoded are divided.
        labelled: whether there is anything to evaluate by.
    """
    steps = train_size // config.train.batch_size
    training = steps * (speed.step(math.ceil(config.train.batch_size / workers)) + speed.communication(workers))
    every, holdout = config.evaluation.knn_every, config.evaluation.holdout
    if holdout == 0:
        every *= config.train.epochs  # once, at the end
    encoded = train_size / (1 - holdout) if every and labelled else 0.0
    return training, encoded * speed.encode / workers / max(1, every)


def report(config: ResolvedConfig, train_size: int, labelled: bool) -> str:
    """What a run would cost on 1, 2, 4 and 8 workers and on those that were asked for, in lines to print.

    Args:
        config: resolved.
        train_size: number of training images.
        labelled: whether they are.
    """
    batch, asked = config.train.batch_size, config.scaling.num_workers
    share = math.ceil(batch / max(1, asked if isinstance(asked, int) else 1))
    speed = time_steps(config, batch // share)
    place = "GPU" if speed.device == "cuda" else f"CPU worker with {speed.threads} thread{'s' * (speed.threads > 1)}"
    counts = {*WORKERS, *([asked] if isinstance(asked, int) and asked else [])}
    lines = [
        f"# measured here, one {place}, {speed.precision}: {share / speed.step(share):.0f} images/s in training, "
        f"{speed.flops * share / speed.step(share) / 1e9:.3g} GFLOP/s,",
        f"# which is {speed.utilization(share):.0%} of its rate in matrix products ({speed.matmul / 1e9:.3g} GFLOP/s)",
        "# workers  training  evaluation  whole run  device-hours",
    ]
    for workers in sorted(workers for workers in counts if not cfg.unshared(config, workers)):
        training, evaluation = epoch_seconds(config, speed, train_size, workers, labelled)
        whole = (training + evaluation) * config.train.epochs
        shown = f"{training:.3g} s", f"{evaluation:.3g} s", duration(whole), f"{workers * whole / 3600:.3g}"
        row = "# {:>7}  {:>8}  {:>10}  {:>9}  {:>12}".format(workers, *shown)
        if speed.too_many and math.ceil(batch / workers) >= speed.too_many:
            row = f"# {workers:>7}  out of memory: steps of {speed.too_many} images did not fit here"
        lines.append(row + (" (asked for)" if workers == asked else ""))
    added = f"{speed.gradient / 1e6:.3g} MB of gradients are added up at {BANDWIDTH[speed.device] / 1e9:g} GB/s"
    cores = f" on cores of its own ({os.cpu_count()} here)" if speed.device == "cpu" else ""
    lines += [
        f"# training and evaluation: of an epoch. Assumed: every worker is{cores} as fast as this one alone, and so",
        f"# it stays beside others; images are at hand; {added} and not",
        f"# hidden; each of {speed.exchanges} exchanges of BatchNorm's statistics takes {1000 * WAIT[speed.device]:g} ms. Not in "
        "it: start-up, and the methods' own exchanges.",
    ]
    lines += ["# Measured without torch.compile."] if config.train.compile else []
    return "\n".join(lines)


def estimate_runs(
    configs: Sequence[ResolvedConfig], train_sizes: Sequence[int], workers: int, use_gpu: bool
) -> list[float]:
    """Seconds that each run would take on its own.

    The cheapest and the dearest kind of step (by FLOPs) are timed, the others lie on the line between the two.

    Args:
        configs: resolved.
        train_sizes: number of training images of each.
        workers: of each run.
        use_gpu: whether they train on GPUs.

    Raises:
        ConfigError: a step does not fit into a worker's memory, or the engine refuses it.
    """
    kinds = [_kind(config) for config in configs]
    flops = {
        kind: count_step(config, MIDDLE) / config.train.batch_size
        for kind, config in dict(zip(kinds, configs, strict=True)).items()
    }
    ends = sorted(flops, key=lambda kind: flops[kind])
    timed = {}
    for kind in {ends[0], ends[-1]}:
        config, size = next((c, n) for c, n, k in zip(configs, train_sizes, kinds, strict=True) if k == kind)
        speed = time_steps(cfg.replace(config, {"scaling.use_gpu": use_gpu}), workers)
        if speed.too_many is not None:
            raise ConfigError(
                f"train.batch_size: got {config.train.batch_size}, but a step of {speed.too_many} images does not fit into the "
                f"memory of a worker's {speed.device}; take a smaller one, train.accumulate, or more workers"
            )
        timed[kind] = sum(epoch_seconds(config, speed, size, workers)) / size
    (low, cheap), (high, dear) = ((flops[kind], timed[kind]) for kind in (ends[0], ends[-1]))
    result = []
    for config, kind, size in zip(configs, kinds, train_sizes, strict=True):
        share = 0.0 if math.isclose(low, high) else (flops[kind] - low) / (high - low)
        result.append((cheap + share * (dear - cheap)) * size * config.train.epochs)
    return result


def _kind(config: ResolvedConfig) -> str:
    """What decides the time of a step: everything but seed, length, rates, and the size of a weight."""
    same = {key: value for key, value in cfg.identity_of(config).items() if not key.startswith("optim.")}
    same |= {key: value > 0 for key, value in same.items() if key in ("rotation.weight", "jigsaw.weight")}
    return repr(sorted((k, v) for k, v in same.items() if k not in ("train.seed", "train.epochs")))


def duration(seconds: float) -> str:
    """``42 s``, ``3.5 min`` or ``12 h``."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
