"""Methods from other packages. Their code is loaded and built once before a run starts, so that a mistake is one line."""

import dataclasses
import functools

import numpy as np
import torch
from torch import Tensor

from rotssl.base import distributed
from rotssl.base.errors import in_a_line
from rotssl.base.step import StepContext
from rotssl.config import Config
from rotssl.config.fields import ConfigError
from rotssl.config.methods import METHODS, MethodConfig
from rotssl.config.views import ViewsConfig
from rotssl.methods.base import Method
from rotssl.methods.oracle import Oracle

_DIM, _IMAGES = 16, 8  # in the trials: of the features, of a batch


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


def check(config: Config) -> None:
    """Load and build the method of a configuration if it comes from outside, and try whether it asks an oracle that it is given.

    Raises:
        ConfigError: that fails, or it lacks a trait that the engine needs, or the oracle would change nothing.
    """
    name = config.method.name
    if name not in METHODS.sources:
        return
    _check(load(name), config.method, METHODS[name].teacher)
    if config.oracle.reads_labels:
        _check_oracle(load(name), config.method, config.views, config.oracle.on)


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


class _Asked(Oracle):
    """An oracle that notes whether it was asked."""

    asked = False

    def judge(
        self, anchors: Tensor, others: Tensor, offset: int | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        self.asked = True
        return super().judge(anchors, others, offset)


@functools.cache
def _check_oracle(kind: type[Method], config: MethodConfig, views: ViewsConfig, removes: bool) -> None:
    """Try two steps on made-up features with an oracle that removes everything: a run must not say that it had one in vain."""
    name = f"method {config.name}"
    try:
        (asked, plain), (_, without) = (_losses(kind, config, views, share) for share in (0.0, 1.0))
    except Exception as error:  # of any kind, as above
        raise ConfigError(f"{name}: a loss of {kind.__name__} with an oracle failed ({in_a_line(error)})") from error
    why = "" if asked else "never asks self.oracle.judge"
    if removes and not why and plain == without:
        why = "has the same loss if self.oracle.judge removes all false negatives"
    if why:
        words = f"{kind.__name__} {why}: let its loss do so, or leave negatives out of its MethodSpec"
        raise ConfigError(f"{name}: its MethodSpec has negatives True, but {words}")


def _losses(kind: type[Method], config: MethodConfig, views: ViewsConfig, share: float) -> tuple[bool, list[float]]:
    """Whether a new method asks an oracle in two steps on the same features, all of one class, and its losses.

    In the second step a method with a memory meets the keys of the first one, each of which is the most similar to its query.
    """
    oracle, losses, index = _Asked(share), list[float](), np.arange(_IMAGES)
    classes = torch.from_numpy(np.stack([np.zeros(_IMAGES), (index + 0.5) / _IMAGES], 1))
    ctx = StepContext(0, 0, 0, 0.0, index, 0, _IMAGES, views.global_count, classes=classes)
    with torch.random.fork_rng(devices=[]), distributed.alone():
        torch.manual_seed(0)
        made = kind(config, _DIM)
        made.consult(oracle)
        z = [made.projector(torch.randn(_IMAGES, _DIM)) for _ in range(views.global_count + views.local_count)]
        keys = [view.detach() for view in z[: views.global_count]] if made.uses_teacher else None
        for step in range(2):
            now = dataclasses.replace(ctx, step=step)
            losses.append(float(made.loss(z, keys, now).loss.detach()))
            with torch.no_grad():
                made.after_step(now)
    return oracle.asked, losses
