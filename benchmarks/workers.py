"""Two and four workers with one thread each, against one process with two threads: what does dividing a batch cost on CPUs?

    python benchmarks/workers.py [--steps 6] [--rounds 9] [--batch 256] [--only one two]

BYOL, ResNet-18 with the imagenet stem, 32 x 32, the same global batch, without augmentation's share taken out: whole steps of
the engine. Every contender has a process of its own for each worker; the others are stopped while one is at work. Where the
difference goes: ``apart`` are two workers that never exchange a gradient, ``buckets`` are DDP's (25 MB is its default), ``sync``
is BatchNorm over both workers' samples. ``four`` share the two cores. Writes benchmarks/results/workers_bBATCH[_part]_DATE.md,
``part`` where not all forms ran.
"""

import argparse
import datetime
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paired import serve, started, take_turns

FORMS: dict[
    str, tuple[int, str, float | None]
] = {  # workers, norm, MB a bucket (0: no exchange; None: rotssl's, all in one)
    "one": (1, "batch", None),
    "two": (2, "batch", None),
    "four": (4, "batch", None),
    "two, apart": (2, "batch", 0),
    "two, buckets of 1 MB": (2, "batch", 1),
    "two, buckets of 25 MB": (2, "batch", 25),
    "one, sync": (1, "sync", None),
    "two, sync": (2, "sync", None),
}
BASE = {name: "one, sync" if "sync" in name else "one" for name in FORMS}


def engine(form: str, batch: int, rank: int) -> Any:
    """The engine of one worker, in the group that the process is in."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from rotssl import config as cfg
    from rotssl.base import distributed
    from rotssl.data import datasets
    from rotssl.engine.runtime import LocalRuntime
    from rotssl.engine.trainer import Trainer
    from rotssl.runs import journal

    workers, norm, bucket = FORMS[form]
    torch.set_num_threads(max(1, 2 // workers))
    overrides = {
        "data.name": "synthetic",
        "encoder.name": "resnet18",
        "encoder.stem": "imagenet",
        "model.norm": norm,
        "method.hidden_dim": 1024,
        "rotation.weight": 0.0,
        "train.batch_size": batch,
        "train.epochs": 1000,
        "storage.path": tempfile.mkdtemp(dir=os.environ["SCRATCH"]),
    }
    config = cfg.resolve(cfg.build(overrides), 32, 1024)

    class Group(LocalRuntime):
        def wrap(self, model: Any) -> Any:
            if bucket is None:
                return distributed.data_parallel(model, self.device)
            if bucket == 0:
                return model
            return DistributedDataParallel(
                model, gradient_as_bucket_view=True, broadcast_buffers=False, bucket_cap_mb=bucket
            )

    runtime = Group(config.run_dir, torch.device("cpu"))
    runtime.rank, runtime.world_size = rank, workers
    splits = datasets.load(config.data, config.evaluation.holdout)
    trainer = Trainer(config, splits, runtime, journal.Journal(config.run_dir))
    trainer.parallel.train()
    return trainer


def steps(trainer: Any, count: int) -> None:
    """So many steps, batch after batch."""
    done, epoch = 0, 0
    while done < count:
        for images, ctx in trainer.batches(epoch):
            trainer.step(images, ctx)
            done += 1
            if done == count:
                break
        epoch += 1


def contender(args: argparse.Namespace) -> None:
    """A worker: the first one answers, the others do what the first one says."""
    import torch
    import torch.distributed as dist

    workers = FORMS[args.serve][0]
    if workers > 1:
        if args.rank == 0:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                args.port = free.getsockname()[1]
            for rank in range(1, workers):
                subprocess.Popen([sys.executable, *sys.argv, "--rank", str(rank), "--port", str(args.port)])
        address = f"tcp://127.0.0.1:{args.port}"
        dist.init_process_group("gloo", address, rank=args.rank, world_size=workers)
    trainer = engine(args.serve, args.batch, args.rank)
    order = torch.zeros(1, dtype=torch.long)

    def work(count: int) -> None:
        if workers > 1:
            dist.broadcast(order.fill_(count), 0)
        steps(trainer, count)
        if workers > 1:
            dist.barrier()

    def make() -> tuple[Callable[[int], None], dict[str, Any]]:
        return work, {}

    if args.rank == 0:
        serve(make, warm_up=4)
        if workers > 1:
            dist.broadcast(order.zero_(), 0)
        return
    while True:
        dist.broadcast(order, 0)
        if not int(order):
            return
        steps(trainer, int(order))
        dist.barrier()


def main() -> None:
    """Time the forms in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--only", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--serve", choices=FORMS, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        contender(args)
        return
    from common import RESULTS, command, commit, machine, shown

    with tempfile.TemporaryDirectory() as scratch:
        os.environ["SCRATCH"] = scratch
        code = [sys.executable, __file__, "--batch", str(args.batch), "--serve"]
        with started({name: [*code, name] for name in args.only}, 1, Path(scratch)) as contenders:
            samples = take_turns(contenders, dict.fromkeys(args.only, args.steps), args.rounds)
    speed = {name: [args.steps * args.batch / each.seconds for each in own] for name, own in samples.items()}
    foreign = [each.foreign for own in samples.values() for each in own]
    lines = [
        f"# Workers with one thread each against one with two, {datetime.date.today()}",
        "",
        f"Command: `{command()}`, commit {commit()}.",
        f"Machine: {machine()}. BYOL, ResNet-18, imagenet stem, 32 x 32, global batch {args.batch}, fp32; heads of 1024.",
        f"{args.rounds} interleaved rounds of {args.steps} steps, the others stopped meanwhile; other processes used at most "
        f"{max(foreign):.0%} of the cores. Median (range); ratios within a round.",
        "",
        "| | images/s | against one process with two threads and the same norm |",
        "|---|---|---|",
    ]
    for name, own in speed.items():
        base = speed.get(BASE[name], [])
        ratio = shown([a / b for a, b in zip(own, base, strict=True)]) if base and name != BASE[name] else ""
        lines.append(f"| {name} | {shown(own, '.0f')} | {ratio} |")
    output = args.output or RESULTS
    output.mkdir(parents=True, exist_ok=True)
    part = "" if set(args.only) == set(FORMS) else "_part"
    (output / f"workers_b{args.batch}{part}_{datetime.date.today()}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
