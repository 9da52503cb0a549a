"""The identity of a run: its fields as plain values, which of them determine what it computes, and their hash."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from rotssl.config import sections
from rotssl.config.sections import Config, schema
from rotssl.config.tasks import TASKS

# These do not affect what a run computes and may change between starts.
NOT_IDENTITY = (
    *("tracking.", "storage.", "scaling.", "data.download", "data.store", "data.cache"),
    *(f"train.{leaf}" for leaf in ("stop_after", "budget", "save_minutes", "save_every", "keep_every")),
    *("train.on_collapse", "train.max_skipped", "evaluation.protocols"),
)

# These may change too, but the change is reported: how it is computed, what else is measured, and where the images are.
MAY_CHANGE = (
    *("evaluation.knn_every", "evaluation.knn_bf16", "evaluation.linear", "tasks.log_gradients_every"),
    *("train.compile", "train.accumulate", "data.root"),
)

AnyConfig = TypeVar("AnyConfig", bound=Config)


def replace(config: AnyConfig, values: Mapping[str, Any]) -> AnyConfig:
    """A copy of the config with some dotted fields set to values of the right type."""
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
    """The fields that determine what a run computes and measures."""
    return {key: value for key, value in flat(config).items() if not key.startswith(NOT_IDENTITY)}


def later_defaults(config: Config) -> dict[str, Any]:
    """Fields that were added after some runs had been recorded, with the defaults that describe those runs."""
    late = [name for name, task in TASKS.items() if task.later]
    known = schema(config.method.name).items()
    late_fields = {key: f.default for key, (_, f) in known if f.metadata["later"] or key.split(".")[0] in late}
    return json.loads(json.dumps(late_fields))  # type: ignore[no-any-return]  # as values are recorded


def identity_of(config: Config) -> dict[str, Any]:
    """The fields a run is recorded with, except those of ``later_defaults`` at their default values.

    A run resumes only if all of them are unchanged, except those of ``MAY_CHANGE``.
    """
    late = later_defaults(config)
    return {key: value for key, value in described(config).items() if key not in late or value != late[key]}


def changes(recorded: Mapping[str, Any], config: Config) -> list[tuple[str, Any, Any]]:
    """Fields that determine what a run computes and that are not as recorded: name, value then, value now.

    Args:
        recorded: dotted name -> value; of an earlier version, it may lack fields that were added later.
        config: the configuration now.
    """
    ours, late = identity_of(config), later_defaults(config)
    theirs = {key: value for key, value in recorded.items() if not key.startswith(NOT_IDENTITY)}
    pairs = ((key, theirs.get(key, late.get(key)), ours.get(key, late.get(key))) for key in sorted(ours | theirs))
    return [(key, before, now) for key, before, now in pairs if before != now]


def fingerprint(config: Config) -> str:
    """A hash of eight hexadecimal digits of what a run computes, and on which images.

    Fields of ``MAY_CHANGE`` are replaced by their defaults, so that a run without an explicit name resumes when they change;
    ``data.root`` is kept, because another folder usually holds other images.
    """
    known, decisive = schema(config.method.name), identity_of(config)
    decisive |= {key: known[key][1].default for key in MAY_CHANGE if key != "data.root"}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]


def is_baseline(config: Config) -> bool:
    """Whether a configuration has no auxiliary task."""
    return not config.active()


def canonical(config: AnyConfig) -> AnyConfig:
    """The config with the fields of inactive tasks reset to their defaults, so that equivalent runs share one identity."""
    off: dict[str, Any] = {}
    for name, spec in TASKS.items():
        section = getattr(config, name)
        if not section.on:
            off |= {f"{name}.{leaf}": value for leaf, value in vars(spec.config(weight=0.0)).items()}
    if is_baseline(config):
        off |= {f"tasks.{leaf}": value for leaf, value in vars(sections.TasksConfig()).items()}
    return replace(config, off)


def run_name(config: Config) -> str:
    """Name of a trial: its most important settings and the hash of its resolved configuration."""
    own = {name: getattr(config, name) for name in TASKS}
    tasks = "".join(
        f"-{name}{f'-share{section.share:g}' if section.weight == 'auto' else f'{section.weight:g}'}"
        for name, section in own.items()
        if section.on or name == next(iter(TASKS))  # so that a baseline's name says which task it is the baseline of
    )
    train = config.train
    return f"{config.method.name}{tasks}-{train.epochs}ep-seed{train.seed}-{fingerprint(config)}"
