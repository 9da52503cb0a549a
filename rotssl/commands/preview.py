"""The command that draws the views that a recipe shows to the model, without training."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from rotssl.commands import EXIT_OK, say
from rotssl.config import replace
from rotssl.config.cli import parse
from rotssl.config.fields import ConfigError
from rotssl.config.tasks import SIXTEENTHS
from rotssl.lifecycle import prepare

ROWS = 8


def preview(argv: Sequence[str], description: str = "") -> int:
    """Carry out jobs/preview.py: write the picture and print its path; returns the exit code."""
    if list(argv[-1:]) == ["--output"]:
        raise ConfigError("--output: got nothing, expected a file name that ends in .png")
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--output", type=Path, default=Path("views.png"))
    given, rest = own.parse_known_args(argv)
    if given.output.suffix.lower() != ".png":
        raise ConfigError(f"--output: got '{given.output}', expected a file name that ends in .png")
    asked = parse(rest, "jobs/preview.py", description).config
    batch = max([ROWS, *(math.ceil(2 / task.least_share) for task in asked.active().values())])
    batch = math.ceil(batch / SIXTEENTHS) * SIXTEENTHS  # rotation's mode disjoint divides it
    few = {"data.limit": max(64, batch), "data.store": "memory", "train.batch_size": batch, "train.accumulate": 1}
    ends = [f"{name}.{leaf}" for name, task in asked.active().items() for leaf in task.ENDS]
    few |= {"scaling.num_workers": 0, **dict.fromkeys(ends)}  # as in the first step
    few |= {"method.queue_size": batch} if getattr(asked.method, "queue_size", 0) else {}
    config, _ = prepare(replace(asked, few), say=say)
    import numpy as np
    import torch

    from rotssl.base import rng
    from rotssl.base.step import StepContext
    from rotssl.data import datasets
    from rotssl.data.augment import Augment
    from rotssl.data.views_grid import save_views
    from rotssl.engine.pretrainer import build_pretrainer

    model = build_pretrainer(config, torch.device("meta"))  # transforms need no weights
    mean, std = datasets.normalization(config.data.name)
    augment = Augment(config.views, config.data.image_size, mean, std, config.train.seed, model.own_crops())
    images = datasets.load(config.data, config.evaluation.holdout).train.images
    order = rng.permutation(rng.key(config.train.seed, 0, "order"), len(images))[:batch]
    positions = np.arange(batch)
    ctx = StepContext(config.train.seed, 0, 0, 0.0, positions, 0, batch, config.views.global_count)
    pixels = (
        images[order] if isinstance(images, np.ndarray) else images.cuts(order, augment.cuts(ctx, *images.sizes(order)))
    )
    views = augment(torch.from_numpy(pixels), ctx)
    seen = {"global": views.full, "local": views.local}
    for name, task in model.named_tasks():
        made, targets = task.transform(views.own.get(name, views.full), ctx)
        if task.in_place or targets.rows is None:
            seen[name] = made
            if task.in_place and task.teacher_too and views.local:
                seen[f"{name}, local"] = task.transform_local(views.local, ctx)
        else:
            print(f"{name}: not shown, because it uses only a fraction of the images", file=sys.stderr)
    try:
        save_views(seen, mean, std, given.output, ROWS)
    except OSError as error:
        raise ConfigError(f"--output: cannot write {given.output}: {error.strerror}") from error
    print(given.output.absolute())
    return EXIT_OK
