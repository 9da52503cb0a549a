"""What the benchmarks share: one run in this process, and what is said of machine and code beside the numbers."""

import os
import platform
import shlex
import statistics
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rotssl import config as cfg
from rotssl.data import datasets
from rotssl.runs import journal
from rotssl.runs.journal import Points

RESULTS = Path(__file__).parent / "results"


def trainer(overrides: Mapping[str, Any], splits: datasets.Splits | None = None) -> Any:
    """An engine for a configuration, in this process, on one CPU thread; with these images, or those of the configuration."""
    import torch

    from rotssl.engine.runtime import LocalRuntime
    from rotssl.engine.trainer import Trainer

    torch.set_num_threads(1)
    config = cfg.build(overrides)
    info = datasets.inspect(config.data, config.evaluation.holdout)
    config = cfg.resolve(config, info.image_size, info.train_size)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    splits = splits or datasets.load(config.data, config.evaluation.holdout)
    runtime = LocalRuntime(config.run_dir, torch.device("cpu"))
    return Trainer(config, splits, runtime, journal.Journal(config.run_dir))


def train(overrides: Mapping[str, Any]) -> Points:
    """The points of a run; one that was finished in an earlier start is not run again, one that failed ends where it failed."""
    from rotssl.engine.runtime import RunFailed

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


def cifar10_folder(work: Path, images: int | None = None) -> Path:
    """CIFAR-10 as a folder of JPEGs, unpacked from $ROTSSL_DATA/cifar10-jpeg.tar.gz if it is not there yet.

    Args:
        work: where to; the folder is made in it.
        images: take the first so many pictures of train/ only, as many of each class; None: train/ (50,000) and val/ (10,000).
    """
    root, part = work / "cifar10", work / "cifar10.part"
    archive = Path(os.environ.get("ROTSSL_DATA", "")) / "cifar10-jpeg.tar.gz"
    if not archive.is_file():
        raise SystemExit("ROTSSL_DATA: expected a folder with cifar10-jpeg.tar.gz")
    if root.exists():
        return root
    taken: Counter[str] = Counter()

    def wanted(member: tarfile.TarInfo, target: str) -> tarfile.TarInfo | None:
        parent = str(Path(member.name).parent)
        taken[parent] += member.isfile()
        few = images is not None and not (member.name.startswith("train") and taken[parent] <= images // 10)
        return None if few else tarfile.data_filter(member, target)

    with tarfile.open(archive) as files:
        files.extractall(part, filter=wanted)  # noqa: S202 - wanted is tarfile.data_filter
    if images is None:
        (part / "test").rename(part / "val")
    return part.rename(root)


def command(folders: Sequence[str] = ("--work", "--output", "--peers", "--root")) -> str:
    """How this script was called, without the options that name folders."""
    words, kept = [f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]], []
    while words:
        word = words.pop(0)
        if word in folders:
            words.pop(0)
        elif not word.startswith(tuple(f"{folder}=" for folder in folders)):
            kept.append(word)
    return shlex.join(["python", *kept])


def spread(values: list[float]) -> str:
    """Mean and range in percent."""
    return f"{100 * statistics.mean(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def shown(values: Sequence[float], form: str = ".2f") -> str:
    """Median and range, as in the tables: ``1.01 (0.99 to 1.02)``."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def import_path() -> str:
    """PYTHONPATH for another process: this checkout before what is in it here."""
    return os.pathsep.join(filter(None, [str(RESULTS.parent.parent), os.environ.get("PYTHONPATH")]))


def commit(folder: Path = RESULTS.parent) -> str:
    """The commit of a checkout, by default this one."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=folder).stdout.strip() or "unknown"
    except OSError:  # a machine without git
        return "unknown"


def machine(device: str = "cpu") -> str:
    """Processor with what its vectors can do, cores, GPU if it is used, torch."""
    import torch

    from rotssl.engine.hardware import emulates_bf16

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    gpu = "no GPU" if device == "cpu" else torch.cuda.get_device_name()
    vectors = f"{torch.backends.cpu.get_cpu_capability()}, {'no ' if emulates_bf16() else ''}bf16"
    return f"{model} ({vectors}), {os.cpu_count()} cores, {gpu}, Python {platform.python_version()}, torch {torch.__version__}"
