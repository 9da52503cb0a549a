"""Cells that run something whole: the tests, a run under Ray Train, equal minutes, and the paper's recipes to their end."""

import itertools
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

from gpu_cell import Cell, NotHere, TimeUp

ROOT = Path(__file__).parent.parent
WRAP_UP_S = 10  # that a cell keeps for its end


# --- tests ---------------------------------------------------------------------------------------------------------------------


def pytest(cell: Cell) -> None:
    """Run tests, and count as they go; args: paths, options.

    The settings are of this cell alone: the project's own ask for a plugin that a bare machine lacks.
    """
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    ini = cell.scratch / "pytest.ini"
    ini.write_text("[pytest]\nmarkers =\n" + "".join(f"    {marker}\n" for marker in settings["markers"]))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(ini),
        "--rootdir",
        str(ROOT),
        "-p",
        "no:cacheprovider",
        "-v",
        "-rfE",
    ]
    command += [*cell.args.get("options", ()), *(str(ROOT / path) for path in cell.args["paths"])]
    counts: Counter[str] = Counter()
    failures: list[dict[str, str]] = []
    cell.tell(ran=" ".join(cell.args["paths"]))
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, text=True, cwd=ROOT, **pipes)
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="")
        if found := re.match(r"(\S*::.*?) (PASSED|FAILED|ERROR|SKIPPED)", line):
            counts[found[2].lower()] += 1
            cell.tell(counts=dict(counts), last=found[1])
        elif found := re.match(r"(FAILED|ERROR) (\S*::.*?)(?: - (.*))?$", line):
            failures.append({"test": found[2], "reason": found[3] or ""})
    code = process.wait()
    cell.tell(failures=failures)
    if code not in (0, 1) or not counts:
        raise RuntimeError(f"pytest ended with {code}")
    if set(counts) == {"skipped"}:
        raise NotHere("all tests were skipped")


# --- Ray Train -----------------------------------------------------------------------------------------------------------------


def ray(cell: Cell) -> None:
    """Under Ray Train: a run to its end, and one that is killed and goes on; args: fields, epochs.

    Raises:
        RuntimeError: what came out is not as it should be.
    """
    from rotssl import checkpoint, journal

    folder = cell.scratch / "ray"
    shutil.rmtree(folder, ignore_errors=True)
    epochs = cell.args["epochs"]
    checks: dict[str, bool] = {}

    def check(name: str, holds: bool) -> None:
        checks[name] = bool(holds)
        cell.tell(checks=checks)

    def sound(run: Path) -> None:
        points = journal.read(run)
        check(f"{run.name}: every epoch once", list(points) == list(range(1, epochs + 1)) and not _repeated(run))
        finite = all(math.isfinite(value) for point in points.values() for value in point.values())
        check(f"{run.name}: finite", finite)
        state = next(checkpoint.latest(run), {"epoch": 0})
        check(f"{run.name}: checkpoint of the last epoch", state["epoch"] == epochs)
        check(f"{run.name}: encoder exported", (run / "encoder.safetensors").exists())

    whole, killed = folder / "rotssl" / "whole", folder / "rotssl" / "killed"
    started = time.perf_counter()
    process = _start(cell, folder, "whole")
    _wait_for(process, whole, 1, cell.left())
    cell.tell(**{"seconds to the end of the first epoch": time.perf_counter() - started})
    check("whole: ended with 0", process.wait(timeout=cell.left()) == 0)
    sound(whole)
    tags = json.loads((whole / "tags.json").read_text())
    rates = [point["throughput/images_per_second"] for point in journal.read(whole).values()]
    cell.tell(device=tags["device"], precision=tags["precision"], **{"images/s": statistics.median(rates)})
    check("whole: on the device", tags["device"] == cell.device.type)
    process = _start(cell, folder, "killed")
    _wait_for(process, killed, 2, cell.left())
    process.kill()
    process.wait()
    before = journal.read(killed)
    check("killed: in the middle", 2 <= len(before) < epochs)
    started = time.perf_counter()
    check("killed: ended with 0 the second time", _start(cell, folder, "killed").wait(timeout=cell.left()) == 0)
    cell.tell(**{"seconds of the second start": time.perf_counter() - started})
    sound(killed)
    after = journal.read(killed)
    check("killed: its epochs stand", all(before[epoch].items() <= after[epoch].items() for epoch in before))
    if not all(checks.values()):
        raise RuntimeError("; ".join(name for name, holds in checks.items() if not holds))


def _start(cell: Cell, folder: Path, name: str) -> "subprocess.Popen[bytes]":
    fields = {
        "scaling.num_workers": 1,
        "scaling.use_gpu": str(cell.cuda).lower(),
        "tracking.uri": "off",
        "tracking.run_name": name,
        "storage.path": folder,
        "train.epochs": cell.args["epochs"],
        **cell.args.get("fields", {}),
    }
    flags = [word for key, value in fields.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, str(ROOT / "jobs" / "pretrain.py"), *flags]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL)


def _wait_for(process: "subprocess.Popen[bytes]", run: Path, epochs: int, seconds: float) -> None:
    """Until a run has so many epochs, its command has ended, or there is no time left."""
    from rotssl import journal

    end = time.monotonic() + seconds
    while len(journal.read(run)) < epochs and process.poll() is None:
        if time.monotonic() > end:
            raise TimeUp(f"no {epochs} epochs by the deadline")
        time.sleep(0.05)


def _repeated(run: Path) -> list[tuple[int, str]]:
    """What stands twice in a journal."""
    from rotssl.journal import Journal

    lines = [json.loads(line) for line in (run / Journal.NAME).read_text().splitlines()]
    told = Counter((line["epoch"], key) for line in lines for key in line if key != "epoch")
    return [key for key, count in told.items() if count > 1]


# --- equal minutes -------------------------------------------------------------------------------------------------------------


def equal_minutes(cell: Cell) -> None:
    """Several arms, each with a schedule that fills so many minutes; args: minutes, seeds, arms, fields, images, warmup_share.

    The epochs of an arm are chosen by its own speed, evaluation included, so what is compared is what a user would get. Choosing
    them takes a few steps and one evaluation, which are not in the minutes.
    """
    args, splits = cell.args, cell.splits()
    rows: list[dict[str, Any]] = []
    epochs = {name: _epochs_in(cell, name, splits, 60 * args["minutes"]) for name in args["arms"]}
    cell.tell(epochs=epochs)
    for seed in range(args["seeds"]):
        names = list(args["arms"])
        for name in names[seed % len(names) :] + names[: seed % len(names)]:
            config = cell.config(len(splits.train), _arm(cell, name, epochs[name], seed))
            shutil.rmtree(config.run_dir, ignore_errors=True)
            started = time.perf_counter()
            points = _run(cell, config, splits, WRAP_UP_S)
            whole = time.perf_counter() - started
            last = points[max(points)]
            row = {"arm": name, "seed": seed, "epochs": len(points), "seconds": whole}
            row |= {"kNN": last["knn/top1"], "linear": last.get("linear/top1", math.nan)}
            rows.append(row | {"training, s": last["cost/train_seconds"]})
            cell.tell(runs=rows)


def _arm(cell: Cell, name: str, epochs: int, seed: int) -> dict[str, Any]:
    fields = {**cell.args["fields"], **cell.args["arms"][name], "train.epochs": epochs, "train.seed": seed}
    fields["optim.warmup_epochs"] = cell.args["warmup_share"] * epochs
    return fields | {"tracking.run_name": f"{name}-seed{seed}".replace(" ", "-").replace("'", "")}


def _epochs_in(cell: Cell, name: str, splits: Any, seconds: float) -> int:
    """How many whole epochs an arm trains and evaluates in so many seconds, at least one."""
    config = cell.config(len(splits.train), {**_arm(cell, name, 1000, 0), "tracking.run_name": "calibration"})
    trainer = cell.trainer(config, splits)
    trainer.parallel.train()
    batches = trainer.batches(0)
    for _ in range(2):
        trainer.step(*next(batches))
    cell.finish()
    started, steps = time.perf_counter(), min(10, trainer.steps_per_epoch - 2)
    for _ in range(steps):
        trainer.step(*next(batches))
    cell.finish()
    training = (time.perf_counter() - started) / steps * trainer.steps_per_epoch
    started = time.perf_counter()
    trainer.evaluate(0)
    cell.finish()
    return max(1, int(seconds / (training + time.perf_counter() - started)))


# --- the paper's recipes -------------------------------------------------------------------------------------------------------


def train(cell: Cell) -> None:
    """A recipe to its end, in as many calls as it takes; args: recipe, fields, paper (its figures), images.

    The images are CIFAR-10's as JPEGs. All of them train where the recipe holds nothing out; test is measured once, at the end.
    """
    from rotssl import cli

    args = cell.args
    recipe = {key: value for key, value in cli.load_recipe(ROOT / args["recipe"]).items() if key != "data.name"}
    fields = {**recipe, **args.get("fields", {}), "tracking.run_name": "run"}
    splits = cell.splits(fields.get("evaluation.holdout", 0.1))
    config = cell.config(len(splits.train), fields)
    kept = cell.scratch / "runs" / cell.name / "spent.json"
    spent = json.loads(kept.read_text()) if kept.exists() else {"seconds": 0.0, "starts": 0}
    started = time.perf_counter()

    def keep(points: dict[int, dict[str, float]]) -> None:
        seconds = spent["seconds"] + time.perf_counter() - started
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"seconds": seconds, "starts": spent["starts"] + 1}))
        last = points[max(points)]
        accuracies = {key: value for key, value in last.items() if key.endswith("top1")}
        rates = [point["throughput/images_per_second"] for point in points.values()]
        losses = [{"epoch": epoch} | _losses(points[epoch]) for epoch in sorted(points) if epoch in _shown(points)]
        times = {"training, s": last["cost/train_seconds"], "all, s": seconds, "images/s": statistics.median(rates)}
        known = {"measured": accuracies, "paper": args.get("paper", {}), "starts": spent["starts"] + 1}
        cell.tell(epochs=max(points), of=config.train.epochs, **known, **times, curve=losses)

    points = _run(cell, config, splits, WRAP_UP_S, keep)
    keep(points)
    if max(points) < config.train.epochs:
        raise TimeUp(f"after epoch {max(points)} of {config.train.epochs}; another call goes on")


def _losses(point: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in point.items() if key.startswith("loss/") or key.endswith(("accuracy", "top1"))}


def _shown(points: dict[int, dict[str, float]]) -> set[int]:
    """Some twenty epochs, the last one among them."""
    every = max(1, len(points) // 20)
    return {epoch for epoch in points if epoch % every == 0} | {max(points)}


def _run(cell: Cell, config: Any, splits: Any, reserve: float, keep: Any = None) -> dict[int, dict[str, float]]:
    """Train to the end, or until the next epoch might not end in time; returns the points.

    Args:
        cell: for the deadline.
        config: resolved.
        splits: the images.
        reserve: seconds to be left at the end.
        keep: takes the points from time to time.

    Raises:
        TimeUp: not even one epoch fitted.
    """
    from rotssl import journal

    ends: list[float] = [time.monotonic()]

    def show(event: dict[str, Any]) -> None:
        if "note" in event:
            print(event["note"], flush=True)
        if "metrics" not in event:
            return
        ends.append(time.monotonic())
        longest = max(after - before for before, after in itertools.pairwise(ends))
        if keep is not None and (len(ends) < 3 or event["epoch"] % 5 == 4):
            keep(journal.read(config.run_dir))
        if event["epoch"] + 1 < config.train.epochs and cell.left() < 1.5 * longest + reserve:
            raise TimeUp(f"after epoch {event['epoch'] + 1} of {config.train.epochs}")

    try:
        cell.trainer(config, splits, show).run()
    except TimeUp:
        if keep is None:
            raise
    points = journal.read(config.run_dir)
    if not points:
        raise TimeUp("not even one epoch fitted")
    return points
