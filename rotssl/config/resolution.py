"""Building and resolving the configuration of a run.

``build`` makes a Config from dotted overrides (the one path for recipes, flags and sweeps). ``resolve`` replaces every ``auto``
that depends only on the configuration and the data by a value. Imports no torch, ray or mlflow.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, get_type_hints

from rotssl.config import sections
from rotssl.config.fields import ConfigError, convert, nearest, require
from rotssl.config.identity import fingerprint, flat, flat_dict, replace
from rotssl.config.methods import METHODS
from rotssl.config.resolved import ResolvedConfig, narrowed
from rotssl.config.rules import check, check_workers
from rotssl.config.sections import Config, schema
from rotssl.config.tasks import TASKS, part_of
from rotssl.config.views import SMALLEST


def build(overrides: Mapping[str, Any]) -> Config:
    """A Config from dotted overrides, whose values are text or as parsed by YAML.

    Raises:
        ConfigError: a field is unknown, or a value has the wrong type, is out of bounds or conflicts with another field.
    """
    name = overrides.get("method.name", "byol")
    if not isinstance(name, str) or name not in METHODS:
        raise ConfigError(
            f"method.name: got {name!r}, expected one of {', '.join(METHODS)}{nearest(str(name), METHODS)}"
        )
    # A share without a weight asks for the weight that it sets.
    shares = {f"{task}.weight": "auto" for task in TASKS if f"{task}.share" in overrides}
    overrides = shares | dict(overrides)
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
    made: dict[str, Any] = {
        section: (METHODS[name].config if section == "method" else hints[section])(**given)
        for section, given in values.items()
    }
    config = Config(**made)
    check(config)
    return config


def default_storage() -> str:
    """The default folder for results; inside a Ray job it is in the home folder, because the working directory is temporary."""
    return "~/rotssl-results" if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") else "results"


def resolve(config: Config, image_size: int, train_size: int) -> ResolvedConfig:
    """Resolve open fields to values: image size, stem, optimizer, learning rate, paths, run name.

    Fields that depend on the machine (precision, layout, number of workers) stay ``auto``; a tag of the run records them. With
    ``train.budget`` the length is 1 epoch, until a start of the run has chosen it.

    Args:
        config: from ``build``.
        image_size: native side of the stored images in pixels, used for ``data.image_size auto``.
        train_size: number of training images.
    """
    budget, name = config.train.budget, config.method.name
    if budget is not None:  # a placeholder, so that the name does not depend on the length that is chosen
        config = replace(config, {"train.epochs": 1})
    batch = config.train.batch_size
    require(batch <= train_size, "train.batch_size", batch, f"at most the {train_size} training images")
    side = image_size if config.data.image_size == "auto" else config.data.image_size
    even = config.views.split == 1 or side % 2 == 0
    require(even, "data.image_size", side, "an even side: views.split 2 halves it")
    steps = train_size // batch * config.train.epochs
    stem = config.encoder.stem
    if stem == "auto":
        stem = "cifar" if config.encoder.name in sections.RESNETS and side <= 64 else "imagenet"
    config = replace(
        config,
        {
            "data.image_size": side,
            "data.root": config.data.root and _absolute(config.data.root),
            "data.cache": config.data.cache and _absolute(config.data.cache),
            "train.init_from": config.train.init_from and _absolute(config.train.init_from),
            "encoder.stem": stem,
            **_rates(config),
            "views.size_start": _first_side(config.views.size_start, side),
            "views.local_size": part_of(side) if config.views.local_size == "auto" else config.views.local_size,
            **{
                f"{task}.{leaf}": value
                for task in TASKS
                for leaf, value in getattr(config, task).resolve(side, batch).items()
            },
            **{f"method.{leaf}": value for leaf, value in config.method.resolve(steps).items()},
            **_fit_to_data(config, train_size),
        },
    )
    if config.scaling.num_workers != "auto":
        check_workers(config, config.scaling.num_workers)
    uri = config.tracking.uri
    if uri is not None and uri.startswith("sqlite:///"):  # workers run in another folder
        uri = f"sqlite:///{os.path.abspath(uri.removeprefix('sqlite:///'))}"
    path = _absolute(config.storage.path or default_storage())
    minutes = "" if budget is None else f"-{budget:g}min"
    run_name = config.tracking.run_name or f"{name}-{config.data.name}{minutes}-{fingerprint(config)}"
    return _with_text(replace(config, {"storage.path": path, "tracking.run_name": run_name, "tracking.uri": uri}))


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def _first_side(start: float | None, side: int) -> int | None:
    """Side of the views at the start of the run, in pixels; of a share the nearest even one."""
    if start is not None and start < 1:
        start = min(side, max(SMALLEST, 2 * round(side * start / 2)))
    require(start is None or start <= side, "views.size_start", start, f"at most data.image_size ({side})")
    return None if start is None else int(start)


def _rates(config: Config) -> dict[str, Any]:
    """Optimizer, learning rates and warm-up."""
    spec, optim, batch = METHODS[config.method.name], config.optim, config.train.batch_size
    optimizer = spec.optimizer if optim.name == "auto" else optim.name
    scale = {"none": 1.0, "linear": batch / 256, "sqrt": (batch / 256) ** 0.5}
    factor, lr, warmup = scale[optim.lr_scale], optim.lr, optim.warmup_epochs
    if lr == "auto" and optimizer != spec.optimizer:
        name = config.method.name
        raise ConfigError(
            f"optim.lr: got 'auto', expected a number: {name} has a default rate for {spec.optimizer} only"
        )
    return {
        "optim.name": optimizer,
        "optim.lr": spec.lr * scale["linear"] if lr == "auto" else lr * factor,
        "optim.warmup_epochs": min(10.0, max(1.0, config.train.epochs / 10)) if warmup == "auto" else warmup,
        "optim.warmup_lr": optim.warmup_lr * factor,
        "optim.final_lr": optim.final_lr * factor,
        "optim.lr_scale": "none",
    }


def _with_text(config: Config) -> ResolvedConfig:
    """The resolved config; a path with bytes that are no text is refused: Python has surrogates for them, MLflow and YAML not."""
    for key, value in flat(config).items():
        broken = isinstance(value, str) and any("\ud800" <= sign <= "\udfff" for sign in value)
        require(not broken, key, repr(value), "a name in UTF-8: rename the folder or use another")
    return narrowed(config)


def from_dict(content: Mapping[str, Mapping[str, Any]]) -> ResolvedConfig:
    """The resolved configuration that ``to_dict`` turned into plain values."""
    return narrowed(build(flat_dict(content)))


def _fit_to_data(config: Config, train_size: int) -> dict[str, int]:
    """Sizes of queues and prototypes, reduced to the number of training images."""
    fitted: dict[str, int] = {}
    for leaf in ("queue_size", "prototypes"):
        value = getattr(config.method, leaf, 0)
        fitted |= {f"method.{leaf}": train_size} if value > train_size else {}
    queue, batch = getattr(config.method, "queue_size", 0), config.train.batch_size
    require(queue == 0 or queue >= batch, "method.queue_size", queue, f"at least train.batch_size ({batch})")
    return fitted


def cut_down(asked: Config, resolved: Config) -> list[str]:
    """Lines to print about the sizes that ``resolve`` had to reduce."""
    before, after = flat(asked), flat(resolved)
    cut = [key for key in ("method.queue_size", "method.prototypes") if before.get(key) != after.get(key)]
    return [f"{key}: reduced from {before[key]} to {after[key]}, the number of training images" for key in cut]
