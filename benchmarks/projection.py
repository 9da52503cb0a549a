"""ImageNet-1k with a ResNet-50 on 8, 64 and 512 GPUs, on paper: what a step and a run would take, and what stops it from scaling.

    python benchmarks/projection.py

Nothing here is measured by this program but FLOPs, parameters and layers, which it counts in the recipes' own models. All else is
assumed, and the page names each assumption. Writes benchmarks/results/projection_DATE.md.
"""

import argparse
import datetime
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

from common import RESULTS, command, commit

IMAGES, CLASSES, VALIDATION = 1_281_167, 1000, 50_000
RECIPES = ("simclr_imagenet_100ep", "simsiam_imagenet_100ep", "mocov2_imagenet_200ep")
GPUS = (8, 64, 512)
A_NODE = 8  # GPUs
PUBLISHED, SUPERVISED = 2470.0, 3 * 2 * 4.09e9  # images/s, and FLOPs an image
WITHIN, BETWEEN = 200e9, 20e9  # bytes/s that a GPU exchanges in a ring, within a node and between nodes
WAIT, HOP = 30e-6, 10e-6  # seconds of a small collective, and what each doubling of the nodes adds
OVERLAP = (
    0.6  # share of a step's compute in which gradients can be exchanged: the backward pass of all but the first layers
)
CROPS, CORES = 282.0, 16  # pictures/s that a core decodes and crops twice, and cores beside a GPU
DISK = 2e9  # bytes/s for a checkpoint
ASSUMED = (
    f"A GPU trains a ResNet-50 at {PUBLISHED:.0f} images/s (A100-80GB, mixed precision, NVIDIA's published figure). That is "
    f"{PUBLISHED * SUPERVISED / 1e12:.1f} TFLOP/s, whatever the batch: below some 32 images a GPU it is too good.",
    f"A ring exchanges {WITHIN / 1e9:.0f} GB/s a GPU within a node of {A_NODE}, {BETWEEN / 1e9:.0f} GB/s between nodes.",
    f"A small collective (SyncBatchNorm's, in each direction) takes {WAIT * 1e6:.0f} us, and {HOP * 1e6:.0f} us more for each "
    "doubling of the nodes. None of them overlaps with anything.",
    f"Gradients are exchanged in single precision during {OVERLAP:.0%} of a step; what does not fit is waited for.",
    f"A core decodes and crops {CROPS:.0f} pictures/s ([564 on two cores](packed_sets_2026-11-30.md)). A GPU has {CORES} cores.",
    "Evaluation encodes all images at the same rate. What kNN computes beside that is left out.",
    f"A checkpoint (weights, moments, teacher) goes to the disk at {DISK / 1e9:.0f} GB/s beside the training, and is not added.",
)


class Model(NamedTuple):
    """What is counted in a recipe's model.

    Attributes:
        flops: of a step.
        forward: FLOPs of encoding an image.
        trained: parameters with a gradient.
        kept: numbers in a checkpoint.
        norms: layers that exchange statistics in a step, over all passes; 0 if each worker has its own.
    """

    flops: float
    forward: float
    trained: int
    kept: int
    norms: int


def counted(config: Any) -> Model:
    """Count in a model on the meta device."""
    import torch

    from rotssl.engine import flops
    from rotssl.engine.pretrainer import build_pretrainer

    with torch.device("meta"):
        model = build_pretrainer(config, torch.device("meta"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = sum(value.numel() for value in model.state_dict().values()) + trained
    norms = sum(
        "BatchNorm" in type(layer).__name__ or "SyncBatchNorm" in type(layer).__name__ for layer in model.modules()
    )
    passes = config.views.global_count if config.model.norm == "sync" else 0
    return Model(flops.count_mean(config), SUPERVISED / 3, trained, kept, norms * passes)


def step(config: Any, model: Model, gpus: int) -> dict[str, float]:
    """Seconds of a step and of its parts."""
    compute = model.flops / gpus / (PUBLISHED * SUPERVISED)
    ring = 2 * (gpus - 1) / gpus * 4 * model.trained / (WITHIN if gpus <= A_NODE else BETWEEN)
    waiting = 2 * model.norms * (WAIT + HOP * math.log2(max(1, gpus / A_NODE)))
    took = compute + max(0.0, ring - OVERLAP * compute) + waiting
    cores = config.train.batch_size / gpus / CROPS / took
    return {
        "compute": compute,
        "gradients": max(0.0, ring - OVERLAP * compute),
        "norms": waiting,
        "step": max(took, took * cores / CORES),
        "cores": cores,
    }


def rows(name: str) -> list[str]:
    """The rows of a recipe."""
    from rotssl import config as cfg
    from rotssl.config.recipes import load_recipe

    given = load_recipe(Path(__file__).parent.parent / "jobs" / "recipes" / f"{name}.yaml")
    config = cfg.resolve(cfg.build({**given, "data.root": "SET", "storage.path": "results"}), 224, IMAGES)
    model, lines, first = counted(config), [], 0.0
    epochs, batch = config.train.epochs, config.train.batch_size
    for gpus in GPUS:
        if cfg.unshared(config, gpus):
            why = cfg.unshared(config, gpus)
            lines.append(f"| {name} | {gpus} | not possible: {why} |" + " |" * 8)
            continue
        found = step(config, model, gpus)
        rate = batch / found["step"]
        first = first or rate / gpus
        train = IMAGES // batch * found["step"] * epochs / 3600
        encoding = (IMAGES + VALIDATION) * model.forward / gpus / (PUBLISHED * SUPERVISED)
        evaluation = encoding * epochs / int(config.evaluation.knn_every) / 3600
        saved = 4 * model.kept / DISK
        parts = " | ".join(f"{1e3 * found[key]:.1f}" for key in ("step", "compute", "gradients", "norms"))
        lines.append(
            f"| {name} | {gpus} | {batch // gpus} | {parts} | {found['cores']:.1f} | {rate:,.0f} | {rate / gpus / first:.2f} | "
            f"{train + evaluation:.1f} ({evaluation / (train + evaluation):.1%}) | {saved:.1f} |"
        )
    return lines


def report() -> list[str]:
    """The page."""
    return [
        f"# ImageNet-1k, ResNet-50, on paper, {datetime.date.today()}",
        "",
        f"Command: `{command()}`, commit {commit()}. Nothing was run on these machines. Assumed:",
        "",
        *(f"- {text}" for text in ASSUMED),
        "",
        "Milliseconds of a step, and of its compute, of gradients that are waited for, and of norms' statistics; cores a "
        "GPU that decoding keeps busy; pictures/s, and a GPU's of one's among 8; hours of the run with the share of "
        "evaluation; seconds of a checkpoint.",
        "",
        "| recipe | GPUs | images each | step | compute | gradients | norms | cores | pictures/s | of linear | hours "
        "| checkpoint |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(line for name in RECIPES for line in rows(name)),
        "",
        "Read: with 64 images or more a GPU the devices are busy. What grows first is SyncBatchNorm's waiting, which is "
        "the same for any batch; `model.norm batch` or `group` does without it, and changes what is computed. Next are "
        "the gradients, once a step computes for less time than they travel: a larger batch helps. Decoding, evaluation "
        "and checkpoints are not what stops it.",
        "",
    ]


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    lines = report()
    print("\n".join(lines))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"projection_{datetime.date.today()}.md").write_text("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
