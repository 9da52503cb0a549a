"""From a folder of JPEG files to updated weights: BYOL with a ResNet-18, against lightly, solo-learn's pipeline and a bare loop.

    python benchmarks/end_to_end.py [--steps 50] [--rounds 3] [--device cuda] [--only lightly rotssl-fp32] [--quick]
    python benchmarks/end_to_end.py --only rotssl-fp32 --before DIR     # and a checkout of an earlier commit, in turn with it

Every contender trains in a process of its own with the same batch size, the same heads (512 - 1024 - 256, lightly's example's)
and the same number of threads; the data loaders of the peers have as many workers on top. A sample is --steps steps in steady
state: start-up, first batches and the decoding into rotssl's store lie before, and are told apart. Needs
$ROTSSL_DATA/cifar10-jpeg.tar.gz, or --root. The peers' packages are put into an environment of their own (--peers). Writes
benchmarks/results/end_to_end[_DEVICE][_part]_DATE.md and .csv, ``part`` where not all contenders ran.
"""

import argparse
import csv
import datetime
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contenders import ABOUT, HEADS, PEERS_OWN, build, fast, precision_of, suited
from paired import PEERS, Sample, peers, serve, started, take_turns, versions

BEFORE = ", before"


def contender(args: argparse.Namespace) -> tuple[Callable[[int], float], dict[str, Any]]:
    """The one that ``--serve`` names; its work tells the seconds that it waited for its batches."""
    work = build(args)

    def run(steps: int) -> float:
        before = work.waited()
        work.run(steps)
        return work.waited() - before

    return run, work.facts


def report(args: argparse.Namespace, samples: dict[str, list[Sample]], facts: dict[str, Any], peer: str) -> list[str]:
    """The tables."""
    from common import command, commit, machine, shown

    speed = {name: [args.steps * args.batch / each.seconds for each in own] for name, own in samples.items()}

    def ratio(name: str, base: str) -> str:
        if base not in speed or name == base:
            return ""
        return shown([a / b for a, b in zip(speed[name], speed[base], strict=True)])

    foreign = [each.foreign for own in samples.values() for each in own]
    lines = [
        f"# From JPEG files to updated weights, {datetime.date.today()}",
        "",
        f"Command: `{command()}`, commit {commit()}.",
        f"Machine: {machine(args.device)}. Peers: {peer}.",
        f"BYOL, ResNet-18 with the {args.stem} stem, 32 x 32, batch {args.batch}, heads 512 - {HEADS[0]} - {HEADS[1]}, "
        f"{args.threads} threads, {args.workers} loader workers where there are loaders. {args.rounds} rounds of "
        f"{args.steps} steps, interleaved; the other contenders are stopped meanwhile. Other processes used "
        f"{statistics.median(foreign):.0%} of the cores (median; at most {max(foreign):.0%}).",
        "Median (range) of the rounds; ratios are of images a second, within a round.",
        "",
        "| contender | images/s | CPU ms an image | waits for its batches | against lightly | against solo "
        f"| against the bare loop of its precision | start-up, s |{' against before |' if args.before else ''}",
        f"|---|---|---|---|---|---|---|---|{'---|' if args.before else ''}",
    ]
    for name, own in samples.items():
        waits = [each.waited / each.seconds for each in own]
        cpu = [1000 * each.cpu / (args.steps * args.batch) for each in own]
        precision = precision_of(name.removesuffix(BEFORE), args.device)
        start = facts[name]["built"] + facts[name]["warmed_up"]
        lines.append(
            f"| {name} | {shown(speed[name], '.0f')} | {shown(cpu, '.1f')} | {shown(waits, '.1%')} "
            f"| {ratio(name, 'lightly')} | {ratio(name, 'solo')} "
            f"| {ratio(name, 'bare-' + precision)} | {start:.1f} |"
            + (f" {ratio(name, name + BEFORE)} |" if args.before else "")
        )
    lines += ["", *(f"- {name}: {ABOUT[name].format(fast=fast(args.device))}." for name in samples if name in ABOUT)]
    lines += [f"- before: commit {commit(args.before)}."] if args.before else []
    if args.device == "cpu" and fast("cpu") == "fp32":
        lines.append("- This processor has no instructions for bf16: nothing in it was measured.")
    if "rotssl-rotation" in samples:
        lines.append("- What is timed of rotssl-rotation is its start, where all images turn.")
    lines.append("- All solarise the second view with probability 0.2. solo-learn's own heads are 4096 wide.")
    for name in samples:
        if "decoded" in facts[name]:
            seconds, images = facts[name]["decoded"], facts[name]["images"]
            lines.append(
                f"- {name} decoded {images} files in {seconds:.1f} s ({images / seconds:.0f} images/s) at its start, "
                f"outside of the samples: as long as {seconds * statistics.median(speed[name]) / images:.2f} of its epochs, "
                "once a run; the peers decode in every epoch."
            )
    return lines


def write(args: argparse.Namespace, samples: dict[str, list[Sample]], lines: list[str]) -> None:
    """The dated files."""
    args.output.mkdir(parents=True, exist_ok=True)
    parts = [
        "end_to_end",
        *([] if args.device == "cpu" else [args.device]),
        *([] if len(samples) == len(suited(list(ABOUT), args.device)) else ["part"]),
    ]
    target = args.output / "_".join([*parts, str(datetime.date.today())])
    target.with_suffix(".md").write_text("\n".join(lines) + "\n")
    with target.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["contender", "round", "images", "seconds", "cpu_seconds", "waited_seconds", "others"])
        for name, own in samples.items():
            for i, each in enumerate(own):
                row = [f"{each.seconds:.3f}", f"{each.cpu:.3f}", f"{each.waited:.3f}", f"{each.foreign:.3f}"]
                writer.writerow([name, i + 1, args.steps * args.batch, *row])


def main() -> None:
    """Start the contenders, let them take turns, write the tables."""
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="of a sample")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=None, help="images a step; default: 128, on a GPU 512")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--stem", choices=("imagenet", "cifar"), default=None, help="default: imagenet, on a GPU cifar")
    parser.add_argument("--threads", type=int, default=cores)
    parser.add_argument("--workers", type=int, default=cores, help="of a peer's data loader")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=tuple(ABOUT),
        help="contenders; all of them are on the device at a time, so take few on a small one",
    )
    parser.add_argument("--before", type=Path, help="a checkout of an earlier commit, whose contenders take turns, too")
    parser.add_argument("--quick", action="store_true", help="two rounds of 3 steps, and no files")
    parser.add_argument("--images", type=int, default=10000, help="of CIFAR-10's")
    parser.add_argument("--root", type=Path, default=None, help="folder with train/CLASS/*.jpg, instead of CIFAR-10")
    parser.add_argument("--peers", type=Path, default=PEERS, help="environment of the peers; made where it is missing")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before the first sample")
    parser.add_argument("--epochs", type=int, default=1000, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.batch = args.batch or (512 if args.device == "cuda" else 128)
    args.stem = args.stem or ("cifar" if args.device == "cuda" else "imagenet")
    if args.serve:
        serve(lambda: contender(args), args.warm_up)
        return
    from common import cifar10_folder, import_path

    if args.quick:
        args.steps, args.rounds, args.warm_up = 3, 2, 1
    python = peers(args.peers, PEERS_OWN[:1])
    names = args.only or suited(list(ABOUT), args.device)
    names = [name for name in names if python is not None or name != "lightly"]
    with tempfile.TemporaryDirectory() as scratch:
        root = args.root or cifar10_folder(Path(scratch), args.images)
        shared = ["--device", args.device, "--stem", args.stem, "--batch", args.batch, "--threads", args.threads]
        shared += [
            "--workers",
            args.workers,
            "--warm-up",
            args.warm_up,
            "--root",
            root.absolute(),
            "--scratch",
            scratch,
        ]
        commands = {
            name: [
                *map(
                    str,
                    [python if python and name in PEERS_OWN else sys.executable, __file__, "--serve", name, *shared],
                )
            ]
            for name in names
        }
        if args.before:
            there = args.before.resolve()
            path = os.pathsep.join([str(there), *filter(None, import_path().split(os.pathsep)[1:])])
            script = str(there / "benchmarks" / "end_to_end.py")
            for name, command in list(commands.items()):
                own = [script if part == __file__ else part for part in command]
                commands[name + BEFORE] = ["env", f"PYTHONPATH={path}", *own]
        with started(commands, args.threads, Path(scratch)) as contenders:
            samples = take_turns(contenders, dict.fromkeys(commands, args.steps), args.rounds)
    facts = {each.name: each.facts for each in contenders}
    lines = report(args, samples, facts, versions(python) if python else "none could be installed")
    print("\n".join(lines))
    if not args.quick:
        write(args, samples, lines)


if __name__ == "__main__":
    main()
