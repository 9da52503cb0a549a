"""A configuration in which nothing that a run must know is open any more: its sections have narrower types."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_type_hints

from rotssl.config.fields import ConfigError
from rotssl.config.sections import (
    Config,
    DataConfig,
    EncoderConfig,
    OptimConfig,
    StorageConfig,
    TrackingConfig,
    ViewsConfig,
)
from rotssl.config.tasks import RotationConfig


@dataclass(frozen=True, kw_only=True)
class ResolvedData(DataConfig):
    """The side of the views is known."""

    image_size: int


@dataclass(frozen=True, kw_only=True)
class ResolvedViews(ViewsConfig):
    """The side of the local views is known."""

    local_size: int


@dataclass(frozen=True, kw_only=True)
class ResolvedEncoder(EncoderConfig):
    """The stem is chosen."""

    stem: Literal["imagenet", "cifar"]


@dataclass(frozen=True, kw_only=True)
class ResolvedRotation(RotationConfig):
    """The share of rotated images at the end is known, or stays (None)."""

    crop_size: int
    fraction_end: float | None


@dataclass(frozen=True, kw_only=True)
class ResolvedOptim(OptimConfig):
    """The optimizer is chosen, and its rate is one."""

    name: Literal["sgd", "lars", "adamw"]
    lr: float


@dataclass(frozen=True, kw_only=True)
class ResolvedTracking(TrackingConfig):
    """The run has a name."""

    run_name: str


@dataclass(frozen=True, kw_only=True)
class ResolvedStorage(StorageConfig):
    """The run has a place: an absolute path."""

    path: str


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(Config):
    """One run, ready to be started. What depends on the machine (workers, precision, layout) may be ``auto`` still."""

    data: ResolvedData
    views: ResolvedViews
    encoder: ResolvedEncoder
    rotation: ResolvedRotation
    optim: ResolvedOptim
    tracking: ResolvedTracking
    storage: ResolvedStorage

    @property
    def run_dir(self) -> Path:
        """Folder of this run: its identity on disk."""
        return Path(self.storage.path) / self.tracking.experiment / self.tracking.run_name


NARROWED = {name: kind for name, kind in get_type_hints(ResolvedConfig).items() if kind.__name__.startswith("Resolved")}


def narrowed(config: Config) -> ResolvedConfig:
    """The same configuration, of which everything is known to be resolved.

    Raises:
        ConfigError: something is not.
    """
    parts = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for name, kind in NARROWED.items():
        for key in kind.__annotations__:
            value = getattr(parts[name], key)
            if value == "auto" or (
                value is None and type(None) not in getattr(kind.__annotations__[key], "__args__", ())
            ):
                raise ConfigError(f"{name}.{key}: got {value}, expected what a resolved configuration has")
        parts[name] = kind(**vars(parts[name]))
    return ResolvedConfig(**parts)
