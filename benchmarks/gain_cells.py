"""The runs of gain.py: one cell is one run, in one process and thread; its result is one JSON file."""

import base64
import dataclasses
import datetime
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import cifar10_folder, commit, machine, trainer
from filelock import FileLock, Timeout

from rotssl import config as cfg
from rotssl.base import rng
from rotssl.data import datasets
from rotssl.data.datasets import Splits
from rotssl.data.images import ImageSet
from rotssl.engine.hardware import emulates_bf16
from rotssl.runs import journal

PRECISION = "fp32" if emulates_bf16() else "bf16"
TURNED = "-turned"  # suffix of a data set whose pictures were each turned once by a random quarter turn


@dataclass(frozen=True)
class Cell:
    """A run.

    Attributes:
        data: ``cifar10``, ``fashion-mnist``, or either with the suffix ``-turned``.
        method: name of the method.
        form: name of what is compared, such as ``plain``.
        epochs: length of the run.
        seed: seed of the run.
        final: whether it trains on all training images and is measured on the test split; otherwise a tenth of the training
            images is held out to measure it.
        fields: fields of the configuration that make up the form.
    """

    data: str
    method: str
    form: str
    epochs: int
    seed: int
    final: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """Name of its file."""
        split = "test" if self.final else "held-out"
        return f"{self.data}_{self.method}_{self.form}_{self.epochs}ep_seed{self.seed}_{split}"


def turned(images: ImageSet, purpose: str) -> ImageSet:
    """The images, each turned by 0 to 3 quarter turns, drawn once and for all."""
    turns = np.floor(4 * rng.uniform(rng.key("turned", purpose), np.arange(len(images)), 1)[:, 0])
    pixels = np.array(images.images)
    for k in (1, 2, 3):
        rows = np.flatnonzero(turns == k)
        pixels[rows] = np.rot90(pixels[rows], k, axes=(2, 3))
    return dataclasses.replace(images, images=pixels)


def data_fields(data: str, final: bool, work: Path) -> dict[str, Any]:
    """The section ``data`` of a data set; CIFAR-10 is unpacked into ``work``."""
    if data.removesuffix(TURNED) == "fashion-mnist":
        return {"data.name": "fashion-mnist", "data.root": os.environ["ROTSSL_DATA"]}
    with FileLock(work / "cifar10.lock"):
        root = cifar10_folder(work)
    if not final:  # val/ holds the test split: leave it out
        only = work / "cifar10-train"
        only.mkdir(exist_ok=True)
        with suppress(FileExistsError):
            (only / "train").symlink_to(root / "train")
        root = only
    return {"data.name": "imagefolder", "data.root": str(root)}


def load(data: str, final: bool, work: Path, limits: Mapping[str, Any]) -> Splits:
    """The images of a cell: of the official training split all or 9 in 10, and as validation the test split or the tenth.

    ``limits`` are the fields of the section ``data`` that the plan sets.
    """
    config = cfg.build({**data_fields(data, final, work), **limits})
    holdout = 0.0 if final and config.data.name == "fashion-mnist" else 0.1
    info = datasets.inspect(config.data, holdout)
    splits = datasets.load(cfg.resolve(config, info.image_size, info.train_size).data, holdout)
    if splits.validation is None:
        splits = dataclasses.replace(splits, validation=splits.test, test=None)
    if data.endswith(TURNED):
        assert splits.validation is not None
        splits = dataclasses.replace(
            splits, train=turned(splits.train, "train"), validation=turned(splits.validation, "validation")
        )
    return splits


_loaded: dict[tuple[str, bool, str], Splits] = {}


def run(cell: Cell, folder: Path, work: Path, common: Mapping[str, Any], patience: float = 0.0) -> str:
    """Run a cell unless its file is there or another process runs it, for so many seconds; says what happened in a line."""
    path = folder / f"{cell.name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / f"{cell.name}.lock", timeout=patience):
            if path.exists():
                return ""
            return _run(cell, path, work, common)
    except Timeout:
        return ""


def _run(cell: Cell, path: Path, work: Path, common: Mapping[str, Any]) -> str:
    from rotssl.engine.runtime import RunFailed

    limits = {name: value for name, value in {**common, **cell.fields}.items() if name.startswith("data.")}
    key = cell.data, cell.final, json.dumps(limits, sort_keys=True)
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = load(cell.data, cell.final, work, limits)
    values = {
        "model.norm": "batch",
        "train.precision": PRECISION,
        **data_fields(cell.data, cell.final, work),
        **common,
        "method.name": cell.method,
        **cell.fields,
        "train.epochs": cell.epochs,
        "train.seed": cell.seed,
        "tracking.run_name": cell.name,
    }
    # An interrupted run goes on from its checkpoint, which must not be one of other fields.
    kind = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
    values["storage.path"] = str(work / "runs" / kind)
    started = datetime.datetime.now(datetime.UTC)
    engine = trainer(values, _loaded[key])
    error = ""
    try:
        engine.run()
    except RunFailed as failure:
        error = str(failure)
    run_dir = engine.config.run_dir
    content = {
        **dataclasses.asdict(cell),
        "common": dict(common),
        "lr": engine.config.optim.lr,
        "train_images": len(engine.splits.train),
        "measured_images": len(engine.splits.validation),
        "error": error,
        "points": journal.read(run_dir),
        "hits": _hits(run_dir),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round((datetime.datetime.now(datetime.UTC) - started).total_seconds(), 1),
        "commit": commit(),
        "machine": machine(),
        "precision": PRECISION,
        "evaluation_precision": engine.evaluator.precision,
    }
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.rename(path)
    shutil.rmtree(values["storage.path"])
    last = content["points"][max(content["points"])] if content["points"] else {}
    scores = " ".join(
        f"{key} {last[key]:.4f}" for key in ("knn/top1", "linear/top1", "rotation/accuracy") if key in last
    )
    return f"{cell.name}: {error or scores}, {content['seconds']:.0f} s"


def _hits(run_dir: Path) -> dict[str, str]:
    """Metric -> which images it classified correctly: bits in their order, packed, in base64."""
    path = run_dir / "hits.npz"
    if not path.exists():
        return {}
    with np.load(path) as hits:
        return {f"{name}/top1": base64.b64encode(np.packbits(hits[name])).decode() for name in hits}


def hits_of(content: Mapping[str, Any], metric: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """The bits of ``_hits``, one per measured image."""
    packed = np.frombuffer(base64.b64decode(content["hits"][metric]), np.uint8)
    return np.unpackbits(packed, count=content["measured_images"]).astype(bool)
