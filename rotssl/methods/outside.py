"""Methods from other packages. Their code is loaded and built once before a run starts, so that a mistake is one line."""

import functools

import torch

from rotssl.base.errors import in_a_line
from rotssl.config.fields import ConfigError
from rotssl.config.methods import METHODS, MethodConfig
from rotssl.methods.base import Method

_DIM = 16  # of the features in the trial


def load(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        ConfigError: it can't be imported here, or is not a complete subclass of Method.
    """
    target = METHODS[name].target
    try:
        found = METHODS[name].load()
    except Exception as error:  # of any kind: importing runs code that is not ours
        raise ConfigError(f"method {name}: {target} cannot be imported ({in_a_line(error)})") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ConfigError(f"method {name}: {target} is not a subclass of rotssl.Method")
    if lacks := ", ".join(sorted(found.__abstractmethods__)):
        raise ConfigError(
            f"method {name}: the class {found.__name__} lacks {lacks}; rotssl.Method says what it has to do"
        )
    return found


def check(config: MethodConfig) -> None:
    """Load and build the method of a configuration if it comes from outside.

    Raises:
        ConfigError: that fails, or it lacks a trait that the engine needs.
    """
    if config.name in METHODS.sources:
        _check(load(config.name), config, METHODS[config.name].teacher)


@functools.cache  # a sweep asks for every trial
def _check(kind: type[Method], config: MethodConfig, teacher: bool) -> None:
    name = f"method {config.name}"
    try:
        with torch.random.fork_rng(devices=[]):
            made = kind(config, _DIM)
    except Exception as error:  # of any kind, as above
        raise ConfigError(f"{name}: {kind.__name__}(config, {_DIM}) failed ({in_a_line(error)})") from error
    if lacks := [trait for trait in ("uses_teacher", "joint_views", "projector") if not hasattr(made, trait)]:
        raise ConfigError(
            f"{name}: the class {kind.__name__} does not set {', '.join(lacks)}; rotssl.Method says what it is"
        )
    if made.uses_teacher != teacher:
        ours, theirs = made.uses_teacher, teacher
        raise ConfigError(f"{name}: {kind.__name__} has uses_teacher {ours}, but its MethodSpec has teacher {theirs}")
    if teacher and kind.teacher_momentum is Method.teacher_momentum:
        raise ConfigError(f"{name}: the class {kind.__name__} has a teacher, but lacks teacher_momentum")
