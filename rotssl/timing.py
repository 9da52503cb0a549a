"""What a step and an evaluation take, measured on a few images of the real data."""

import math
import statistics
import tempfile
import time
from collections.abc import Sequence

import torch

from rotssl import config as cfg
from rotssl import journal
from rotssl.config import Config
from rotssl.data import datasets
from rotssl.engine import Trainer
from rotssl.flops import count_step
from rotssl.runtime import LocalRuntime, RunFailed

STEPS = 4


def seconds_per_epoch(config: Config, train_size: int, workers: int, use_gpu: bool) -> tuple[float, float]:
    """Seconds of training and of evaluation in an epoch, from a few steps of one worker's share of the batch.

    Communication between workers is not in it.

    Args:
        config: resolved.
        train_size: number of training images.
        workers: among which the batch is divided.
        use_gpu: whether to measure on the GPU.
    """
    each = config.train.batch_size // max(1, workers)
    few = each * (STEPS + 1)
    device = torch.device("cuda" if use_gpu else "cpu")
    with tempfile.TemporaryDirectory(prefix="rotssl-timing-") as folder:
        small = {
            "train.batch_size": each,
            "data.limit": few,
            "data.store": "memory",
            "scaling.num_workers": 0,
            "storage.path": folder,
        }
        small |= {"method.queue_size": each} if getattr(config.method, "queue_size", 0) else {}
        probe = cfg.replace(config, small)
        splits = datasets.load(probe.data, probe.evaluation.holdout)
        runtime = LocalRuntime(probe.run_dir, device)
        trainer = Trainer(probe, splits, runtime, journal.Journal(probe.run_dir))
        taken: list[float] = []
        batches = trainer.batches(0)
        for _ in range(min(STEPS + 1, trainer.steps_per_epoch)):
            started = time.perf_counter()  # with the cutting out of the batch
            trainer.step(*next(batches))
            if use_gpu:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
        steps = train_size // config.train.batch_size
        training = statistics.median(taken[1:] or taken) * steps
        started = time.perf_counter()
        if splits.validation is None or config.evaluation.knn_every == 0:
            return training, 0.0
        try:
            trainer.evaluate(-2)  # as of an epoch that is not the last: without the probe
        except RunFailed:  # a rate that breaks the first steps: the trial will say so
            return training, 0.0
        taken_for = len(splits.train.images) + len(splits.validation.images)
        evaluation = (time.perf_counter() - started) * (train_size + len(splits.validation.images)) / taken_for
    return training, evaluation / config.evaluation.knn_every


def estimate(configs: Sequence[Config], train_sizes: Sequence[int], workers: int, use_gpu: bool) -> list[float]:
    """Seconds that each run would take on its own.

    The cheapest and the dearest kind of step (by FLOPs) are timed, the others lie on the line between the two.

    Args:
        configs: resolved.
        train_sizes: number of training images of each.
        workers: of each run.
        use_gpu: whether they train on GPUs.
    """
    kinds = [_kind(config) for config in configs]
    flops = {
        kind: count_step(config) / config.train.batch_size
        for kind, config in dict(zip(kinds, configs, strict=True)).items()
    }
    ends = sorted(flops, key=lambda kind: flops[kind])
    timed = {}
    for kind in {ends[0], ends[-1]}:
        i = kinds.index(kind)
        training, evaluation = seconds_per_epoch(configs[i], train_sizes[i], workers, use_gpu)
        timed[kind] = training / train_sizes[i], evaluation / train_sizes[i]
    (low, cheap), (high, dear) = ((flops[kind], timed[kind]) for kind in (ends[0], ends[-1]))
    result = []
    for config, kind, size in zip(configs, kinds, train_sizes, strict=True):
        share = 0.0 if math.isclose(low, high) else (flops[kind] - low) / (high - low)
        each = sum(a + share * (b - a) for a, b in zip(cheap, dear, strict=True))
        result.append(each * size * config.train.epochs)
    return result


def _kind(config: Config) -> str:
    """What decides the time of a step: everything but seed, length, rates, and the size of a weight."""
    same = {key: value for key, value in cfg.identity(config).items() if not key.startswith("optim.")}
    same |= {key: value > 0 for key, value in same.items() if key in ("rotation.weight", "jigsaw.weight")}
    return repr(sorted((k, v) for k, v in same.items() if k not in ("train.seed", "train.epochs")))
