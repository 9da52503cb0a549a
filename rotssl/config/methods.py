"""The registry of methods: their configuration, where their code lives, and their default optimizer.

This file imports no torch, so a configuration is checked in milliseconds. A new method is a module in rotssl/methods/ with a
``Method`` subclass, its section and entry here, and a recipe. One from outside is a ``MethodSpec`` in another package
(docs/own_method.md). Rates and momenta were chosen on CIFAR-10
(benchmarks/results/gain), those of Barlow Twins, VICReg and DINO on the embedded sample; recipes follow the papers.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from rotssl.config.fields import Auto, describe, load_class, opt
from rotssl.config.registry import Registry

if TYPE_CHECKING:
    from rotssl.methods.base import Method

_NAME = "Pretraining method."


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Fields shared by all methods."""

    name: str = opt("byol", _NAME)
    hidden_dim: int = opt(512, "Width of the projector's hidden layers (and of BYOL's predictor's).", ge=1)
    out_dim: int = opt(128, "Dimension of the projector's output.", ge=1)

    def resolve(self, steps: int) -> dict[str, Any]:
        """Return the values that replace ``auto``, by field, given the number of steps of the run."""
        return {}


@dataclass(frozen=True, kw_only=True)
class SimclrConfig(MethodConfig):
    """SimCLR, Chen et al. 2020 (arXiv 2002.05709)."""

    name: str = opt("simclr", _NAME)
    temperature: float = opt(0.2, "Temperature of the softmax over similarities.", gt=0)
    last_norm: bool = opt(
        False, "End the projector with BatchNorm without affine weights, as the official code does.", later=True
    )


@dataclass(frozen=True, kw_only=True)
class Mocov2Config(MethodConfig):
    """MoCo v2, Chen et al. 2020 (arXiv 2003.04297)."""

    name: str = opt("mocov2", _NAME)
    temperature: float = opt(0.2, "Temperature of the softmax over similarities.", gt=0)
    queue_size: int = opt(2048, "Number of keys from earlier batches that serve as negatives.", ge=1)
    momentum: float = opt(0.99, "EMA momentum of the key encoder.", ge=0, le=1)
    momentum_end: float = opt(0.99, "EMA momentum at the end of the run, approached along a cosine.", ge=0, le=1)


@dataclass(frozen=True, kw_only=True)
class ByolConfig(MethodConfig):
    """BYOL, Grill et al. 2020 (arXiv 2006.07733)."""

    name: str = opt("byol", _NAME)
    momentum: float | Auto = opt(
        "auto",
        "Teacher's EMA momentum at the start; auto: 1 - 1000 / steps of the run, at least 0.9.",
        ge=0,
        le=1,
    )
    momentum_end: float | Auto = opt(
        "auto",
        "Teacher's EMA momentum at the end of the run, approached along a cosine; auto: 1, but constant if momentum is auto.",
        ge=0,
        le=1,
    )

    def resolve(self, steps: int) -> dict[str, Any]:
        """Resolve the momentum to one that follows from the length.

        A teacher that averages over the last tenth of 10,000 steps, and over the last 1,000 in longer runs, was best in runs of
        880 and 1,750 steps (benchmarks/LOG.md), and has the published 0.99 and 0.996 in runs of 94,000 and 313,000 steps.
        """
        start, end, follows = self.momentum, self.momentum_end, max(0.9, 1 - 1000 / max(1, steps))
        if end == "auto":
            end = follows if start == "auto" else 1.0
        return {"momentum": follows if start == "auto" else start, "momentum_end": end}


@dataclass(frozen=True, kw_only=True)
class SimsiamConfig(MethodConfig):
    """SimSiam, Chen and He 2021 (arXiv 2011.10566)."""

    name: str = opt("simsiam", _NAME)
    out_dim: int = opt(512, "Dimension of the projector's and the predictor's output.", ge=1)
    layers: int = opt(3, "Number of linear layers in the projector (the paper: 3, on CIFAR 2).", ge=2, le=3)
    predictor_dim: int = opt(128, "Width of the predictor's bottleneck.", ge=1)
    predictor_lr: Literal["constant", "scheduled"] = opt(
        "constant",
        "Keep the predictor's learning rate at the peak (as in the official code), or schedule it like the others.",
    )


@dataclass(frozen=True, kw_only=True)
class SwavConfig(MethodConfig):
    """SwAV, Caron et al. 2020 (arXiv 2006.09882)."""

    name: str = opt("swav", _NAME)
    prototypes: int = opt(256, "Number of prototypes.", ge=2)
    temperature: float = opt(0.1, "Temperature of the softmax over prototypes.", gt=0)
    epsilon: float = opt(0.05, "Entropy regularisation of the codes.", ge=0.003)
    sinkhorn_iterations: int = opt(3, "Sinkhorn-Knopp iterations.", ge=1)
    freeze_steps: int = opt(0, "Number of steps at the start during which the prototypes are frozen.", ge=0)
    queue_size: int = opt(0, "Number of embeddings from earlier batches used for the codes; 0: none.", ge=0)
    queue_after: int = opt(15, "Number of epochs before the queue is used.", ge=1)


@dataclass(frozen=True, kw_only=True)
class BarlowConfig(MethodConfig):
    """Barlow Twins, Zbontar et al. 2021 (arXiv 2103.03230)."""

    name: str = opt("barlow", _NAME)
    out_dim: int = opt(512, "Dimension of the projector's output.", ge=1)
    off_diagonal: float = opt(0.0051, "Weight (lambda) of the redundancy reduction term.", gt=0)


@dataclass(frozen=True, kw_only=True)
class VicregConfig(MethodConfig):
    """VICReg, Bardes, Ponce and LeCun 2022 (arXiv 2105.04906)."""

    name: str = opt("vicreg", _NAME)
    out_dim: int = opt(512, "Dimension of the projector's output.", ge=1)
    invariance: float = opt(25.0, "Weight (lambda) of the invariance term, the distance between views.", ge=0)
    variance: float = opt(25.0, "Weight (mu) of the variance term, a hinge on standard deviations.", ge=0)
    covariance: float = opt(1.0, "Weight (nu) of the covariance term.", ge=0)


@dataclass(frozen=True, kw_only=True)
class DinoConfig(MethodConfig):
    """DINO, Caron et al. 2021 (arXiv 2104.14294)."""

    name: str = opt("dino", _NAME)
    out_dim: int = opt(1024, "Number of outputs of the softmax (K).", ge=2)
    bottleneck_dim: int = opt(128, "Dimension of the normalised vectors before the last layer.", ge=1)
    temperature: float = opt(0.1, "Student's temperature.", gt=0)
    teacher_temperature: float = opt(0.04, "Teacher's temperature, after its warm-up.", gt=0)
    teacher_temperature_start: float = opt(0.04, "Teacher's temperature at the start.", gt=0)
    teacher_warmup_epochs: int = opt(0, "Number of epochs over which the teacher's temperature changes linearly.", ge=0)
    center_momentum: float = opt(0.9, "EMA momentum of the centre.", ge=0, lt=1)
    momentum: float = opt(0.99, "Teacher's EMA momentum at the start.", ge=0, le=1)
    momentum_end: float = opt(
        1.0, "Teacher's EMA momentum at the end of the run, approached along a cosine.", ge=0, le=1
    )
    freeze_steps: int = opt(0, "Number of steps at the start during which the last layer is frozen.", ge=0)


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(MethodConfig):
    """Supervised training, to be set beside the methods (docs/analysis.md). USES LABELS."""

    name: str = opt("supervised", _NAME)
    hidden_dim: int = opt(512, "Not used: the classifier is linear.", ge=1)
    out_dim: int = opt(10, "Number of classes, or more.", ge=2)


@dataclass(frozen=True)
class MethodSpec:
    """A registered method.

    Attributes:
        config: its section.
        target: ``module:class`` of its code; of a method that is registered in a notebook or a script, also the class itself.
        optimizer: its default optimizer.
        lr: peak learning rate at batch size 256, for that optimizer.
        multi_crop: whether it takes local views.
        two_views: whether it needs exactly two global views.
        per_image: whether its loss is a mean over images, so that a batch can be split (gradient accumulation).
        teacher: whether it has a teacher, a moving average of the encoder.
        negatives: whether its loss has negatives, and asks ``self.oracle``, if it has one, which of them to remove.
        labels: whether its loss is one of the labels. It is no self-supervised method then, and listed nowhere as one.
        recommended: fields that a run without a recipe has beside the defaults, chosen at equal compute.
        gain: what they gained there over the plain method, for --help and the first lines of a run.
        paper_weight: weight of the rotation loss in the paper's recipe, on this project's terms; None: it has none. MoCo v2,
            which the paper does not have, takes SimCLR's.
    """

    config: type[MethodConfig]
    target: "str | type[Method]"
    optimizer: str
    lr: float
    multi_crop: bool = False
    two_views: bool = False
    per_image: bool = False
    teacher: bool = False
    negatives: bool = False
    labels: bool = False
    recommended: Mapping[str, Any] = field(default_factory=dict, hash=False)
    gain: str = ""
    paper_weight: float | None = None

    def load(self) -> "type[Method]":
        """Import and return the method's class (this imports torch)."""
        return load_class(self.target) if isinstance(self.target, str) else self.target


def _objection(name: str, spec: object) -> str:
    """Why a method from outside cannot be used under a name, as far as that can be told without its code; empty if it can."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        return f"got the name {name!r}, expected lower-case letters, digits and underscores, as it will be in names of runs"
    if not isinstance(spec, MethodSpec):
        return f"got {_shown(spec)}, expected a MethodSpec"
    own = spec.config
    if not (isinstance(own, type) and issubclass(own, MethodConfig) and dataclasses.is_dataclass(own)):
        return f"config: got {_shown(own)}, expected a dataclass that is a subclass of MethodConfig"
    hints, fields = get_type_hints(own), {f.name: f for f in dataclasses.fields(own)}
    for key, known in fields.items():
        if not {"help", "bounds", "later"} <= known.metadata.keys():
            return f"config: the field {key} is not made by rotssl.opt(default, text), which gives it its flag and its help"
        try:
            describe(hints[key], known.metadata["bounds"])
        except (KeyError, IndexError):
            return f"config: the field {key} has the type {hints[key]}, expected bool, int, float, str, a Literal or a tuple"
    if fields["name"].default != name:
        return f"config: its field name is {fields['name'].default!r} by default, expected {name!r}"
    if isinstance(spec.target, str) and not re.fullmatch(r"[\w.]+:\w+", spec.target):
        return f"target: got {spec.target!r}, expected module:class"
    if not isinstance(spec.target, str | type):
        return f"target: got {_shown(spec.target)}, expected module:class, or the class itself"
    if spec.optimizer not in _OPTIMIZERS:
        return f"optimizer: got {spec.optimizer!r}, expected one of {', '.join(_OPTIMIZERS)}"
    right = isinstance(spec.lr, int | float) and spec.lr > 0
    return "" if right else f"lr: got {spec.lr!r}, expected a number greater than 0"


def _shown(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"{value!r:.80}"


# Chosen at equal compute for runs of 5 and 10 epochs of CIFAR-10, one seed each (benchmarks/LOG.md). ``gain`` is over the plain
# method, of kNN and linear, on the test split after 10 epochs, 4 other seeds.
_SMALLER = {"views.size_start": 0.75}
_OFF = {**_SMALLER, "rotation.weight": 0.0}
_TOLD = {**_SMALLER, "rotation.conditioned": True, "rotation.share": 0.5}
_OPTIMIZERS = ("sgd", "lars", "adamw")
_WHERE = "points of kNN and linear over the plain method at equal compute, 4 seeds, CIFAR-10"

_OWN: dict[str, MethodSpec] = {
    "simclr": MethodSpec(
        SimclrConfig,
        "rotssl.methods.simclr:SimCLR",
        "sgd",
        0.24,
        multi_crop=True,
        negatives=True,
        recommended=_OFF,
        gain=f"+2.3 (+1.8 to +2.9) and +2.6 (+1.3 to +3.9) {_WHERE}; rotation is off, it cost linear accuracy",
        paper_weight=0.5,
    ),
    "mocov2": MethodSpec(
        Mocov2Config,
        "rotssl.methods.mocov2:MoCoV2",
        "sgd",
        0.24,
        two_views=True,
        teacher=True,
        negatives=True,
        recommended=_TOLD,
        gain=f"+2.4 (+1.3 to +3.4) and +3.6 (+2.5 to +4.8) {_WHERE}",
        paper_weight=0.5,
    ),
    "byol": MethodSpec(
        ByolConfig,
        "rotssl.methods.byol:BYOL",
        "sgd",
        0.48,
        multi_crop=True,
        per_image=True,
        teacher=True,
        recommended=_TOLD,
        gain=f"+2.4 (+1.3 to +3.6) and +2.2 (+0.9 to +3.6) {_WHERE}",
        paper_weight=0.2,
    ),
    "simsiam": MethodSpec(
        SimsiamConfig,
        "rotssl.methods.simsiam:SimSiam",
        "sgd",
        0.48,
        multi_crop=True,
        per_image=True,
        recommended={**_SMALLER, "rotation.share": 0.5},
        gain=f"+5.0 (+4.3 to +5.8) and +3.8 (+2.3 to +5.4) {_WHERE}",
        paper_weight=0.05,
    ),
    "swav": MethodSpec(
        SwavConfig,
        "rotssl.methods.swav:SwAV",
        "sgd",
        0.96,
        multi_crop=True,
        two_views=True,
        recommended=_OFF,
        gain=f"+0.8 (+0.3 to +1.4) and +1.1 (+0.5 to +1.8) {_WHERE}; rotation is off, it cost linear accuracy",
        paper_weight=0.25,
    ),
    "barlow": MethodSpec(BarlowConfig, "rotssl.methods.barlow:BarlowTwins", "adamw", 0.004),
    "vicreg": MethodSpec(VicregConfig, "rotssl.methods.vicreg:VICReg", "sgd", 0.005),
    "dino": MethodSpec(
        DinoConfig, "rotssl.methods.dino:DINO", "adamw", 0.00025, multi_crop=True, per_image=True, teacher=True
    ),
}

_CONTROLS = {
    "supervised": MethodSpec(
        SupervisedConfig,
        "rotssl.methods.supervised:Supervised",
        "sgd",
        0.24,
        per_image=True,
        labels=True,
        recommended={"rotation.weight": 0.0},
        gain="the line is of supervision alone",
    ),
}

METHODS: Registry[MethodSpec] = Registry("rotssl.methods", _OWN | _CONTROLS, _objection, unlisted=_CONTROLS)


def register_method(name: str, spec: MethodSpec) -> None:
    """Add a method of one's own in this process; Ray workers and trials that it starts get it, too.

    A method with this name that was added before is replaced, so that a notebook's cell can be run again. For programs in jobs/,
    a package names its MethodSpec by an entry point in the group ``rotssl.methods`` instead.

    Args:
        name: what ``method.name`` is set to.
        spec: its section, code and default optimizer.

    Raises:
        ConfigError: the name is taken, or the spec cannot be used.
    """
    METHODS.register(name, spec)
