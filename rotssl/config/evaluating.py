"""The options of jobs/evaluate.py beside the run: sections of fields, as those of a run. Imports no torch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from rotssl.config.evaluation import PROTOCOLS as PROTOCOLS
from rotssl.config.fields import Auto, ConfigError, convert, opt
from rotssl.config.sections import fields_of

Distance = Literal["cosine", "euclidean"]

# What others publish: k, T and distance of every combination. lightly: the defaults of utils/benchmarking/knn.py. solo-learn:
# scripts/knn/imagenet-100/knn.sh, which also takes the projector's features; euclidean votes have no T.
KNN_PRESETS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "lightly": {"k": (200,), "temperature": (0.1,), "distance": ("cosine",)},
    "solo-learn": {
        "k": (1, 2, 5, 10, 20, 50, 100, 200),
        "temperature": (0.01, 0.02, 0.05, 0.07, 0.1, 0.2, 0.5, 1.0),
        "distance": ("cosine", "euclidean"),
    },
}
SGD_RATES: Mapping[str, float] = {"paper": 1.0, "paper-crop": 30.0, "swav": 0.3}
SGD_EPOCHS = 100


def finetune_epochs(share: float) -> int:
    """The length of fine-tuning on a share of the labels, if none is given."""
    return 60 if share <= 0.01 else 30 if share <= 0.1 else 20


@dataclass(frozen=True, kw_only=True)
class KnnOptions:
    """Weighted kNN; every combination is measured, all from one search for each distance."""

    preset: Literal["lightly", "solo-learn"] | None = opt(
        None, "k, T and distances that another library publishes; the three fields below override them."
    )
    k: tuple[int, ...] | None = opt(None, "Numbers of neighbours; default: the run's.", ge=1, le=1000)
    temperature: tuple[float, ...] | None = opt(None, "Temperatures of exp(cosine / T); default: the run's.", gt=0)
    distance: tuple[Distance, ...] | None = opt(
        None, "cosine, or euclidean, whose votes are 1 / (distance + 1e-5) as solo-learn's; default: cosine."
    )


@dataclass(frozen=True, kw_only=True)
class SemiOptions:
    """The linear probe on a class-balanced part of the training images."""

    shares: tuple[float, ...] = opt((0.01, 0.1), "Shares of the training images that have labels.", gt=0, le=1)
    seed: int = opt(0, "Seed of the parts, also of those of finetune.", ge=0)


@dataclass(frozen=True, kw_only=True)
class SgdOptions:
    """A linear classifier trained by SGD on the frozen encoder."""

    preset: Literal["paper", "paper-crop", "swav"] = opt(
        "paper",
        "paper: rate 1, batch 512, whole images; paper-crop: its rate 30 with crop and flip, for SimSiam; swav: rate 0.3, batch "
        "256, crop and flip. All 100 epochs.",
    )
    lr: tuple[float, ...] | None = opt(
        None, "Rates to try, chosen on a held-out fifth of train; default: the preset's.", gt=0
    )
    epochs: int | None = opt(None, "Length; default: the preset's.", ge=1)
    seed: int = opt(0, "Seed of order, crops and weights.", ge=0)


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """The whole encoder trained on a class-balanced part of the training images."""

    shares: tuple[float, ...] = opt((0.01, 0.1, 1.0), "Shares of the training images that have labels.", gt=0, le=1)
    lr: tuple[float, ...] = opt(
        (0.01, 0.03, 0.1), "Rates of the encoder to try, chosen on a held-out fifth of the part.", gt=0
    )
    head_lr: float = opt(20, "Rate of the classifier, in rates of the encoder.", gt=0)
    epochs: int | None = opt(None, "Length; default: 60 up to 1% of the labels, 30 up to 10%, else 20.", ge=1)
    batch_size: int | None = opt(None, "Images per step; default: an eighth of the part, 16 to 256.", ge=2)
    scale: tuple[float, float] = opt((0.2, 1.0), "Smallest and largest crop, as shares of the image area.", gt=0, le=1)
    seeds: int = opt(3, "Number of trainings with the chosen rate; the mean and the deviation are recorded.", ge=1)


@dataclass(frozen=True, kw_only=True)
class FewshotOptions:
    """Nearest class mean in episodes of a few classes."""

    ways: int = opt(5, "Classes of an episode.", ge=2)
    shots: tuple[int, ...] = opt((1, 5), "Training images of each class.", ge=1)
    queries: int = opt(15, "Test images of each class.", ge=1)
    episodes: int = opt(600, "Number of episodes.", ge=2)
    seed: int = opt(0, "Seed of the episodes.", ge=0)


@dataclass(frozen=True, kw_only=True)
class RobustnessOptions:
    """kNN and the linear probe on changed test images."""

    angles: tuple[float, ...] = opt(
        (0.0, 90.0, 180.0, 270.0, 15.0, 30.0, 45.0),
        "Angles in degrees that the test images are turned by.",
        ge=0,
        lt=360,
    )
    corruptions: tuple[str, ...] | None = opt(None, "Names of corruptions; default: all.")
    severities: tuple[int, ...] = opt((1, 2, 3, 4, 5), "Severities of the corruptions.", ge=1, le=5)
    seed: int = opt(0, "Seed of the noise.", ge=0)


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """Who measures; the numbers do not depend on it."""

    num_workers: int | Auto = opt(
        0,
        "Ray workers that share the work: features, changed test images, rates and seeds of trainings. 0: this process; "
        "auto: one per GPU, else 2.",
        ge=0,
    )
    use_gpu: bool | Auto = opt("auto", "Whether each worker uses a GPU.")
    cpus_per_worker: int = opt(1, "CPU cores reserved per worker.", ge=1)


@dataclass(frozen=True, kw_only=True)
class Options:
    """All sections."""

    knn: KnnOptions = field(default_factory=KnnOptions)
    semi: SemiOptions = field(default_factory=SemiOptions)
    sgd: SgdOptions = field(default_factory=SgdOptions)
    finetune: FinetuneOptions = field(default_factory=FinetuneOptions)
    fewshot: FewshotOptions = field(default_factory=FewshotOptions)
    robustness: RobustnessOptions = field(default_factory=RobustnessOptions)
    scaling: WorkerOptions = field(default_factory=WorkerOptions)


def schema() -> dict[str, tuple[Any, dataclasses.Field[Any]]]:
    """Dotted name -> (type, field) of every option."""
    sections = get_type_hints(Options).items()
    return {key: spec for name, kind in sections for key, spec in fields_of(name, kind).items()}


def build(given: Mapping[str, Any]) -> Options:
    """The options, from those that were given.

    Args:
        given: dotted name -> value, as text or of the field's type; others are ignored.

    Raises:
        ConfigError: a value does not fit.
    """
    parts: dict[str, dict[str, Any]] = {}
    for key, (hint, spec) in schema().items():
        if key in given:
            section, leaf = key.split(".")
            parts.setdefault(section, {})[leaf] = convert(key, given[key], hint, spec.metadata["bounds"])
            if isinstance(value := parts[section][leaf], tuple) and leaf != "scale" and len(set(value)) < len(value):
                raise ConfigError(f"{key}: got {given[key]}, expected each value once")
            if leaf == "scale" and value[0] > value[1]:
                raise ConfigError(f"{key}: got {given[key]}, expected the smaller share first")
    kinds = get_type_hints(Options)
    return Options(**{name: kinds[name](**values) for name, values in parts.items()})


def protocols_of(text: str) -> tuple[str, ...]:
    """The names in a comma-separated list of protocols.

    Raises:
        ConfigError: one is unknown.
    """
    names = tuple(dict.fromkeys(text.split(",")))
    if not set(names) <= set(PROTOCOLS):
        raise ConfigError(f"--protocol: got {text!r}, expected one or more of {', '.join(PROTOCOLS)}")
    return names
