"""What the benchmarks share: one run in this process, and what is said of machine and code beside the numbers."""

import os
import platform
import statistics
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rotssl import config as cfg
from rotssl import journal
from rotssl.data import datasets
from rotssl.journal import Points

RESULTS = Path(__file__).parent / "results"


def trainer(overrides: Mapping[str, Any]) -> Any:
    """An engine for a configuration, in this process, on one CPU thread."""
    import torch

    from rotssl.engine import Trainer
    from rotssl.runtime import LocalRuntime

    torch.set_num_threads(1)
    config = cfg.build(overrides)
    info = datasets.inspect(config.data, config.evaluation.holdout)
    config = cfg.resolve(config, info.image_size, info.train_size)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    splits = datasets.load(config.data, config.evaluation.holdout)
    runtime = LocalRuntime(config.run_dir, torch.device("cpu"))
    return Trainer(config, splits, runtime, journal.Journal(config.run_dir))


def train(overrides: Mapping[str, Any]) -> Points:
    """The points of a run; one that was finished in an earlier start is not run again, one that failed ends where it failed."""
    from rotssl.runtime import RunFailed

    run = trainer(overrides)
    name = run.config.tracking.run_name
    try:
        run.run()
    except RunFailed as error:
        print(f"{name}: failed: {error}", flush=True)
        return journal.read(run.config.run_dir)
    points = journal.read(run.config.run_dir)
    last = points[max(points)]
    print(f"{name}: kNN {last['knn/top1']:.1%}, {last['cost/train_seconds']:.0f} s", flush=True)
    return points


def spread(values: list[float]) -> str:
    """Mean and range in percent."""
    return f"{100 * statistics.mean(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def commit() -> str:
    """The commit of this checkout."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip() or "unknown"


def machine(device: str = "cpu") -> str:
    """Processor, cores, GPU if it is used, torch."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    gpu = "no GPU" if device == "cpu" else torch.cuda.get_device_name()
    return f"{model}, {os.cpu_count()} cores, {gpu}, Python {platform.python_version()}, torch {torch.__version__}"
