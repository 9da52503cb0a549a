"""Which form of the rotation task gives the most for its time?

    python benchmarks/rotation_variants.py [--data fashion-mnist-sample] [--epochs 10] [--seeds 0 1 2] [--jobs 2] [--work FOLDER]
        [--methods byol,simclr,simsiam,mocov2,swav] [--variants 'paper;shared;...'] [--weight 1]
        [--known CSV ...] [--report]

For each method, at the learning rate that suits its plain run (on the sample that of methods_sample.py and convergence_sample.py,
else the best of three):

1. Seconds a step of every variant over the plain step: interleaved, in rotated order, medians of paired ratios.
2. The weight of each variant on its own: the best in the mean over the methods, with a seed that is none of those in the table;
   or one for all, without trials of weights and rates, where an earlier table has chosen it (--weight).
3. Paired seeds at *equal epochs*, and at *equal compute*: a variant whose step takes r times as long gets 1/r of the epochs,
   rounded, with the whole schedule in them. Against the paper's recipe nothing is rounded: its accuracy at exactly the compute
   of the other run is read between its two lengths, on a line over the logarithm of the epochs, seed by seed.

Runs are single processes with one thread, --jobs at a time; one that is finished in --work, or stands in a table of --known,
is not run again, and several of these scripts may share a folder if they have different methods. --data cifar10-folder is
CIFAR-10 as JPEG files, of $ROTSSL_DATA/cifar10-jpeg.tar.gz; 10% of the training images are held back. BatchNorm is torch's own
and the precision bf16, as on a GPU; fp32 where the processor only emulates bf16; tables of --known in
the other precision are left out. Writes benchmarks/results/rotation_variants_DATA_EPOCHSep[_seedsSEEDS]_DATE.{md,csv};
--report writes them from the runs that are there, and times only steps that no start has timed.
"""

import argparse
import csv
import datetime
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import RESULTS, cifar10_folder, command, commit, machine, spread
from rotation_study import (
    CHEAP,
    COLUMNS,
    DATA,
    MEANING,
    METRICS,
    PRECISION,
    RATES,
    TUNING_SEED,
    VARIANTS,
    WEIGHTS,
    Cell,
    Study,
)

from rotssl.reports.statistics import paired_difference

SEEDS = [0, 1, 2]


def weights(studies: Sequence[Study], given: float | None) -> dict[str, float]:
    """Of each variant the weight that is given, or that is best in the mean over the methods, of those that all of them tried."""
    chosen = {"plain": 0.0}
    if given is not None:
        return dict.fromkeys(studies[0].variants, given) | chosen
    for v in studies[0].variants:
        common = [w for w in WEIGHTS if all(w in study.tuned.get(v, {}) for study in studies)]
        if common:
            chosen[v] = max(common, key=lambda w: sum(study.tuned[v][w] for study in studies))
    return chosen


def gain(ours: Sequence[float] | None, theirs: Sequence[float] | None) -> str:
    """Mean and interval of the paired differences, in points."""
    if ours is None or theirs is None:
        return ""
    mean, low, high = (100 * value for value in paired_difference(list(ours), list(theirs)))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def pooled(each: Sequence[list[float] | None]) -> list[float] | None:
    """Seed by seed the mean over the methods; None if one has nothing."""
    found = [scores for scores in each if scores is not None]
    return [statistics.mean(column) for column in zip(*found, strict=True)] if len(found) == len(each) else None


def kept(ours: Sequence[float] | None, paper: Sequence[float] | None, plain: Sequence[float] | None) -> str:
    """Share of the paper's mean gain."""
    if ours is None or paper is None or plain is None:
        return ""
    whole = statistics.mean(paper) - statistics.mean(plain)
    return f"{100 * (statistics.mean(ours) - statistics.mean(plain)) / whole:.0f} %" if whole > 0.005 else "-"


def table(studies: Sequence[Study], variants: Sequence[str], metric: str) -> list[str]:
    """The rows of some methods together."""
    lines = [
        f"| variant | step | weight | {metric}, equal epochs | gain over plain | of the paper's | compute | {metric}, equal "
        "compute | gain over plain | gain over the paper's recipe, exactly equal compute |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for v in variants:
        here = {equal: pooled([s.scores(v, equal, metric) for s in studies]) for equal in ("epochs", "compute")}
        plain, paper = (pooled([s.scores(name, "epochs", metric) for s in studies]) for name in ("plain", "paper"))
        spent = statistics.mean(study.compute(v, "compute") for study in studies)
        cheap_paper = pooled([s.paper(s.compute(v, "compute"), metric) for s in studies])
        shown = {key: "" if values is None else spread(values) for key, values in here.items()}
        ratio = f"{statistics.median(study.ratios[v] for study in studies):.2f}"
        one = studies[0] if len(studies) == 1 else None
        row = [v, ratio, f"{studies[0].weights[v]:g}" if v in studies[0].weights else "", shown["epochs"]]
        row += ["", ""] if v == "plain" else [gain(here["epochs"], plain), kept(here["epochs"], paper, plain)]
        row += [f"{spent:.2f}" + (f", {one.share(v)} epochs" if one is not None else ""), shown["compute"]]
        row += ["" if v == "plain" else gain(here["compute"], plain)]
        row += ["" if v == "paper" else gain(here["compute"], cheap_paper)]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def report(studies: Sequence[Study], args: argparse.Namespace) -> None:
    """Write the tables and the points of all runs."""
    known = sorted({file.name for study in studies for file in study.known})
    epochs, variants, data = args.epochs, studies[0].variants, studies[0].data
    lines = [
        f"# Forms of the rotation task on {data}, {epochs} epochs, {datetime.date.today()}",
        "",
        f"Command: `{command()}`, commit {commit()}.",
        f"Machine: {machine()}; one thread a run. Paired seeds {', '.join(map(str, args.seeds))}; top-1 on validation after the "
        "last epoch, %: mean (range); gains in points with 95% Student t intervals over the pairs.",
        f"Encoder small, batch 256, {PRECISION}, BatchNorm; 5,000 images. Step: seconds over the plain step's (median of 9 "
        f"interleaved pairs). Equal compute: {epochs} plain epochs, or {epochs} / step, rounded, steps up to {CHEAP:g} as 1; "
        "what comes of it, in plain runs, is under compute. The accuracy of the paper's recipe at exactly the compute of "
        "another run is read between its two lengths, on a line over the logarithm of the epochs.",
        f"Weight: of {', '.join(f'{w:g}' for w in WEIGHTS)} the best in the mean over the methods, at {args.tuning_epochs} "
        f"epochs with seed {TUNING_SEED}."
        if args.weight is None
        else "Weights: as given. Rates: those of the sample's plain runs.",
        *([f"Among the runs are those of {', '.join(known)}."] if known else []),
        "",
        *(f"- {v}: {MEANING[v]}" for v in variants),
    ]
    if args.weight is None:
        lines += [
            "",
            "kNN of the trials of the weights, mean over the methods:",
            "",
            f"| variant | {' | '.join(f'{w:g}' for w in WEIGHTS)} |",
            f"|---|{'---|' * len(WEIGHTS)}",
        ]
    for v in [v for v in variants if v != "plain" and args.weight is None]:
        each = [[study.tuned.get(v, {}).get(w) for study in studies] for w in WEIGHTS]
        row = [f"{100 * statistics.mean(found):.1f}" if None not in found else "" for found in each]  # type: ignore[arg-type]
        lines.append(f"| {v} | {' | '.join(row)} |")
    for metric in METRICS:
        lines += ["", f"## Mean of {', '.join(study.method for study in studies)}: {metric}", ""]
        lines += table(studies, variants, metric)
    for study in studies:
        for metric in METRICS:
            lines += ["", f"## {study.method}, lr {study.lr:g}: {metric}", ""]
            lines += table([study], variants, metric)
    lines += [
        "",
        "## Loss of the method in the last epoch, and accuracy of the rotations",
        "",
        "Means over the seeds, at equal epochs. Negatives that are turned another way are easy ones: if they all are told apart "
        "by that, the loss of a method that pushes them away falls by ln 4 = 1.39.",
        "",
        f"| variant | {' | '.join(study.method for study in studies)} |",
        f"|---|{'---|' * len(studies)}",
    ]
    for v in variants:
        shown = []
        for study in studies:
            loss, right = (study.mean(v, key) for key in ("loss/ssl", "rotation/accuracy"))
            shown.append("" if loss is None else f"{loss:.2f}" + (f", {100 * right:.0f} %" if right else ""))
        lines.append(f"| {v} | {' | '.join(shown)} |")
    seeds = "" if args.seeds == SEEDS else f"_seeds{'-'.join(map(str, args.seeds))}"
    target = args.output / f"rotation_variants_{data}_{epochs}ep{seeds}_{datetime.date.today()}"
    args.output.mkdir(parents=True, exist_ok=True)
    target.with_suffix(".md").write_text("\n".join(lines) + "\n")
    with target.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*Cell._fields, "step", *COLUMNS])
        for study in studies:
            for cell, points in sorted(study.runs.items()):
                last = points[max(points)] if points else {}
                step = study.ratios.get(cell.variant, "")
                writer.writerow([*cell, step, *(f"{last[key]:.4f}" if key in last else "" for key in COLUMNS)])
    print("\n".join(lines))


def main() -> None:
    """Run all cells and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, default="fashion-mnist-sample")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--tuning-epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--methods", default=",".join(RATES))
    parser.add_argument("--variants", default=";".join(VARIANTS), help="separated by semicolons")
    parser.add_argument("--weight", type=float, default=None, help="of all variants, instead of trials")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", default=None, help="folder of the runs; default: a temporary one")
    parser.add_argument("--known", type=Path, nargs="+", default=[], help="tables (csv) of earlier starts")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    names = ["plain", *(v for v in args.variants.split(";") if v != "plain")]
    with (
        tempfile.TemporaryDirectory() as scratch,
        multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool,
    ):
        work = args.work or scratch
        if args.data == "cifar10-folder" and not args.report:
            cifar10_folder(Path(work), 50_000)
        studies = [Study(args.data, m, args.epochs, args.seeds, names, work) for m in args.methods.split(",")]
        hands = None if args.report else pool
        for study, file in itertools.product(studies, args.known):
            study.know(file)
        for study in studies:
            study.time(hands)
        for study in studies if args.weight is None else []:
            study.tune(hands, args.tuning_epochs)
        for study in studies:
            study.weights = weights(studies, args.weight)
            study.run(hands)
        report(studies, args)


if __name__ == "__main__":
    sys.exit(main())
