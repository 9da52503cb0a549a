"""How fast the device trains: bare loops, rotssl and lightly in turn, and where a step's time goes."""

import argparse
import functools
import math
import os
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import contenders
import torch
from gpu_cell import Cell
from gpu_contenders import FORMS, Bare, Rotssl, Run
from gpu_trace import draw, summary


class Rate(NamedTuple):
    """FLOP/s of the device in matrix products, and each contender's FLOPs an image."""

    device: float = 1.0
    flops: Mapping[str, float] = {}


def seconds(cell: Cell, run: Run, steps: int) -> float:
    """Of so many steps, which the device has ended."""
    cell.finish()
    started = time.perf_counter()
    run(steps)
    cell.finish()
    return time.perf_counter() - started


def in_turn(cell: Cell, name: str, made: dict[str, Run], batch: int, steps: int, rounds: int, rate: Rate) -> None:
    """Time contenders in turn, the first one another in each round, and tell after each what is known by then.

    Args:
        cell: that tells.
        name: of what is told.
        made: contenders; one that fails is taken out.
        batch: images a step.
        steps: of each in a round.
        rounds: over all.
        rate: the device's, and each contender's FLOPs an image.
    """
    found: dict[str, list[float]] = {each: [] for each in made}
    failed: list[dict[str, Any]] = []
    for turn in range(rounds):
        names = list(made)
        for each in names[turn % len(names) :] + names[: turn % len(names)]:
            try:
                found[each].append(batch * steps / seconds(cell, made[each], steps))
            except Exception as error:  # the others can still be timed
                failed.append({"contender": each, "failed": in_a_line(error)})
                del made[each], found[each]
        cell.tell(**{name: rows_of(found, rate) + failed})


def in_a_line(error: Exception) -> str:
    """What went wrong; whoever looks for its place finds it in the log."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def rows_of(found: dict[str, list[float]], rate: Rate) -> list[dict[str, Any]]:
    """Medians, ranges and the share of the device's rate."""
    rows = []
    for name, values in found.items():
        middle = statistics.median(values)
        row = {"contender": name, "images/s": middle, "from": min(values), "to": max(values)}
        flops = rate.flops.get(name)
        rows.append(row | ({} if flops is None else {"share of matmul rate": middle * flops / rate.device}))
    return rows


def ceilings(cell: Cell) -> dict[str, float]:
    """The device's rate in matrix products and in copies."""
    from rotssl.engine.timing import matmul_rate

    rate = matmul_rate(cell.device, torch.bfloat16 if cell.cuda else torch.float32)
    source = torch.randn((1 << 28) if cell.cuda else (1 << 22), device=cell.device)
    target = torch.empty_like(source)
    target.copy_(source)
    taken = statistics.median(
        seconds(cell, lambda n: [target.copy_(source) for _ in range(n)] and None, 10) for _ in range(3)
    )
    return {"matmul FLOP/s": rate, "copy bytes/s": 10 * 2 * source.nbytes / taken}


def speed(cell: Cell) -> None:
    """Images a second at a batch size; args: batch, encoder, steps, rounds, images (in miniature)."""
    args = cell.args
    batch, encoder, steps = args["batch"], args["encoder"], args["steps"]
    cell.tell(**ceilings(cell))
    rate = cell.result["matmul FLOP/s"]
    splits = cell.splits()
    made: dict[str, Run] = {}
    flops: dict[str, float] = {}
    starts: list[dict[str, Any]] = []
    plain = Rotssl(cell, encoder, batch, {}, splits).ready()
    builders: dict[str, Callable[[], Any]] = {
        "bare loop": lambda: Bare(cell, encoder, batch, False),
        "bare loop, compiled and captured": lambda: Bare(cell, encoder, batch, True),
        **{name: functools.partial(Rotssl, cell, encoder, batch, form, splits, name) for name, form in FORMS.items()},
    }
    timing: tuple[int, int, int] = batch, steps, args["rounds"]

    def start(name: str) -> None:
        started = time.perf_counter()
        try:
            work = builders[name]()
            seconds(cell, work.run, 3)
        except Exception as error:  # one that can't run here costs the others nothing
            starts.append({"contender": name, "not run": in_a_line(error)})
        else:
            made[name], flops[name] = work.run, (work if isinstance(work, Rotssl) else plain).flops()
            starts.append({"contender": name, "seconds to its third step": time.perf_counter() - started})
        cell.tell(start=starts)

    # Compiling may take longer than all else together: what needs none of it is timed and told before.
    compiled = [name for name in builders if "compiled" in name]
    for name in [name for name in builders if name not in compiled]:
        start(name)
    in_turn(cell, "contenders", made, *timing, Rate(rate, flops))
    in_turn(cell, "augmentation", {"two views": plain.augment}, *timing, Rate())
    cell.tell(evaluation=[evaluation(cell, plain.trainer) for _ in range(2)])
    for name in compiled:
        start(name)
        chosen = {other: made[other] for other in ("bare loop", name) if other in made}
        in_turn(cell, f"{name}, beside the bare loop", chosen, *timing, Rate(rate, flops))
    if cell.cuda:
        cell.tell(**{"peak bytes": torch.cuda.max_memory_allocated()})


def evaluation(cell: Cell, trainer: Any) -> dict[str, Any]:
    """Seconds of an evaluation of the encoder, and of its parts."""
    from rotssl.base.precision import HALF
    from rotssl.evaluation.measure import Features, encode_share, measures

    encoder, parts = trainer.model.encoder, (trainer.splits.train, trainer.splits.validation)
    rows: list[Any] = []

    def encode(_: int) -> None:
        kind = HALF.get(trainer.evaluator.precision)
        rows.extend(encode_share(encoder, part, trainer.augment, cell.device, trainer.layout, kind) for part in parts)

    row: dict[str, Any] = {"images": sum(map(len, parts)), "encode, s": seconds(cell, encode, 1)}
    labels = [torch.from_numpy(part.labels).to(cell.device) for part in parts]
    features = [Features(*each) for each in zip(rows, labels, strict=False)]
    for name, measure in measures(*features, True).items():
        row[f"{name}, s"] = seconds(cell, lambda _, measure=measure: measure.compute() and None, 1)  # type: ignore[misc]
    trainer.parallel.train()
    return row


def profile(cell: Cell) -> None:
    """Where the time of rotssl's steps goes; args: batch, encoder, steps, form, images."""
    args = cell.args
    work = Rotssl(cell, args["encoder"], args["batch"], FORMS[args.get("form", "rotssl")], cell.splits())
    seconds(cell, work.run, 5)
    alone = seconds(cell, work.run, args["steps"]) / args["steps"]
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if cell.cuda else []
    with torch.profiler.profile(activities=activities) as trace:
        watched = seconds(cell, work.run, args["steps"]) / args["steps"]
    kernels, found = summary(trace.events(), args["steps"], cell.cuda)
    cell.tell(**{"seconds a step": alone, "seconds a step, watched": watched}, **found, kernels=kernels[:15])
    draw(
        trace.events(),
        kernels[:15],
        cell.cuda,
        args["steps"],
        cell.output / f"{cell.name}{'-smoke' if cell.smoke else ''}.png",
    )


def lightly(cell: Cell) -> None:
    """Lightly's own loop from JPEG files, after rotssl; args: batch, steps, rounds, images, encoder of rotssl.

    Not in turn: while others are timed, lightly's loaders would take their processors, and fill queues for its own turn.
    """
    args, cores = cell.args, os.cpu_count() or 1
    root, splits = cell.cifar10(), cell.splits()
    os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"  # which would ask the network
    timing: tuple[int, int, int] = args["batch"], args["steps"], args["rounds"]
    for precision in ("fp32", "bf16") if cell.cuda else ("fp32",):
        name = f"rotssl, {precision}"
        work = Rotssl(cell, args["encoder"], args["batch"], {"train.precision": precision}, splits)
        seconds(cell, work.run, 3)
        in_turn(cell, name, {name: work.run}, *timing, Rate())
    workers = 0 if cell.smoke else cores
    given = argparse.Namespace(
        root=root, batch=args["batch"], workers=workers, device=cell.device.type, stem="cifar", seed=0, threads=cores
    )
    name, theirs = "lightly, fp32", contenders.lightly(given)
    seconds(cell, theirs.run, 3 + 2 * workers)  # more than its workers have ready
    waited = theirs.waited()
    in_turn(cell, name, {name: theirs.run}, *timing, Rate())
    rows = [row for key in list(cell.result) for row in cell.result.pop(key)]
    if "images/s" not in rows[-1]:
        raise RuntimeError(f"lightly failed: {rows[-1]['failed']}")
    for row in rows:
        row["of lightly's"] = row.get("images/s", math.nan) / rows[-1]["images/s"]
    cell.tell(contenders=rows, workers=workers, **{"lightly waited for batches, s": theirs.waited() - waited})
