"""The configuration of a run: the sections put together, the rules between their fields, and what is left open resolved.

Imports no torch, ray or mlflow: a bad configuration is refused in milliseconds. ``build`` makes a Config from dotted overrides
(the one path for recipes, flags and sweeps), ``resolve`` turns every ``auto`` that the configuration alone decides into a value.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

from rotssl.config import sections
from rotssl.config.fields import ConfigError, convert, nearest
from rotssl.config.methods import METHODS, MethodConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    data: sections.DataConfig = field(default_factory=sections.DataConfig)
    views: sections.ViewsConfig = field(default_factory=sections.ViewsConfig)
    encoder: sections.EncoderConfig = field(default_factory=sections.EncoderConfig)
    model: sections.ModelConfig = field(default_factory=sections.ModelConfig)
    method: MethodConfig = field(default_factory=METHODS["byol"].config)
    rotation: sections.RotationConfig = field(default_factory=sections.RotationConfig)
    jigsaw: sections.JigsawConfig = field(default_factory=sections.JigsawConfig)
    tasks: sections.TasksConfig = field(default_factory=sections.TasksConfig)
    optim: sections.OptimConfig = field(default_factory=sections.OptimConfig)
    train: sections.TrainConfig = field(default_factory=sections.TrainConfig)
    scaling: sections.ScalingConfig = field(default_factory=sections.ScalingConfig)
    evaluation: sections.EvaluationConfig = field(default_factory=sections.EvaluationConfig)
    tracking: sections.TrackingConfig = field(default_factory=sections.TrackingConfig)
    storage: sections.StorageConfig = field(default_factory=sections.StorageConfig)

    @property
    def run_dir(self) -> Path:
        """Folder of this run: its identity on disk. Only after ``resolve``."""
        assert self.storage.path is not None and self.tracking.run_name is not None
        return Path(self.storage.path) / self.tracking.experiment / self.tracking.run_name


# Not part of what a run computes: they may change between a start and the next.
NOT_IDENTITY = ("tracking.", "storage.", "scaling.", "train.stop_after", "data.download", "data.store", "data.cache")
# These may as well, and it is said: how it is computed, what is measured beside it, and where the same images are.
MAY_CHANGE = (
    *("evaluation.knn_every", "evaluation.knn_bf16", "evaluation.linear", "tasks.log_gradients_every"),
    *("train.compile", "train.accumulate", "data.root"),
)


def fields_of(section: str, cls: type) -> dict[str, tuple[Any, dataclasses.Field[Any]]]:
    """Dotted name -> (type, field) of a section's fields."""
    hints = get_type_hints(cls)
    return {f"{section}.{f.name}": (hints[f.name], f) for f in dataclasses.fields(cls)}


@functools.cache  # typing takes a millisecond to tell what the types are, which flags and sweeps ask for again and again
def schema(method: str = "byol") -> Mapping[str, tuple[Any, dataclasses.Field[Any]]]:
    """Dotted name -> (type, field) of every field, with the fields of the given method."""
    classes = get_type_hints(Config) | {"method": METHODS[method].config}
    parts = ((section.name, classes[section.name]) for section in dataclasses.fields(Config))
    return MappingProxyType({key: spec for part in parts for key, spec in fields_of(*part).items()})


def build(overrides: Mapping[str, Any]) -> Config:
    """A Config from dotted overrides, values as text or as YAML gives them.

    Raises:
        ConfigError: unknown field, wrong type or out of bounds, fields that do not go together.
    """
    name = overrides.get("method.name", "byol")
    if not isinstance(name, str) or name not in METHODS:
        raise ConfigError(
            f"method.name: got {name!r}, expected one of {', '.join(METHODS)}{nearest(str(name), METHODS)}"
        )
    known = schema(name)
    values: dict[str, dict[str, Any]] = {section.name: {} for section in dataclasses.fields(Config)}
    for key, value in overrides.items():
        if key not in known:
            other = [m for m in METHODS if key in schema(m)]
            why = f"; it is a field of {', '.join(other)}, not of {name}" if other else nearest(key, known)
            raise ConfigError(f"{key}: no such field{why}")
        hint, spec = known[key]
        section, leaf = key.split(".")
        values[section][leaf] = convert(key, value, hint, spec.metadata["bounds"])
    hints = get_type_hints(Config)
    sections: dict[str, Any] = {
        section: (METHODS[name].config if section == "method" else hints[section])(**given)
        for section, given in values.items()
    }
    config = Config(**sections)
    _check(config)
    return config


def _require(condition: bool, key: str, given: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{key}: got {given}, expected {expected}")


def _check(c: Config) -> None:
    """The rules between fields."""
    _check_data(c.data)
    _check_views(c)
    _check_encoder(c.encoder)
    _check_tasks(c)
    _check_training(c)
    _check_results(c)
    if c.scaling.num_workers != "auto":
        check_workers(c, int(c.scaling.num_workers))


def _check_data(data: sections.DataConfig) -> None:
    name = data.name
    expected = "a folder of images" if name == "imagefolder" else f"the folder that holds {name}"
    _require(name in sections.WITHOUT_ROOT or data.root is not None, "data.root", None, expected)
    downloaded = name in sections.DOWNLOADED
    _require(downloaded or not data.download, "data.download", "true", f"false: {name} is not downloaded")
    whole = downloaded or name in sections.WITHOUT_ROOT
    _require(not whole or data.store != "disk", "data.store", "disk", f"auto or memory: {name} is read as a whole")


def _check_views(c: Config) -> None:
    views, name = c.views, c.method.name
    scales = {
        "views.global_scale": views.global_scale,
        "views.local_scale": views.local_scale,
        "rotation.crop_scale": c.rotation.crop_scale,
    }
    for key, (low, high) in scales.items():
        _require(low <= high, key, f"({low}, {high})", "the smaller share first")
    count = views.global_count
    for key, values in (("blur", views.blur), ("solarize", views.solarize)):
        expected = f"one, or one for each of {count} views"
        _require(len(values) in (1, count), f"views.{key}", f"{len(values)} values", expected)
    _require(views.jitter[3] <= 0.5, "views.jitter", f"a hue of {views.jitter[3]}", "a hue of at most 0.5")
    takers = [m for m, spec in METHODS.items() if spec.multi_crop]
    fits = views.local_count == 0 or METHODS[name].multi_crop
    _require(
        fits, "views.local_count", views.local_count, f"0: local views are for {', '.join(takers)}, not for {name}"
    )
    fits = count == 2 or not METHODS[name].two_views
    _require(fits, "views.global_count", count, f"2: {name} is made for two")


def _check_encoder(encoder: sections.EncoderConfig) -> None:
    known, timm = ("small", *sections.RESNETS), encoder.name.startswith("timm/")
    expected = f"one of {', '.join(known)}, or timm/NAME{nearest(encoder.name, known)}"
    _require(timm or encoder.name in known, "encoder.name", repr(encoder.name), expected)
    for key in ("patch_size", "drop_path"):
        value, default = getattr(encoder, key), getattr(sections.EncoderConfig, key)
        _require(timm or value == default, f"encoder.{key}", value, f"{default}: it is for timm's encoders")
    if timm:
        _require(encoder.stem != "cifar", "encoder.stem", "cifar", "imagenet or auto: timm's encoders keep their stem")
        _require(not encoder.zero_init, "encoder.zero_init", "true", "false: timm's encoders start as timm has them")


def _check_tasks(c: Config) -> None:
    rotation, jigsaw = c.rotation, c.jigsaw
    modes = {"views": ("extra",), "resolution": ("extra",), "joint": ("extra",), "update_bn": ("extra", "four_way")}
    modes["angles"] = ("in_place",)
    for key, takes in modes.items():
        given, value = getattr(rotation, key), getattr(sections.RotationConfig, key)
        fits = rotation.mode in takes or given == value or rotation.weight == 0
        expected = f"{value} in mode {rotation.mode}; it is for rotation.mode {' and '.join(takes)}"
        _require(fits, f"rotation.{key}", given, expected)
    fits = rotation.update_bn or not rotation.joint or rotation.weight == 0
    _require(fits, "rotation.update_bn", "false", "true: with rotation.joint there is one pass for all views")
    orders = math.factorial(jigsaw.grid**2)
    most = f"at most {orders}, the orders of {jigsaw.grid**2} tiles"
    _require(jigsaw.permutations <= orders, "jigsaw.permutations", jigsaw.permutations, most)


def _check_training(c: Config) -> None:
    train, optim, epochs = c.train, c.optim, c.train.epochs
    most = f"at most train.epochs ({epochs})"
    _require(train.stop_after is None or train.stop_after <= epochs, "train.stop_after", train.stop_after, most)
    _require(optim.warmup_epochs <= epochs, "optim.warmup_epochs", optim.warmup_epochs, most)
    for key in ("warmup_lr", "final_lr"):
        value = getattr(optim, key)
        _require(value == 0 or optim.lr != "auto", f"optim.{key}", value, "0 with lr auto")
        _require(optim.lr == "auto" or value <= optim.lr, f"optim.{key}", value, f"at most optim.lr ({optim.lr})")
    _require(optim.lr != "auto" or optim.lr_scale == "none", "optim.lr_scale", optim.lr_scale, "none with lr auto")
    means = [m for m, spec in METHODS.items() if spec.per_image]
    expected = f"1: the loss of {c.method.name} is no mean over images (a batch can be cut up for {', '.join(means)})"
    _require(train.accumulate == 1 or c.method.name in means, "train.accumulate", train.accumulate, expected)


def _check_results(c: Config) -> None:
    for key in ("experiment", "run_name"):
        value = getattr(c.tracking, key)
        bad = value is not None and (value in (".", "..") or any(ch in value for ch in "/\\\0\n"))
        _require(not bad, f"tracking.{key}", repr(value), "a name without slashes, fit for a folder")
    path = c.storage.path
    if path is not None:
        _require("://" not in path, "storage.path", repr(path), "a folder on a file system that every node sees")
        odd = any(ch in path for ch in "?#\0")
        _require(
            not odd, "storage.path", repr(path), "a path without ? and #, which mean something in MLflow's address"
        )


def check_workers(c: Config, num_workers: int) -> None:
    """The rules that the number of workers brings."""
    workers, batch, parts = max(1, num_workers), c.train.batch_size, c.train.accumulate
    passes = f"the {workers} workers" + (f" x {parts} passes" if parts > 1 else "")
    _require(batch % (workers * parts) == 0, "train.batch_size", batch, f"a multiple of {passes}")
    each = batch // (workers * parts)
    _require(each >= 2, "train.batch_size", batch, f"at least 2 images for each of {passes}")
    expected = f"at least {2 / each:g}: two rotated images a worker and step"
    for key, stays in (("fraction", ""), ("fraction_end", ", or none: the share stays")):
        share = getattr(c.rotation, key)
        open_ = c.rotation.weight == 0 or share in (None, "auto")
        enough = open_ or int(each * share) >= 2  # the head normalises over them
        _require(enough, f"rotation.{key}", share, expected + stays)


def unshared(c: Config, num_workers: int) -> str:
    """What keeps so many workers from sharing the batch, in a line; empty if nothing does."""
    try:
        check_workers(c, num_workers)
    except ConfigError as error:
        return str(error)
    return ""


def replace(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with some dotted fields set to values of the right type."""
    for key, value in values.items():
        section, leaf = key.split(".")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{leaf: value})}
        )
    return config


def default_storage() -> str:
    """Where results go if nobody says otherwise; the folder that a Ray job runs in is a temporary one."""
    return "~/rotssl-results" if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") else "results"


def resolve(config: Config, image_size: int, train_size: int) -> Config:
    """Turn what was left open into values: image size, stem, optimizer, learning rate, paths, run name.

    What depends on the device (precision, layout, number of workers) stays ``auto`` here and is recorded as a tag of the run.

    Args:
        config: as built.
        image_size: native side of the stored images in pixels, for ``data.image_size auto``.
        train_size: number of training images.
    """
    spec, batch = METHODS[config.method.name], config.train.batch_size
    _require(batch <= train_size, "train.batch_size", batch, f"at most the {train_size} training images")
    side = image_size if config.data.image_size == "auto" else config.data.image_size
    stem = config.encoder.stem
    if stem == "auto":
        stem = "cifar" if config.encoder.name in sections.RESNETS and side <= 64 else "imagenet"
    optimizer = spec.optimizer if config.optim.name == "auto" else config.optim.name
    scale = {"none": 1.0, "linear": batch / 256, "sqrt": (batch / 256) ** 0.5}
    optim, factor = config.optim, scale[config.optim.lr_scale]
    if optim.lr == "auto":
        if optimizer != spec.optimizer:
            raise ConfigError(
                f"optim.lr: got 'auto', expected a number: {spec.config.__name__} has a rate for {spec.optimizer} only"
            )
        lr = spec.lr * scale["linear"]
    else:
        lr = optim.lr * factor
    crop = max(4, side // 2) if side <= 64 else _part(side)
    config = replace(
        config,
        {
            "data.image_size": side,
            "data.root": None if config.data.root is None else os.path.abspath(os.path.expanduser(config.data.root)),
            "data.cache": None if config.data.cache is None else os.path.abspath(os.path.expanduser(config.data.cache)),
            "encoder.stem": stem,
            "optim.name": optimizer,
            "optim.lr": lr,
            "optim.warmup_lr": optim.warmup_lr * factor,
            "optim.final_lr": optim.final_lr * factor,
            "optim.lr_scale": "none",
            "views.local_size": _part(side) if config.views.local_size == "auto" else config.views.local_size,
            "rotation.crop_size": crop if config.rotation.crop_size == "auto" else config.rotation.crop_size,
            "rotation.fraction_end": _fraction_end(config),
            **_fit_to_data(config, train_size),
        },
    )
    if config.scaling.num_workers != "auto":
        check_workers(config, config.scaling.num_workers)
    uri = config.tracking.uri
    if uri is not None and uri.startswith("sqlite:///"):  # workers run in another folder
        uri = f"sqlite:///{os.path.abspath(uri.removeprefix('sqlite:///'))}"
    path = os.path.abspath(os.path.expanduser(config.storage.path or default_storage()))
    run_name = config.tracking.run_name or f"{config.method.name}-{config.data.name}-{fingerprint(config)}"
    return replace(config, {"storage.path": path, "tracking.run_name": run_name, "tracking.uri": uri})


def _fraction_end(config: Config) -> float | None:
    """Of ``auto``: what benchmarks/rotation_variants.py found best, and no less than leaves 16 rotated images in a step."""
    rotation, images = config.rotation, config.train.batch_size
    if rotation.fraction_end != "auto":
        return rotation.fraction_end
    falls = rotation.mode == "in_place" and rotation.angles == "shared" and rotation.fraction == 1
    return max(0.125, 16 / images) if falls and images > 16 else None


def _part(side: int) -> int:
    """The 96 pixels that go with 224."""
    return max(4, round(side * 3 / 7))


def _fit_to_data(config: Config, train_size: int) -> dict[str, int]:
    """Queues and prototypes, no more of them than training images."""
    fitted: dict[str, int] = {}
    for leaf in ("queue_size", "prototypes"):
        value = getattr(config.method, leaf, 0)
        fitted |= {f"method.{leaf}": train_size} if value > train_size else {}
    queue, batch = getattr(config.method, "queue_size", 0), config.train.batch_size
    _require(queue == 0 or queue >= batch, "method.queue_size", queue, f"at least train.batch_size ({batch})")
    return fitted


def cut_down(asked: Config, resolved: Config) -> list[str]:
    """What ``resolve`` had to make smaller, in lines to print."""
    before, after = flat(asked), flat(resolved)
    cut = [key for key in ("method.queue_size", "method.prototypes") if before.get(key) != after.get(key)]
    return [f"{key}: {after[key]} in place of {before[key]}: there are no more training images" for key in cut]


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Nested plain values, as a recipe would hold them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))  # type: ignore[no-any-return]


def flat_dict(nested: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Dotted name -> value, from sections."""
    return {f"{section}.{leaf}": value for section, values in nested.items() for leaf, value in values.items()}


def flat(config: Config) -> dict[str, Any]:
    """Dotted name -> value."""
    return flat_dict(to_dict(config))


def described(config: Config) -> dict[str, Any]:
    """The fields that say what a run computes and measures."""
    return {key: value for key, value in flat(config).items() if not key.startswith(NOT_IDENTITY)}


def later_defaults(config: Config) -> dict[str, Any]:
    """Fields that came later than some runs, with their defaults, which those runs did."""
    return {key: spec.default for key, (_, spec) in schema(config.method.name).items() if spec.metadata["later"]}


def identity(config: Config) -> dict[str, Any]:
    """The fields that a run is recorded with, but for those of ``later_defaults`` that have these values.

    A run goes on only under the same ones, apart from those of ``MAY_CHANGE``.
    """
    late = later_defaults(config)
    return {key: value for key, value in described(config).items() if key not in late or value != late[key]}


def fingerprint(config: Config) -> str:
    """Eight hexadecimal digits of what a run computes, on which images.

    Fields of ``MAY_CHANGE`` count as their defaults, so that a run without a name of its own goes on when they change; but
    ``data.root`` counts, as another folder mostly holds other images.
    """
    known, decisive = schema(config.method.name), identity(config)
    decisive |= {key: known[key][1].default for key in MAY_CHANGE if key != "data.root"}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]
