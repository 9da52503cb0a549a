"""Cells that train: arms for equal minutes, and the paper's recipes to their end, in as many calls as it takes."""

import itertools
import json
import math
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from gpu_cell import Cell, TimeUp

from rotssl.engine.events import EpochDone, Event, Note
from rotssl.runs import checkpoint, journal

ROOT = Path(__file__).parent.parent
WRAP_UP_S = 10  # that a cell keeps for its end


# --- equal minutes -------------------------------------------------------------------------------------------------------------


def equal_minutes(cell: Cell) -> None:
    """Several arms, each with a schedule that fills so many minutes; args: minutes, seeds, arms, fields, images, warmup_share.

    The epochs of an arm are chosen by its own speed, with one evaluation at the end: what is compared is what a user would get.
    Choosing takes a few steps and two evaluations, which are not in the minutes.
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
            row |= {"training, s": last["cost/train_seconds"]}
            rows.append(row | {"kNN": last.get("knn/top1", math.nan), "linear": last.get("linear/top1", math.nan)})
            cell.tell(runs=rows)


def _arm(cell: Cell, name: str, epochs: int, seed: int) -> dict[str, Any]:
    fields = {**cell.args["fields"], **cell.args["arms"][name], "train.epochs": epochs, "train.seed": seed}
    fields["optim.warmup_epochs"] = cell.args["warmup_share"] * epochs
    return fields | {"tracking.run_name": f"{name}-seed{seed}".replace(" ", "-").replace("'", "")}


def _epochs_in(cell: Cell, name: str, splits: Any, seconds: float) -> int:
    """How many whole epochs an arm trains in so many seconds and is evaluated in the end, at least one."""
    config = cell.config(len(splits.train), {**_arm(cell, name, 1000, 0), "tracking.run_name": "calibration"})
    trainer = cell.trainer(config, splits)
    trainer.parallel.train()
    batches, first = trainer.batches(0), min(5, trainer.steps_per_epoch // 2)
    for _ in range(first):
        trainer.step(*next(batches))
    cell.finish()
    started, steps = time.perf_counter(), min(20, trainer.steps_per_epoch - first)
    for _ in range(steps):
        trainer.step(*next(batches))
    cell.finish()
    training = (time.perf_counter() - started) / steps * trainer.steps_per_epoch
    started = time.perf_counter()
    checkpoint.snapshot(trainer.state(1))  # which the training waits for; the rest of a checkpoint is written beside it
    training += time.perf_counter() - started
    for _ in range(2):  # the first one also chooses kernels
        started = time.perf_counter()
        trainer.evaluate(config.train.epochs - 1)
        cell.finish()
        evaluation = time.perf_counter() - started
    return max(1, round((seconds - evaluation) / training))


# --- the paper's recipes -------------------------------------------------------------------------------------------------------


def train(cell: Cell) -> None:
    """A recipe to its end, in as many calls as it takes; args: recipe, fields, paper (its figures), images.

    All images train where the recipe holds nothing out; test is measured once, at the end. A run goes on from its newest
    checkpoint, which has some 160 MB for a ResNet-18 with a teacher and heads.

    Raises:
        TimeUp: another call goes on.
        ConfigError: the run was started with another configuration.
        RuntimeError: its end was not measured.
    """
    from rotssl.config import recipes
    from rotssl.runs.state import RunState

    args = cell.args
    recipe = {key: value for key, value in recipes.load_recipe(ROOT / args["recipe"]).items() if key != "data.name"}
    fields = {**recipe, **args.get("fields", {}), "tracking.run_name": "run"}
    splits = cell.splits(fields.get("evaluation.holdout", 0.1))
    config = cell.config(len(splits.train), fields)
    record = RunState.of(config)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    record.write("running")
    kept = config.run_dir.parent / "spent.json"
    before = json.loads(kept.read_text()) if kept.exists() else {"seconds": 0.0, "evaluation": 0.0, "starts": 0}
    started, evaluations = time.perf_counter(), list[float]()

    def keep(points: dict[int, dict[str, float]]) -> None:
        spent = {
            "seconds": before["seconds"] + time.perf_counter() - started,
            "evaluation": before["evaluation"] + sum(evaluations),
            "starts": before["starts"] + 1,
        }
        kept.write_text(json.dumps(spent))
        last = points[max(points)]
        rates = [point["throughput/images_per_second"] for point in points.values()]
        times = {"training, s": last["cost/train_seconds"], "evaluation, s": spent["evaluation"]}
        times |= {"all, s": spent["seconds"], "images/s": statistics.median(rates), "starts": spent["starts"]}
        cell.tell(
            epochs=max(points),
            of=config.train.epochs,
            images="CIFAR-10 from JPEG files, normalised by its own mean and deviation",
            measured={key: value for key, value in last.items() if key.endswith("top1")},
            paper=args.get("paper", {}),
            **times,
            curve=[{"epoch": epoch} | _losses(points[epoch]) for epoch in sorted(_shown(points))],
        )

    points = _run(cell, config, splits, WRAP_UP_S, keep, evaluations)
    keep(points)
    if max(points) < config.train.epochs:
        raise TimeUp(f"after epoch {max(points)} of {config.train.epochs}; another call goes on")
    measured = cell.result["measured"]
    missing = [name for name in ("knn", "linear") if not any(key.endswith(f"{name}/top1") for key in measured)]
    if missing:
        raise RuntimeError(f"trained to the end, but without {' and '.join(missing)}; the log says why")


def _losses(point: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in point.items() if key.startswith("loss/") or key.endswith(("accuracy", "top1"))}


def _shown(points: dict[int, dict[str, float]]) -> set[int]:
    """Some twenty epochs, the last one among them."""
    every = max(1, len(points) // 20)
    return {epoch for epoch in points if epoch % every == 0} | {max(points)}


def _run(
    cell: Cell, config: Any, splits: Any, reserve: float, keep: Any = None, evaluations: Any = None
) -> dict[int, dict[str, float]]:
    """Train to the end, or until the next epoch might not end in time; returns the points.

    Args:
        cell: for the deadline.
        config: resolved.
        splits: the images.
        reserve: seconds to be left at the end.
        keep: takes the points from time to time.
        evaluations: takes the seconds of each.

    Raises:
        TimeUp: not even one epoch fitted, or, without ``keep``, not all.
    """
    ends: list[float] = [time.monotonic()]

    def show(event: Event) -> None:
        if isinstance(event, Note):
            print(event.text, flush=True)
        if not isinstance(event, EpochDone):
            return
        ends.append(time.monotonic())
        longest = max(after - before for before, after in itertools.pairwise(ends))
        if keep is not None and (len(ends) < 3 or event.epoch % 5 == 0):
            keep(journal.read(config.run_dir))
        if event.epoch < config.train.epochs and cell.left() < 1.5 * longest + reserve:
            raise TimeUp(f"after epoch {event.epoch} of {config.train.epochs}")

    trainer = cell.trainer(config, splits, show)
    evaluate = trainer.evaluate

    def timed(epoch: int, skipped: int = 0) -> dict[str, float]:
        began = time.perf_counter()
        found: dict[str, float] = evaluate(epoch, skipped)
        cell.finish()
        evaluations.append(time.perf_counter() - began)
        return found

    if evaluations is not None:
        trainer.evaluate = timed
    try:
        trainer.run()
    except TimeUp:
        if keep is None:
            raise
    points = journal.read(config.run_dir)
    if not points:
        raise TimeUp("not even one epoch fitted")
    return points
