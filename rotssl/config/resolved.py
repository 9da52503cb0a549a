"""The resolved configuration: sections with narrower types, in which everything that a run needs is set."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_type_hints

from rotssl.base.paths import AnyPath, at
from rotssl.config.fields import ConfigError
from rotssl.config.sections import (
    Config,
    DataConfig,
    EncoderConfig,
    OptimConfig,
    StorageConfig,
    TrackingConfig,
)
from rotssl.config.tasks import RotationConfig
from rotssl.config.views import ViewsConfig


@dataclass(frozen=True, kw_only=True)
class ResolvedData(DataConfig):
    """The data section with a known side of the views."""

    image_size: int


@dataclass(frozen=True, kw_only=True)
class ResolvedViews(ViewsConfig):
    """The views section with known sides of the first views and of the local ones."""

    size_start: int | None
    local_size: int


@dataclass(frozen=True, kw_only=True)
class ResolvedEncoder(EncoderConfig):
    """The encoder section with a chosen stem."""

    stem: Literal["imagenet", "cifar"]


@dataclass(frozen=True, kw_only=True)
class ResolvedRotation(RotationConfig):
    """The rotation section with a known crop size and known shares of rotated images (at the end None: constant)."""

    crop_size: int
    fraction: float
    fraction_end: float | None


@dataclass(frozen=True, kw_only=True)
class ResolvedOptim(OptimConfig):
    """The optim section with a chosen optimizer, a numeric learning rate and the length of its warm-up."""

    name: Literal["sgd", "lars", "adamw"]
    lr: float
    warmup_epochs: float


@dataclass(frozen=True, kw_only=True)
class ResolvedTracking(TrackingConfig):
    """The tracking section with a run name."""

    run_name: str


@dataclass(frozen=True, kw_only=True)
class ResolvedStorage(StorageConfig):
    """The storage section with an absolute path."""

    path: str


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(Config):
    """One run, ready to start. Fields that depend on the machine (workers, precision, layout) may still be ``auto``."""

    data: ResolvedData
    views: ResolvedViews
    encoder: ResolvedEncoder
    rotation: ResolvedRotation
    optim: ResolvedOptim
    tracking: ResolvedTracking
    storage: ResolvedStorage

    @property
    def run_dir(self) -> AnyPath:
        """Folder of this run, which identifies it on disk."""
        return at(self.storage.path) / self.tracking.experiment / self.tracking.run_name


NARROWED = {name: kind for name, kind in get_type_hints(ResolvedConfig).items() if kind.__name__.startswith("Resolved")}


def narrowed(config: Config) -> ResolvedConfig:
    """The same configuration as a ResolvedConfig.

    Raises:
        ConfigError: a field is not resolved.
    """
    parts = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for name, kind in NARROWED.items():
        for key in kind.__annotations__:
            value = getattr(parts[name], key)
            if value == "auto" or (
                value is None and type(None) not in getattr(kind.__annotations__[key], "__args__", ())
            ):
                raise ConfigError(f"{name}.{key}: got {value}, expected a resolved value")
        parts[name] = kind(**vars(parts[name]))
    return ResolvedConfig(**parts)
