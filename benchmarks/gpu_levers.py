"""Levers that only a GPU can judge, one at a time: the same steps with and without it. How fast, and what do the losses say?"""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from gpu_cell import Cell
from gpu_contenders import Rotssl
from gpu_speed import Rate, in_a_line, in_turn, seconds
from torch import nn

FIRST = 8  # steps whose losses are compared; a captured step is recorded at the fourth


@dataclass(frozen=True)
class Lever:
    """What differs between two engines.

    Attributes:
        fields: of both.
        prepare: given an engine and whether it is the one with the lever.
        during: context of the steps, given the same.
        reference: prepares the engine whose losses those with the lever are compared with; None: the one without it.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Rotssl, bool], None] = lambda work, on: None
    during: Callable[[bool], AbstractContextManager[Any]] = lambda on: nullcontext()
    reference: Callable[[Rotssl], None] | None = None


def flag(place: Any, name: str) -> Callable[[bool], AbstractContextManager[Any]]:
    """A context with a global setting of torch's on."""

    @contextmanager
    def during(on: bool) -> Iterator[None]:
        before = getattr(place, name)
        setattr(place, name, on)
        try:
            yield
        finally:
            setattr(place, name, before)

    return during


def cast_once(work: Rotssl, on: bool) -> None:
    """The teacher's weights are cast for autocast once a step, in one operation."""
    from rotssl.base.precision import HALF
    from rotssl.models.halved import Halved

    model = work.trainer.model
    if on:
        model.halved = Halved(model.teacher, HALF[work.trainer.precision])


def capture(work: Rotssl, on: bool) -> None:
    """The whole step is one CUDA graph; on a CPU the tests' tape, which is no faster."""
    from rotssl.engine.captured import Captured, cuda_graph

    if not on:
        return
    if work.trainer.runtime.device.type == "cuda":
        work.trainer.update = Captured(work.trainer, cuda_graph)
        return
    from tests.devices import Tape

    work.trainer.update = Captured(work.trainer, Tape.record)


def masked(work: Rotssl) -> None:
    """Views are made as in a graph; they differ by rounding from those of sorted samples, and a few steps amplify that."""
    from rotssl.data.augment import masked_cut, masked_view

    work.trainer.augment.masked = masked_view, masked_cut


class Exchanging(nn.SyncBatchNorm):
    """torch's SyncBatchNorm without the short cut that it takes in a group of one."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise by the statistics over the group (training) or the running ones."""
        if not self.training:
            return nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        given = self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum or 0.0
        apply = torch.nn.modules._functions.SyncBatchNorm.apply
        return apply(input, *given, dist.group.WORLD, 1)  # type: ignore[no-any-return]


def synchronise(work: Rotssl, on: bool) -> None:
    """Layers as several GPUs would have them: torch's, or our own, which never wait for the host."""
    from rotssl.models.norm import GlobalBatchNorm, ViewBatchNorm

    for module in work.trainer.model.modules():
        if isinstance(module, ViewBatchNorm):
            module.__class__ = GlobalBatchNorm if on else Exchanging


@contextmanager
def exchange(on: bool) -> Iterator[None]:
    """Sums over all workers go through the group, though it is of one."""
    from rotssl.base import distributed

    def all_reduce(sums: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(sums)
        return sums

    with mock.patch.object(distributed, "all_reduce", all_reduce):
        yield


TURNED = {"rotation.weight": 1.0}
LEVERS: dict[str, Lever] = {
    "cudnn.benchmark": Lever(during=flag(torch.backends.cudnn, "benchmark")),
    "TF32 in products, fp32": Lever({"train.precision": "fp32"}, during=flag(torch.backends.cuda.matmul, "allow_tf32")),
    "TF32 in products, bf16": Lever({"train.precision": "bf16"}, during=flag(torch.backends.cuda.matmul, "allow_tf32")),
    "teacher cast once": Lever({"train.precision": "bf16"}, cast_once),
    "one graph": Lever(prepare=capture, reference=masked),
    "one graph, rotation in place": Lever(TURNED, capture, reference=masked),
    "SyncBatchNorm of our own": Lever(prepare=synchronise, during=exchange),
    "one graph, compiled": Lever({"train.compile": True}, capture),
}


class Arm:
    """An engine with or without a lever."""

    def __init__(self, cell: Cell, lever: Lever, on: bool, splits: Any) -> None:
        self.lever, self.on = lever, on
        self.work = Rotssl(cell, cell.args["encoder"], cell.args["batch"], lever.fields, splits)
        lever.prepare(self.work, on)

    def first(self) -> list[float]:
        """Losses of the first steps."""
        with self.lever.during(self.on):
            # One by one: the next repetition of a recorded step writes its logs anew.
            return [float(self.work.trainer.step(*next(self.work.batches))["loss/total"]) for _ in range(FIRST)]

    def run(self, steps: int) -> None:
        """Take so many steps."""
        with self.lever.during(self.on):
            self.work.run(steps)


def levers(cell: Cell) -> None:
    """Steps with and without each lever, in turn; args: batch, encoder, steps, rounds, levers (names), images (in miniature)."""
    args, splits = cell.args, cell.splits()
    told: list[dict[str, Any]] = []
    backend = "nccl" if cell.cuda else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        for name in args["levers"]:
            told.append({"lever": name} | _judged(cell, name, splits))
            cell.tell(levers=told)
            gc.collect()
            if cell.cuda:
                torch.cuda.empty_cache()
    finally:
        dist.destroy_process_group()
    if all("not run" in row for row in told):
        raise RuntimeError(f"no lever could be tried: {told[-1]['not run']}")


def _judged(cell: Cell, name: str, splits: Any) -> dict[str, Any]:
    """What one lever does, or why it could not be tried."""
    args, lever = cell.args, LEVERS[name]
    try:
        arms = {word: Arm(cell, lever, word == "with", splits) for word in ("without", "with")}
        losses = {word: arm.first() for word, arm in arms.items()}
        if lever.reference is not None:
            other = Arm(cell, lever, False, splits)
            lever.reference(other.work)
            losses["without"] = other.first()
        for arm in arms.values():
            seconds(cell, arm.run, 2)
    except Exception as error:  # the others can still be tried
        return {"not run": in_a_line(error)}
    runs = {word: arm.run for word, arm in arms.items()}
    in_turn(cell, name, runs, args["batch"], args["steps"], args["rounds"], Rate())
    rates = {row["contender"]: row["images/s"] for row in cell.result.pop(name) if "images/s" in row}
    if len(rates) < 2:
        return {"not run": "it failed while it was timed; the log says why"}
    pairs = zip(losses["without"], losses["with"], strict=True)
    found = {f"images/s {word}": rate for word, rate in rates.items()} | {"ratio": rates["with"] / rates["without"]}
    return found | {"largest relative difference of a loss": max(abs(b - a) / abs(a) for a, b in pairs)}
