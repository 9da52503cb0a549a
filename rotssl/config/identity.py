"""What a run is known by: its fields as plain values, which of them decide what it computes, and their hash."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from rotssl.config import sections
from rotssl.config.sections import Config, schema
from rotssl.config.tasks import TASKS

# Not part of what a run computes: they may change between a start and the next.
NOT_IDENTITY = ("tracking.", "storage.", "scaling.", "train.stop_after", "data.download", "data.store", "data.cache")

# These may as well, and it is said: how it is computed, what is measured beside it, and where the same images are.
MAY_CHANGE = (
    *("evaluation.knn_every", "evaluation.knn_bf16", "evaluation.linear", "tasks.log_gradients_every"),
    *("train.compile", "train.accumulate", "data.root"),
)

AnyConfig = TypeVar("AnyConfig", bound=Config)


def replace(config: AnyConfig, values: Mapping[str, Any]) -> AnyConfig:
    """The config with some dotted fields set to values of the right type."""
    for key, value in values.items():
        section, leaf = key.split(".")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{leaf: value})}
        )
    return config


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
    late = [name for name, task in TASKS.items() if task.later]
    known = schema(config.method.name).items()
    late_fields = {key: f.default for key, (_, f) in known if f.metadata["later"] or key.split(".")[0] in late}
    return json.loads(json.dumps(late_fields))  # type: ignore[no-any-return]  # as values are recorded


def identity_of(config: Config) -> dict[str, Any]:
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
    known, decisive = schema(config.method.name), identity_of(config)
    decisive |= {key: known[key][1].default for key in MAY_CHANGE if key != "data.root"}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]


def is_baseline(config: Config) -> bool:
    """Whether a configuration has no auxiliary task."""
    return not config.active()


def canonical(config: AnyConfig) -> AnyConfig:
    """The same run with the fields of switched-off tasks at their defaults: runs that don't differ have one identity."""
    off: dict[str, Any] = {}
    for name, spec in TASKS.items():
        if getattr(config, name).weight == 0:
            off |= {f"{name}.{leaf}": value for leaf, value in vars(spec.config(weight=0.0)).items()}
    if is_baseline(config):
        off |= {f"tasks.{leaf}": value for leaf, value in vars(sections.TasksConfig()).items()}
    return replace(config, off)


def run_name(config: Config) -> str:
    """Name of a trial: what matters most for the eye, and the hash of its resolved configuration."""
    tasks = "".join(
        f"-{name}{getattr(config, name).weight:g}"
        for name in TASKS
        if name in config.active() or name == next(iter(TASKS))  # so that a baseline's name says what it is one for
    )
    train = config.train
    return f"{config.method.name}{tasks}-{train.epochs}ep-seed{train.seed}-{fingerprint(config)}"
