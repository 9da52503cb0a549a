"""Derive the figures that the texts quote and no benchmark prints, from the committed csv files.

python scripts/derive_figures.py    # writes benchmarks/results/derived.md

Standard library only, so that the file can be written anew wherever the csv files are.
"""

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
T_975 = {2: 4.302653, 5: 2.570582}  # Student's t, by degrees of freedom
STEP = 1.75  # cost of a BYOL step with two extra views, in plain steps, by FLOPs
VARIANTS = {
    "sample, 10 epochs": "rotation_variants_fashion-mnist-sample_10ep_2026-11-24.csv",
    "sample, 20 epochs": "rotation_variants_fashion-mnist-sample_20ep_2026-11-24.csv",
    "CIFAR-10, 10 epochs": "rotation_variants_cifar10-folder_10ep_2026-11-24.csv",
    "CIFAR-10, 20 epochs, SimCLR and MoCo v2": "rotation_variants_cifar10-folder_20ep_contrastive_2026-11-27.csv",
}


def rows_of(name: str, results: Path) -> list[dict[str, str]]:
    """The rows of a csv file in the results."""
    with (results / name).open(newline="") as file:
        return list(csv.DictReader(file))


def interval(values: Sequence[float]) -> str:
    """Mean and 95% Student t interval, with signs."""
    mean = statistics.fmean(values)
    half = T_975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


def times(results: Path) -> list[str]:
    """Training time with two extra views over plain, by method: medians over the seeds."""
    seconds: dict[tuple[str, bool], dict[str, float]] = {}
    for row in rows_of("methods_sample_2026-11-23.csv", results):
        if row["epoch"] == "10" and row["seed"] in "012" and row["update_bn"] == "True":
            key = (row["method"], float(row["weight"]) > 0)
            seconds.setdefault(key, {})[row["seed"]] = float(row["cost/train_seconds"])
    methods = sorted({method for method, _ in seconds})
    ratios = {m: [seconds[m, True][s] / seconds[m, False][s] for s in sorted(seconds[m, True])] for m in methods}
    every = [ratio for values in ratios.values() for ratio in values]
    body = [[m, f"{statistics.median(v):.1f}", f"{min(v):.1f} to {max(v):.1f}"] for m, v in ratios.items()]
    body.append(["all", f"{statistics.median(every):.1f}", f"{min(every):.1f} to {max(every):.1f}"])
    return table(["method", "median", "range"], body)


def shares(results: Path) -> list[str]:
    """Falling share over constant share: differences of the means over the methods, paired by seed, at equal epochs."""
    body = []
    for setting, name in VARIANTS.items():
        epochs = setting.split(", ")[1].split()[0]
        cells = [setting]
        for metric in ("knn/top1", "linear/top1"):
            means: dict[tuple[str, str], list[float]] = {}
            for row in rows_of(name, results):
                if row["epochs"] == epochs and row["seed"] in "012" and row["weight"] == "1.0":
                    means.setdefault((row["variant"], row["seed"]), []).append(100 * float(row[metric]))
            gains = [statistics.fmean(means["shared, fewer", s]) - statistics.fmean(means["shared", s]) for s in "012"]
            cells.append(interval(gains))
        body.append(cells)
    return table(["setting", "kNN", "linear"], body)


def between(x: float, points: Sequence[tuple[float, float]]) -> float | None:
    """The value at x on the line through points (x rising), none beyond its ends."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def paper(results: Path) -> list[str]:
    """The paper's curves of BYOL: plain epochs to rotation's accuracy over rotation's, and the gain at equal compute."""
    curves: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for row in rows_of("paper.csv", results):
        if row["source"].startswith("figure"):
            curve = curves.setdefault((row["data"], row["side"]), {}).setdefault(row["rotation"], [])
            curve.append((math.log(float(row["epochs"])), float(row["percent"])))
    body = []
    for (data, side), of in curves.items():
        plain = of["none"]
        for x, accuracy in of["two extra views"]:
            needed = between(accuracy, sorted((y, x) for x, y in plain))
            there = between(x + math.log(STEP), plain)
            saved = "beyond the curve" if needed is None else f"{math.exp(needed - x):.1f}"
            gain = "beyond the curve" if there is None else f"{accuracy - there:+.1f}"
            body.append([f"{data}, {side} px", f"{math.exp(x):.0f}", saved, gain])
    return table(["data", "epochs with rotation", "plain epochs over these", "points at equal compute"], body)


def text(results: Path = RESULTS) -> str:
    """The whole file."""
    lines = ["# Figures derived from the other results", "", "Command: `python scripts/derive_figures.py`.", ""]
    lines += ["## Training time with two extra views, over plain", ""]
    lines += ["From methods_sample_2026-11-23.csv: whole runs of 10 epochs, paired seeds, two runs at a time.", ""]
    lines += [*times(results), "", "## Share of rotated images: falling from 1 to 1/8, over constant", ""]
    lines += ["Rotation in place, weight 1, three paired seeds, means over the methods; points at equal epochs, 95%"]
    lines += ["Student t intervals.", "", *shares(results), "", "## The paper's curves of BYOL's linear accuracy", ""]
    lines += [
        f"From paper.csv. A step with two extra views counts as {STEP} plain steps (FLOPs). Curves are read on lines"
    ]
    lines += ["over the logarithm of the epochs.", "", *paper(results), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    (RESULTS / "derived.md").write_text(text())
