"""Estimates of how long runs take on any number of workers, from a few timed steps on one and FLOPs counted by torch."""

import math
import os
from collections.abc import Sequence

from rotssl import config as cfg
from rotssl.config import ResolvedConfig
from rotssl.config.fields import ConfigError
from rotssl.config.tasks import WEIGHTS
from rotssl.engine.flops import count_mean
from rotssl.engine.recorder import SHARE
from rotssl.engine.timing import BANDWIDTH, WAIT, Speed, time_steps

WORKERS = (1, 2, 4, 8)


def epoch_seconds(
    config: ResolvedConfig, speed: Speed, train_size: int, workers: int, labelled: bool = True
) -> tuple[float, float]:
    """Seconds of training and of evaluation in an epoch.

    Evaluation counts only the decoding and encoding of the images, with validation as the share ``evaluation.holdout``; the
    classification is negligible. If nothing is held out, there is one evaluation at the end, without the test images.

    Args:
        config: resolved.
        speed: speed of one worker.
        train_size: number of training images.
        workers: number of workers that share batches and images to encode.
        labelled: whether there are labels to evaluate with.
    """
    steps = train_size // config.train.batch_size
    share = config.train.share(workers)
    training = steps * speed.with_decoding(speed.step(share) + speed.communication(workers), share)
    every, holdout = config.evaluation.knn_every, config.evaluation.holdout
    if holdout == 0 and every:
        every = config.train.epochs  # once, at the end
    bank = min(config.evaluation.bank or train_size, train_size)
    encoded = bank + train_size * holdout / (1 - holdout) if every and labelled else 0.0
    once = speed.with_decoding(encoded * speed.encode, encoded) / workers
    if every == "auto":  # after the first epoch and the last in any case
        return training, min(once, max(SHARE * training, once * 2 / config.train.epochs))
    return training, once / max(1, every)


def report(config: ResolvedConfig, train_size: int, labelled: bool) -> str:
    """The estimated cost of a run on 1, 2, 4 and 8 workers and on the requested number, in lines to print.

    Args:
        config: resolved.
        train_size: number of training images.
        labelled: whether they have labels.
    """
    batch, asked = config.train.batch_size, config.scaling.num_workers
    share = config.train.share(asked if isinstance(asked, int) else 1)
    speed = time_steps(config, batch // share)
    place = "GPU" if speed.device == "cuda" else f"CPU worker with {speed.threads} thread{'s' * (speed.threads > 1)}"
    counts = {*WORKERS, *([asked] if isinstance(asked, int) and asked else [])}
    lines = [
        f"# measured here, one {place}, {speed.precision}: {share / speed.step(share):.0f} images/s in training, "
        f"{speed.flops * share / speed.step(share) / 1e9:.3g} GFLOP/s,",
        f"# {speed.utilization(share):.0%} of its matrix multiplication rate ({speed.matmul / 1e9:.3g} GFLOP/s)",
        "# workers  training  evaluation  whole run  device-hours",
    ]
    for workers in sorted(workers for workers in counts if not cfg.unshared(config, workers)):
        training, evaluation = epoch_seconds(config, speed, train_size, workers, labelled)
        whole = (training + evaluation) * config.train.epochs
        shown = f"{training:.3g} s", f"{evaluation:.3g} s", duration(whole), f"{workers * whole / 3600:.3g}"
        row = "# {:>7}  {:>8}  {:>10}  {:>9}  {:>12}".format(workers, *shown)
        if speed.too_many and config.train.share(workers) >= speed.too_many:
            row = f"# {workers:>7}  out of memory: steps of {speed.too_many} images did not fit here"
        lines.append(row + (" (requested)" if workers == asked else ""))
    added = f"{speed.gradient / 1e6:.3g} MB of gradients are reduced at {BANDWIDTH[speed.device] / 1e9:g} GB/s"
    cores = f" has its own cores ({os.cpu_count()} here) and" if speed.device == "cpu" else ""
    lines += [
        f"# Training and evaluation are per epoch. Assumptions: every worker{cores} is as fast as this one alone,",
        f"# with no slowdown from neighbours and no waiting for disks; {added},",
        f"# without overlap; each of {speed.exchanges} BatchNorm exchanges takes {1000 * WAIT[speed.device]:g} ms.",
        "# Not included: start-up, and the exchanges of methods and of norm split.",
    ]
    if speed.decode:
        lines.append(f"# Decoding and cropping is included, at {1 / speed.decode:.0f} pictures/s for each worker.")
    lines += ["# Measured without torch.compile."] if config.train.compile else []
    return "\n".join(lines)


def estimate_runs(
    configs: Sequence[ResolvedConfig], train_sizes: Sequence[int], workers: int, use_gpu: bool
) -> list[float]:
    """Seconds that each run would take alone.

    The cheapest and the most expensive kind of step (by FLOPs) are timed, the others are interpolated linearly.

    Args:
        configs: resolved.
        train_sizes: number of training images of each.
        workers: number of workers of each run.
        use_gpu: whether they train on GPUs.

    Raises:
        ConfigError: a step does not fit into a worker's memory, or the engine rejects it.
    """
    kinds = [_kind(config) for config in configs]
    flops = {
        kind: count_mean(config) / config.train.batch_size
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
                f"memory of a worker's {speed.device}; use a smaller batch, a larger train.accumulate or more workers"
            )
        timed[kind] = sum(epoch_seconds(config, speed, size, workers)) / size
    (low, cheap), (high, dear) = ((flops[kind], timed[kind]) for kind in (ends[0], ends[-1]))
    result = []
    for config, kind, size in zip(configs, kinds, train_sizes, strict=True):
        share = 0.0 if math.isclose(low, high) else (flops[kind] - low) / (high - low)
        result.append((cheap + share * (dear - cheap)) * size * config.train.epochs)
    return result


def _kind(config: ResolvedConfig) -> str:
    """A key of all fields that affect the time of a step: all except seed, length, rates and the size of a weight."""
    same = {key: value for key, value in cfg.identity_of(config).items() if not key.startswith("optim.")}
    same |= {key: value != 0 for key, value in same.items() if key in WEIGHTS}
    return repr(sorted((k, v) for k, v in same.items() if k not in ("train.seed", "train.epochs")))


def duration(seconds: float) -> str:
    """``42 s``, ``3.5 min`` or ``12 h``."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
