"""The paper's analysis of why instance similarity learns slowly, with our runs: see docs/analysis.md.

``sweep`` reads the runs of an experiment, ``gradients`` the checkpoints of a run, ``overlap`` the views of a recipe. Each prints
what it found, and writes numbers and a plot.
"""

import dataclasses
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rotssl.base.paths import AnyPath, filled, write_whole
from rotssl.base.rng import Floats, Mask
from rotssl.commands import EXIT_OK, folder_of, recorded, run_at, say
from rotssl.config import ResolvedConfig, replace
from rotssl.config.cli import Parser, parse
from rotssl.config.fields import ConfigError, require
from rotssl.data import datasets
from rotssl.data.again import images_of
from rotssl.data.images import DataError
from rotssl.lifecycle import prepare
from rotssl.reports.paper import STUDIES
from rotssl.runs import checkpoint
from rotssl.runs.journal import Journal
from rotssl.tracking import reader

SAMPLES = 10_000  # images whose crops are compared
_READ = (
    "knn/top1",
    "linear/top1",
    "test/knn/top1",
    "test/linear/top1",
    "feature/std",
    "feature/effective_rank",
    "loss/ssl",
)


def sweep(uri: str, experiment: str, study: str, metric: str, output: AnyPath, only: str | None = None) -> int:
    """Set the runs of an experiment beside a table or figure of the paper; returns the exit code.

    Args:
        uri: URI of the tracking store.
        experiment: name of the experiment.
        study: a key of ``STUDIES``.
        metric: of the runs' last epoch.
        output: folder for plot, numbers and text.
        only: name or id of a sweep whose trials alone are read.

    Raises:
        ConfigError: the store can't be read, or its runs do not vary the study's field.
    """
    from rotssl.commands.compare import find_sweep

    records = reader.read_runs(uri, experiment, _READ)
    if only is not None:
        parent = find_sweep(records, only)
        kept = {record.run_id for record in records if record.parent == parent} | reader.trial_ids(uri, parent)
        records = [record for record in records if record.run_id in kept]
    from rotssl.reports import findings, groups, studies, study_plot

    runs, left_out = groups.sift(records, metric, supervised=True)
    asked = STUDIES[study]
    linear = metric.endswith("linear/top1")
    if not linear:
        asked = dataclasses.replace(asked, paper={})
    found = studies.found_in(runs, asked, metric)
    warnings = [f"left out: {entry.run.name}: {entry.reason}" for entry in left_out]
    warnings = findings.labels_used(runs) + findings.switched_off(runs) + warnings
    if not linear:
        warnings.append(f"the paper's numbers are of a linear classifier: none is set beside {metric}")
    modes = {run.params.get("rotation.mode") for run in runs if run.params.get("rotation.weight", "0") != "0.0"}
    if asked.field != "rotation.mode" and (others := sorted(map(str, modes - {"extra", None}))):
        warnings.append(f"rotation.mode is {', '.join(others)} here; the paper's recipe is extra, with two more views")
    lines = studies.reading(found, asked)
    numbers = {"study": study, "warnings": warnings, "reading": lines, **studies.content(found, asked, metric)}
    words = [f"{asked.title} ({asked.source}), {experiment}", "", *warnings, *lines]
    try:
        with filled(output) as here:
            study_plot.save(found, asked, metric, here / f"{study}.png")
            _write(here, study, numbers, words)
    except OSError as error:
        raise ConfigError(f"--output: cannot write to {error.filename or output}: {error.strerror}") from error
    _show(warnings, lines, [output / f"{study}.{kind}" for kind in ("png", "json", "md")])
    return EXIT_OK


def gradients(folder: str, batches: int, root: str | None, output: str | None) -> int:
    """Measure signal and noise of each loss's gradient at the start of a run and at its checkpoints; returns the exit code.

    Args:
        folder: of the run; ``train.keep_every`` has kept checkpoints besides the two newest.
        batches: number of batches at each, at least 2.
        root: folder of the images, if they were moved.
        output: folder for plot and numbers; None: ``signal`` in the run's.

    Raises:
        ConfigError: there is no such run, it has no checkpoint or one of another run, or its images are not there.
    """
    require(batches >= 2, "--batches", batches, "at least 2: one batch has no spread")
    place = run_at(folder)
    config = recorded(place, root)
    import torch

    from rotssl.engine import hardware, resume, signal
    from rotssl.engine.runtime import LocalRuntime, RunFailed
    from rotssl.engine.trainer import Trainer
    from rotssl.models import networks
    from rotssl.reports import study_plot

    networks.newest(place, config)
    device = torch.device("cuda" if hardware.uses_gpu(config) and torch.cuda.is_available() else "cpu")
    found: list[tuple[int, signal.Signal]] = []
    with tempfile.TemporaryDirectory(prefix="rotssl-signal-") as scratch:
        try:
            run = Trainer(config, images_of(config, place), LocalRuntime(Path(scratch), device), Journal(Path(scratch)))
            resume.begin(run.model, config.train.init_from)
            found.append((0, signal.measured(run, batches, 0)))
            for state in reversed(list(checkpoint.latest(place))):
                checkpoint.check_same(place, state, config)
                networks.check_encoder(run.model.encoder, config, place, state)
                epoch = run.restore(state)
                found.append((epoch, signal.measured(run, batches, epoch)))
        except DataError as error:
            raise ConfigError(f"data.root: {error}") from error
        except RunFailed as error:
            raise ConfigError(str(error)) from error
    if len(found) == 1:
        raise ConfigError(f"{place} has no checkpoint at the end of an epoch that can be read")
    target = place / "signal" if output is None else folder_of("--output", output).absolute()
    about = {"batches": batches, "batch_size": config.train.batch_size, "method": config.method.name}
    points = [{"epoch": epoch, **vars(point)} for epoch, point in found]
    with filled(target) as here:
        write_whole(here / "signal.json", json.dumps({**about, "points": points}, indent=2, allow_nan=False) + "\n")
        study_plot.save_signal(
            found, f"{config.method.name}, batches of {config.train.batch_size}", here / "signal.png"
        )
    print(f"{batches} batches of {config.train.batch_size} at each checkpoint; SNR = |E g|^2 / tr Cov g of one batch")
    for epoch, point in found:
        parts = [f"SNR {name} {_shown(value)}" for name, value in point.snr.items()]
        parts += [f"cosine of {pair} {_shown(value)}" for pair, value in point.cosine.items()]
        print(f"epoch {epoch:>4}  {'  '.join(parts)}")
    print("files", target / "signal.png", target / "signal.json")
    return EXIT_OK


def overlap(argv: Sequence[str], description: str) -> int:
    """Measure how far the first crop of an image overlaps with the others, and what crops show of it; returns the exit code.

    What they show is their share of the image's saliency, which is left out for packed sets that are decoded for their crops.
    Takes the flags of jobs/pretrain.py, and ``--output DIR`` (default: overlap).

    Raises:
        ConfigError: a flag, the recipe or the data is invalid.
    """
    own = Parser(add_help=False, allow_abbrev=False)
    own.add_argument("--output", metavar="DIR", default="overlap")
    given, rest = own.parse_known_args(argv)
    target = folder_of("--output", given.output).absolute()
    asked = parse(rest, "jobs/analyze.py overlap", description).config
    config, _ = prepare(replace(asked, {"scaling.num_workers": 0}), say=say)
    from rotssl.reports import study_plot

    found, masses, good = _crops(config)
    least = config.views.min_overlap
    numbers: dict[str, Any] = {
        "pairs": len(found),
        "global_scale": config.views.global_scale,
        "min_overlap": least,
        **_spread(found),
        "apart": float((found == 0).mean()),
        "below_bound": float((found < least).mean()),
    }
    if len(masses):
        chosen = {
            "good_crops": config.views.good_crops,
            "good_mass": config.views.good_mass,
            "good": float(good.mean()),
        }
        numbers["saliency"] = {**chosen, **_spread(masses)}
    with filled(target) as here:
        write_whole(here / "overlap.json", json.dumps(numbers, indent=2) + "\n")
        study_plot.save_histogram(found.tolist(), masses.tolist(), least, here / "overlap.png")
    low, median, high = (numbers["percentiles"][step] for step in ("10", "50", "90"))
    print(f"IoU of two crops of an image, {len(found)} pairs: mean {found.mean():.3f}, median {median:.3f}")
    print(f"80% of them are between {low:.3f} and {high:.3f}; {100 * numbers['apart']:.1f}% do not overlap at all")
    if least:
        print(f"{100 * numbers['below_bound']:.1f}% are below views.min_overlap {least:g}, for which no draw was found")
    if len(masses):
        print(f"saliency of its image in a crop: mean {masses.mean():.3f}, median {np.median(masses):.3f}")
        rule = (
            f"have {config.views.good_mass:g} of it" if config.views.good_mass else "are more salient than their image"
        )
        print(f"{100 * good.mean():.1f}% of the crops {rule}")
    print("files", target / "overlap.png", target / "overlap.json")
    return EXIT_OK


def _crops(config: ResolvedConfig) -> tuple[Floats, Floats, Mask]:
    """Of global crops of images: overlaps of each with the image's first, shares of the saliency, and which ones are good."""
    from rotssl.base.step import StepContext
    from rotssl.data.augment import Augment
    from rotssl.data.crops import overlap
    from rotssl.data.saliency import Judge

    views, images = config.views, datasets.load(config.data, config.evaluation.holdout).train.images
    index = np.arange(min(len(images), SAMPLES))
    whole = StepContext(config.train.seed, 0, 0, 0.0, index, 0, len(index), views.global_count)
    augment = Augment(views, config.data.image_size, (0.0,), (1.0,), config.train.seed)
    overlaps, masses, good = list[Floats](), [np.empty(0)], [np.empty(0, bool)]
    for start in range(0, len(index), 256):  # so that little memory is needed
        ctx = whole.part(start, start + 256)
        if not isinstance(images, np.ndarray):
            boxes = augment.boxes(ctx, *images.sizes(ctx.positions))
        else:
            judge = Judge.of(images[ctx.positions], ctx, views.good_crops, views.good_mass)
            boxes = augment.boxes(ctx, images.shape[2], images.shape[3], judge)
            rows = np.arange(len(ctx.positions))
            masses += [judge.mass(box, rows) for box in boxes]
            good += [judge.good(box, rows) for box in boxes]
        overlaps += [overlap(boxes[0], other) for other in boxes[1:]]
    return np.concatenate(overlaps), np.concatenate(masses), np.concatenate(good)


def _spread(values: Floats) -> dict[str, Any]:
    """Mean and percentiles."""
    steps = range(0, 101, 10)
    found = zip(steps, np.percentile(values, steps), strict=True)
    return {"mean": float(values.mean()), "percentiles": {str(step): float(value) for step, value in found}}


def _shown(value: float | None) -> str:
    return "not seen" if value is None or not math.isfinite(value) else f"{value:.3g}"


def _write(folder: Path, name: str, numbers: dict[str, Any], words: Sequence[str]) -> None:
    write_whole(folder / f"{name}.json", json.dumps(numbers, indent=2, sort_keys=True, allow_nan=False) + "\n")
    write_whole(folder / f"{name}.md", "\n".join(words) + "\n")


def _show(warnings: Sequence[str], lines: Sequence[str], files: Sequence[AnyPath]) -> None:
    for warning in warnings:
        say(f"warning: {warning}")
    print(*lines, sep="\n")
    print("files", *files)
