"""The command that takes one step of a run apart."""

import itertools
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotssl.base.paths import AnyPath
from rotssl.commands import EXIT_OK, recorded, run_at, say
from rotssl.config.fields import require
from rotssl.data import datasets
from rotssl.runs import checkpoint
from rotssl.runs.journal import Journal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rotssl.engine.trainer import Trainer

PICTURE = "bad_step.png"


def replay(folder: str, step: int | None, root: str | None) -> int:
    """Carry out jobs/replay.py; returns the exit code.

    The step is that of the run bit for bit, if the run had one worker on a device like this one; else up to rounding.

    Args:
        folder: of the run.
        step: number of the step in the run, from 0; None: the one at which the run broke down.
        root: folder of the images, if they were moved.

    Raises:
        ConfigError: there is no such run, no such step, or no state before it.
    """
    import torch

    from rotssl.engine import breakdown, hardware
    from rotssl.engine.runtime import LocalRuntime
    from rotssl.engine.trainer import Trainer

    place = run_at(folder, "DIR")
    config = recorded(place, root)
    bad = breakdown.recorded(place)
    if bad is not None:
        say(f"step {bad['step']}: {bad['reason']}")
    if step is None:
        require(bad is not None, "--step", "nothing", f"a number: no bad step is noted in {place}")
        step = int(bad["step"]) if bad else 0
    device = torch.device("cuda" if hardware.uses_gpu(config) else "cpu")
    with tempfile.TemporaryDirectory(prefix="rotssl-replay-") as scratch:
        splits = datasets.load(config.data, config.evaluation.holdout)
        run = Trainer(config, splits, LocalRuntime(Path(scratch), device), Journal(Path(scratch)))
        require(0 <= step < run.total_steps, "--step", step, f"a number from 0 to {run.total_steps - 1}")
        first = _restore(run, place, step)
        say(f"training from step {first} to step {step}")
        run.parallel.train()
        for images, ctx in _batches(run, first, step):
            if ctx.step == step:
                _take_apart(run, images, ctx, place / PICTURE)
            else:
                run.step(images, ctx)
    return EXIT_OK


def _restore(run: "Trainer", place: AnyPath, step: int) -> int:
    """Restore the newest state that is not after the step, or the first one of the run; returns the number of its next step."""
    from rotssl.engine import resume
    from rotssl.engine.midway import Begun

    states = checkpoint.latest(place)
    within = checkpoint.within(place)
    for state in itertools.chain([] if within is None else [within], states):
        first = state["epoch"] * run.steps_per_epoch + Begun.of(state).step
        if first <= step:
            run.restore(state)
            return int(first)
    if checkpoint.found(place):
        say("all checkpoints are of later steps: training from the beginning of the run")
    resume.begin(run.model, run.config.train.init_from)
    return 0


def _batches(run: "Trainer", first: int, last: int) -> Iterator[Any]:
    for epoch in range(first // run.steps_per_epoch, last // run.steps_per_epoch + 1):
        begin = first % run.steps_per_epoch if epoch == first // run.steps_per_epoch else 0
        for images, ctx in run.batches(epoch, begin):
            if ctx.step > last:
                return
            yield images, ctx


def _take_apart(run: "Trainer", images: "Tensor", ctx: Any, picture: AnyPath) -> None:
    """Take the step, and print its losses, its norms, and the first module whose output is not finite."""
    from rotssl.data.views_grid import save_views

    views = run.augment(images, ctx)
    seen = {"global": views.full, "local": views.local} if views.local else {"global": views.full}
    largest = {name: float(p.detach().abs().max()) for name, p in run.model.named_parameters()}
    with _first_bad(run.model) as found:
        logs = {key: float(value) for key, value in run.step(images, ctx).items()}
    print(f"step {ctx.step} (epoch {ctx.epoch + 1}), learning rate {run.optimizer.param_groups[0]['lr']:g}")
    for key in sorted(logs):
        print(f"  {key:<28} {logs[key]:.6g}")
    name = max(largest, key=lambda key: largest[key] if math.isfinite(largest[key]) else math.inf)
    print(f"  largest weight before it     {largest[name]:.6g} in {name}")
    grads = {key: p.grad for key, p in run.model.named_parameters() if p.grad is not None}
    broken = [key for key, grad in grads.items() if not bool(grad.isfinite().all())]
    print(f"  gradients not finite         {len(broken)} of {len(grads)}{f', such as {broken[0]}' if broken else ''}")
    print(f"  first output not finite      {found[0] if found else 'none'}")
    save_views(seen, run.augment.mean, run.augment.std, picture)
    print(f"views {picture}")
    healthy = not broken and not found and all(map(math.isfinite, logs.values()))
    print("all numbers of this step are finite here" if healthy else "the breakdown is reproduced")


@contextmanager
def _first_bad(model: "nn.Module") -> Iterator[list[str]]:
    """Within the body, names of the modules whose output is not finite are collected, in the order of their calls."""
    import torch

    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            if torch.is_tensor(output) and not bool(output.isfinite().all()):
                fed = all(bool(x.isfinite().all()) for x in inputs if torch.is_tensor(x))
                found.append(
                    f"{name} ({type(module).__name__}), whose input is {'finite' if fed else 'not finite either'}"
                )

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
