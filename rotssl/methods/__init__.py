"""The registry of methods: their configuration, where their code lives, and the optimizer that suits them.

This file imports no torch, so that a configuration can be checked in milliseconds. To add a method: a file with a ``Method``
subclass beside this one, its config and its entry here, and a recipe.
"""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rotssl.fields import opt

if TYPE_CHECKING:
    from rotssl.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Fields that every method has."""

    name: str = opt("byol", "Method of instance similarity.")
    hidden_dim: int = opt(
        512, "Width of the projector's hidden layer (and of the predictor's, where there is one).", ge=1
    )
    out_dim: int = opt(128, "Dimension of the projector's output.", ge=1)


@dataclass(frozen=True, kw_only=True)
class ByolConfig(MethodConfig):
    """BYOL, Grill et al. 2020 (arXiv 2006.07733)."""

    name: str = opt("byol", "Method of instance similarity.")
    momentum: float = opt(0.99, "Teacher's EMA momentum at the start; it rises to 1 along a cosine.", ge=0, le=1)


@dataclass(frozen=True, kw_only=True)
class SimclrConfig(MethodConfig):
    """SimCLR, Chen et al. 2020 (arXiv 2002.05709)."""

    name: str = opt("simclr", "Method of instance similarity.")
    temperature: float = opt(0.2, "Temperature of the softmax over similarities.", gt=0)


@dataclass(frozen=True)
class MethodSpec:
    """What the registry holds of one method. ``lr`` is the peak at a batch of 256, for ``optimizer``."""

    config: type[MethodConfig]
    target: str
    optimizer: str
    lr: float

    def load(self) -> "type[Method]":
        """Import the method's class (and with it torch)."""
        module, name = self.target.split(":")
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


METHODS: dict[str, MethodSpec] = {
    "byol": MethodSpec(ByolConfig, "rotssl.methods.byol:BYOL", "sgd", 0.24),
    "simclr": MethodSpec(SimclrConfig, "rotssl.methods.simclr:SimCLR", "sgd", 0.06),
}
