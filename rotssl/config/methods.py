"""The registry of methods: their configuration, where their code lives, and the optimizer that suits them.

This file imports no torch, so that a configuration can be checked in milliseconds. To add a method: a file with a ``Method``
subclass in rotssl/methods/, its config and its entry here, and a recipe. Defaults suit the embedded sample, recipes the papers.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rotssl.config.fields import load_class, opt

if TYPE_CHECKING:
    from rotssl.methods.base import Method

_NAME = "Method of instance similarity."


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Fields that every method has."""

    name: str = opt("byol", _NAME)
    hidden_dim: int = opt(512, "Width of the projector's hidden layers (and of BYOL's predictor's).", ge=1)
    out_dim: int = opt(128, "Dimension of the projector's output.", ge=1)


@dataclass(frozen=True, kw_only=True)
class SimclrConfig(MethodConfig):
    """SimCLR, Chen et al. 2020 (arXiv 2002.05709)."""

    name: str = opt("simclr", _NAME)
    temperature: float = opt(0.2, "Temperature of the softmax over similarities.", gt=0)


@dataclass(frozen=True, kw_only=True)
class Mocov2Config(MethodConfig):
    """MoCo v2, Chen et al. 2020 (arXiv 2003.04297)."""

    name: str = opt("mocov2", _NAME)
    temperature: float = opt(0.2, "Temperature of the softmax over similarities.", gt=0)
    queue_size: int = opt(2048, "Number of keys of earlier batches that serve as negatives.", ge=1)
    momentum: float = opt(0.99, "EMA momentum of the key encoder.", ge=0, le=1)
    momentum_end: float = opt(0.99, "The same at the end of the run, reached along a cosine.", ge=0, le=1)


@dataclass(frozen=True, kw_only=True)
class ByolConfig(MethodConfig):
    """BYOL, Grill et al. 2020 (arXiv 2006.07733)."""

    name: str = opt("byol", _NAME)
    momentum: float = opt(0.99, "Teacher's EMA momentum at the start.", ge=0, le=1)
    momentum_end: float = opt(1.0, "The same at the end of the run, reached along a cosine.", ge=0, le=1)


@dataclass(frozen=True, kw_only=True)
class SimsiamConfig(MethodConfig):
    """SimSiam, Chen and He 2021 (arXiv 2011.10566)."""

    name: str = opt("simsiam", _NAME)
    out_dim: int = opt(512, "Dimension of the projector's and the predictor's output.", ge=1)
    layers: int = opt(3, "Linear layers of the projector (the paper has 3, and 2 on CIFAR).", ge=2, le=3)
    predictor_dim: int = opt(128, "Width of the predictor's bottleneck.", ge=1)
    predictor_lr: Literal["constant", "scheduled"] = opt(
        "constant", "Whether the predictor's learning rate stays at the peak (as in the official code) or decays too."
    )


@dataclass(frozen=True, kw_only=True)
class SwavConfig(MethodConfig):
    """SwAV, Caron et al. 2020 (arXiv 2006.09882)."""

    name: str = opt("swav", _NAME)
    prototypes: int = opt(256, "Number of prototypes.", ge=2)
    temperature: float = opt(0.1, "Temperature of the softmax over prototypes.", gt=0)
    epsilon: float = opt(0.05, "Entropy regularisation of the codes.", ge=0.003)
    sinkhorn_iterations: int = opt(3, "Sinkhorn-Knopp iterations.", ge=1)
    freeze_steps: int = opt(0, "Steps at the start in which the prototypes stay as they are.", ge=0)
    queue_size: int = opt(0, "Embeddings of earlier batches that take part in the codes; 0: none.", ge=0)
    queue_after: int = opt(15, "Epochs before the queue takes part.", ge=1)


@dataclass(frozen=True, kw_only=True)
class BarlowConfig(MethodConfig):
    """Barlow Twins, Zbontar et al. 2021 (arXiv 2103.03230)."""

    name: str = opt("barlow", _NAME)
    out_dim: int = opt(512, "Dimension of the projector's output.", ge=1)
    off_diagonal: float = opt(0.0051, "Weight (lambda) of the redundancy reduction.", gt=0)


@dataclass(frozen=True, kw_only=True)
class VicregConfig(MethodConfig):
    """VICReg, Bardes, Ponce and LeCun 2022 (arXiv 2105.04906)."""

    name: str = opt("vicreg", _NAME)
    out_dim: int = opt(512, "Dimension of the projector's output.", ge=1)
    invariance: float = opt(25.0, "Weight (lambda) of the distance between views.", ge=0)
    variance: float = opt(25.0, "Weight (mu) of the hinge on standard deviations.", ge=0)
    covariance: float = opt(1.0, "Weight (nu) of the covariances.", ge=0)


@dataclass(frozen=True, kw_only=True)
class DinoConfig(MethodConfig):
    """DINO, Caron et al. 2021 (arXiv 2104.14294)."""

    name: str = opt("dino", _NAME)
    out_dim: int = opt(1024, "Number of outputs that the softmax runs over (K).", ge=2)
    bottleneck_dim: int = opt(128, "Dimension before the last layer, where the vectors are normalised.", ge=1)
    temperature: float = opt(0.1, "Student's temperature.", gt=0)
    teacher_temperature: float = opt(0.04, "Teacher's temperature, after its warm-up.", gt=0)
    teacher_temperature_start: float = opt(0.04, "Teacher's temperature at the start.", gt=0)
    teacher_warmup_epochs: int = opt(0, "Epochs in which the teacher's temperature moves linearly.", ge=0)
    center_momentum: float = opt(0.9, "EMA momentum of the centre.", ge=0, lt=1)
    momentum: float = opt(0.99, "Teacher's EMA momentum at the start.", ge=0, le=1)
    momentum_end: float = opt(1.0, "The same at the end of the run, reached along a cosine.", ge=0, le=1)
    freeze_steps: int = opt(0, "Steps at the start in which the last layer stays as it is.", ge=0)


@dataclass(frozen=True)
class MethodSpec:
    """What the registry holds of one method.

    Attributes:
        config: its section.
        target: module and class.
        optimizer: that suits it on the embedded sample.
        lr: peak at a batch of 256, for that optimizer.
        multi_crop: whether it takes local views.
        two_views: whether it wants exactly two global views.
        per_image: whether its loss is a mean over images, so that a batch may be cut up (gradient accumulation).
    """

    config: type[MethodConfig]
    target: str
    optimizer: str
    lr: float
    multi_crop: bool = False
    two_views: bool = False
    per_image: bool = False

    def load(self) -> "type[Method]":
        """Import the method's class (and with it torch)."""
        return load_class(self.target)  # type: ignore[no-any-return]


METHODS: dict[str, MethodSpec] = {
    "simclr": MethodSpec(SimclrConfig, "rotssl.methods.simclr:SimCLR", "sgd", 0.24, multi_crop=True),
    "mocov2": MethodSpec(Mocov2Config, "rotssl.methods.mocov2:MoCoV2", "sgd", 0.12, two_views=True),
    "byol": MethodSpec(ByolConfig, "rotssl.methods.byol:BYOL", "sgd", 0.24, multi_crop=True, per_image=True),
    "simsiam": MethodSpec(
        SimsiamConfig, "rotssl.methods.simsiam:SimSiam", "sgd", 0.06, multi_crop=True, per_image=True
    ),
    "swav": MethodSpec(SwavConfig, "rotssl.methods.swav:SwAV", "sgd", 0.48, multi_crop=True, two_views=True),
    "barlow": MethodSpec(BarlowConfig, "rotssl.methods.barlow:BarlowTwins", "adamw", 0.004),
    "vicreg": MethodSpec(VicregConfig, "rotssl.methods.vicreg:VICReg", "sgd", 0.005),
    "dino": MethodSpec(DinoConfig, "rotssl.methods.dino:DINO", "adamw", 0.00025, multi_crop=True, per_image=True),
}
