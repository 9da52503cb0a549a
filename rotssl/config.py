"""The configuration of a run: frozen dataclasses, one a section, with their checks.

Imports no torch, ray or mlflow: a bad configuration is refused in milliseconds. ``build`` makes a Config from dotted overrides
(the one path for recipes, flags and sweeps), ``resolve`` turns every ``auto`` that the configuration alone decides into a value.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from rotssl.fields import ConfigError, convert, nearest, opt
from rotssl.methods import METHODS, MethodConfig

Auto = Literal["auto"]
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images."""

    name: Literal["fashion-mnist-sample", "fashion-mnist", "cifar10", "imagefolder", "synthetic"] = opt(
        "fashion-mnist-sample", "Data set."
    )
    root: str | None = opt(None, "Folder of the data set; the sample and synthetic need none.")
    limit: int | None = opt(None, "Train on a class-balanced subset of this many images.", ge=1)
    image_size: int | Auto = opt("auto", "Side of the global views, in pixels; auto: native up to 96, else 224.", ge=8)
    download: bool = opt(False, "Let torchvision download the data set into data.root.")


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """How the random views of an image are made. ``blur`` and ``solarize``: one value, or one a view (BYOL's asymmetry)."""

    global_count: int = opt(2, "Number of global views.", ge=2, le=8)
    global_scale: tuple[float, float] = opt((0.2, 1.0), "Smallest and largest share of the area of a crop.", gt=0, le=1)
    jitter: tuple[float, float, float, float] = opt(
        (0.4, 0.4, 0.4, 0.1), "Strength of brightness, contrast, saturation and hue.", ge=0, le=1
    )
    jitter_p: float = opt(0.8, "Probability of the colour jitter.", ge=0, le=1)
    grayscale: float = opt(0.2, "Probability of turning gray.", ge=0, le=1)
    blur: tuple[float, ...] = opt((0.0,), "Probability of Gaussian blur.", ge=0, le=1)
    solarize: tuple[float, ...] = opt((0.0,), "Probability of solarisation.", ge=0, le=1)
    flip: float = opt(0.5, "Probability of a horizontal flip.", ge=0, le=1)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The network that is pretrained."""

    name: Literal[
        "small", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"
    ] = opt("small", "small (three residual blocks, for CPUs) or a torchvision ResNet.")
    stem: Literal["imagenet", "cifar", "auto"] = opt(
        "auto",
        "cifar: 3x3 stride 1, no pooling; imagenet: strided. auto: cifar for a ResNet on images up to 64 pixels.",
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What encoder and heads share."""

    norm: Literal["batch", "sync", "group"] = opt(
        "sync", "BatchNorm per worker, over all workers, or GroupNorm; for sync and group N workers train as one would."
    )


@dataclass(frozen=True, kw_only=True)
class RotationConfig:
    """The auxiliary task of predicting a rotation by 0, 90, 180 or 270 degrees (arXiv 2210.09866)."""

    weight: float = opt(1.0, "Weight of the mean cross-entropy over the rotated views; 0 is off.", ge=0)
    mode: Literal["extra", "in_place"] = opt(
        "extra",
        "extra: rotated views get a forward of their own (the paper's recipe); in_place: the method's views turn.",
    )
    angles: Literal["shared", "independent"] = opt(
        "shared",
        "In place: one angle for all views of an image, or one for each student view (teacher's stay upright).",
    )
    views: int = opt(2, "Number of rotated views of an image in extra mode.", ge=1, le=2)
    fraction: float = opt(1.0, "Share of the images that are rotated and enter the loss.", gt=0, le=1)
    schedule: Literal["constant", "linear", "cosine"] = opt("constant", "Course of the weight over the run, down to 0.")
    update_bn: bool = opt(True, "Whether the extra forward also updates BatchNorm's running statistics.")
    hidden_dim: int = opt(128, "Width of the head's hidden layer.", ge=1)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    name: Literal["auto", "sgd", "lars", "adamw"] = opt("auto", "Optimizer; auto: the one that suits the method.")
    lr: float | Auto = opt("auto", "Peak learning rate; auto: the method's, scaled linearly by batch_size / 256.", gt=0)
    lr_scale: Literal["none", "linear", "sqrt"] = opt("none", "Scale a given lr by batch_size / 256.")
    weight_decay: float = opt(5e-4, "Weight decay; biases and norm layers are left out.", ge=0)
    momentum: float = opt(0.9, "Momentum (AdamW: beta 1).", ge=0, lt=1)
    warmup_epochs: float = opt(1.0, "Epochs of linear warm-up.", ge=0)
    schedule: Literal["cosine", "constant"] = opt("cosine", "Course of the learning rate after warm-up.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    epochs: int = opt(10, "Length of the run; the schedules span it.", ge=1)
    batch_size: int = opt(256, "Images a step over all workers.", ge=2)
    seed: int = opt(0, "Seed of weights, sample order, views and rotations.", ge=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = opt("auto", "auto: bf16 on GPUs that have it, else fp32.")
    deterministic: bool = opt(False, "Refuse operations that have no deterministic form.")
    channels_last: bool = opt(True, "Memory layout of images; convolutions are faster with it, on CPUs too.")
    stop_after: int | None = opt(None, "Stop after this epoch as if interrupted; not part of the run's identity.", ge=1)
    on_nan: Literal["fail", "skip"] = opt(
        "fail", "Non-finite loss: end the run as failed, or skip such steps (one host synchronisation a step)."
    )


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """The workers."""

    num_workers: int | Auto = opt("auto", "Ray Train workers; auto: every GPU, else 2 CPU workers; 0: no Ray.", ge=0)
    use_gpu: bool | Auto = opt("auto", "Whether each worker takes a GPU.")
    cpus_per_worker: int = opt(1, "CPU cores a worker reserves.", ge=1)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured while training."""

    knn_every: int = opt(1, "Epochs between kNN evaluations on validation; 0: never.", ge=0)
    holdout: float = opt(
        0.1, "Share of train held out for validation where the data have no validation split.", gt=0, lt=1
    )


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow."""

    uri: str | None = opt(None, "MLflow tracking URI; default: an sqlite file below storage.path.")
    experiment: str = opt("rotssl", "MLflow experiment, and folder below storage.path.")
    run_name: str | None = opt(None, "Name of the run; default: method-data-hash of the configuration.")


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """Results."""

    path: str | None = opt(None, "Folder that all nodes see; default: ./results, inside a Ray job ~/rotssl-results.")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=METHODS["byol"].config)
    rotation: RotationConfig = field(default_factory=RotationConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)

    @property
    def run_dir(self) -> Path:
        """Folder of this run: its identity on disk. Only after ``resolve``."""
        assert self.storage.path is not None and self.tracking.run_name is not None
        return Path(self.storage.path) / self.tracking.experiment / self.tracking.run_name


# Not part of what a run computes: they may change between a start and the next.
_NOT_IDENTITY = ("tracking.", "storage.", "scaling.", "train.stop_after", "data.download")


def schema(method: str = "byol") -> dict[str, tuple[Any, dataclasses.Field[Any]]]:
    """Dotted name -> (type, field) of every field, with the fields of the given method."""
    result = {}
    for section in dataclasses.fields(Config):
        cls = METHODS[method].config if section.name == "method" else get_type_hints(Config)[section.name]
        hints = get_type_hints(cls)
        result.update({f"{section.name}.{f.name}": (hints[f.name], f) for f in dataclasses.fields(cls)})
    return result


def build(overrides: Mapping[str, Any]) -> Config:
    """A Config from dotted overrides, values as text or as YAML gives them.

    Raises:
        ConfigError: unknown field, wrong type or out of bounds, fields that do not go together.
    """
    name = overrides.get("method.name", "byol")
    if not isinstance(name, str) or name not in METHODS:
        raise ConfigError(
            f"method.name: got {name!r}, expected one of {', '.join(METHODS)}{nearest(str(name), METHODS)}"
        )
    known = schema(name)
    values: dict[str, dict[str, Any]] = {section.name: {} for section in dataclasses.fields(Config)}
    for key, value in overrides.items():
        if key not in known:
            other = [m for m in METHODS if key in schema(m)]
            why = f"; it is a field of {', '.join(other)}, not of {name}" if other else nearest(key, known)
            raise ConfigError(f"{key}: no such field{why}")
        hint, spec = known[key]
        section, leaf = key.split(".")
        values[section][leaf] = convert(key, value, hint, spec.metadata["bounds"])
    hints = get_type_hints(Config)
    sections: dict[str, Any] = {
        section: (METHODS[name].config if section == "method" else hints[section])(**given)
        for section, given in values.items()
    }
    config = Config(**sections)
    _check(config)
    return config


def _require(condition: bool, key: str, given: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{key}: got {given}, expected {expected}")


def _check(c: Config) -> None:
    """The rules between fields."""
    low, high = c.views.global_scale
    _require(low <= high, "views.global_scale", f"({low}, {high})", "the smaller share first")
    for name, values in (("blur", c.views.blur), ("solarize", c.views.solarize)):
        count = c.views.global_count
        _require(
            len(values) in (1, count),
            f"views.{name}",
            f"{len(values)} values",
            f"one, or one for each of {count} views",
        )
    _require(c.views.jitter[3] <= 0.5, "views.jitter", f"a hue of {c.views.jitter[3]}", "a hue of at most 0.5")
    _require(c.data.name != "imagefolder" or c.data.root is not None, "data.root", None, "a folder of images")
    torchvision_set = c.data.name in ("fashion-mnist", "cifar10")
    _require(not torchvision_set or c.data.root is not None, "data.root", None, f"the folder that holds {c.data.name}")
    _require(torchvision_set or not c.data.download, "data.download", "true", f"false: {c.data.name} is not downloaded")
    stop, epochs = c.train.stop_after, c.train.epochs
    _require(stop is None or stop <= epochs, "train.stop_after", stop, f"at most train.epochs ({epochs})")
    _require(
        c.optim.warmup_epochs <= epochs,
        "optim.warmup_epochs",
        c.optim.warmup_epochs,
        f"at most train.epochs ({epochs})",
    )
    _require(
        c.optim.lr != "auto" or c.optim.lr_scale == "none", "optim.lr_scale", c.optim.lr_scale, "none with lr auto"
    )
    in_place = c.rotation.mode == "in_place"
    _require(
        not in_place or c.rotation.views == 2,
        "rotation.views",
        c.rotation.views,
        "2: in_place turns the method's views",
    )
    for key in ("experiment", "run_name"):
        value = getattr(c.tracking, key)
        bad = value is not None and (value in (".", "..") or any(ch in value for ch in "/\\\0\n"))
        _require(not bad, f"tracking.{key}", repr(value), "a name without slashes, fit for a folder")
    if c.storage.path is not None and "://" in c.storage.path:
        raise ConfigError(
            f"storage.path: got {c.storage.path!r}, expected a folder on a file system that every node sees"
        )
    odd = c.storage.path is not None and any(ch in c.storage.path for ch in "?#\0")
    _require(
        not odd,
        "storage.path",
        repr(c.storage.path),
        "a path without ? and #, which mean something in MLflow's address",
    )
    if c.scaling.num_workers != "auto":
        check_workers(c, int(c.scaling.num_workers))


def check_workers(c: Config, num_workers: int) -> None:
    """The rules that the number of workers brings."""
    workers, batch = max(1, num_workers), c.train.batch_size
    _require(batch % workers == 0, "train.batch_size", batch, f"a multiple of the {workers} workers")
    each = batch // workers
    _require(each >= 2, "train.batch_size", batch, f"at least 2 images for each of the {workers} workers")
    rotated = int(each * c.rotation.fraction)
    enough = c.rotation.weight == 0 or rotated >= 2  # the head normalises over them
    _require(
        enough, "rotation.fraction", c.rotation.fraction, f"at least {2 / each:g}: two rotated images a worker and step"
    )


def replace(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with some dotted fields set to values of the right type."""
    for key, value in values.items():
        section, leaf = key.split(".")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{leaf: value})}
        )
    return config


def resolve(config: Config, image_size: int, train_size: int) -> Config:
    """Turn what was left open into values: image size, stem, optimizer, learning rate, paths, run name.

    What depends on the device (precision, layout, number of workers) stays ``auto`` here and is recorded as a tag of the run.

    Args:
        config: as built.
        image_size: native side of the stored images in pixels, for ``data.image_size auto``.
        train_size: number of training images.
    """
    spec, batch = METHODS[config.method.name], config.train.batch_size
    _require(batch <= train_size, "train.batch_size", batch, f"at most the {train_size} training images")
    side = image_size if config.data.image_size == "auto" else config.data.image_size
    stem = config.encoder.stem
    if stem == "auto":
        stem = "cifar" if config.encoder.name in RESNETS and side <= 64 else "imagenet"
    optimizer = spec.optimizer if config.optim.name == "auto" else config.optim.name
    scale = {"none": 1.0, "linear": batch / 256, "sqrt": (batch / 256) ** 0.5}
    if config.optim.lr == "auto":
        if optimizer != spec.optimizer:
            raise ConfigError(
                f"optim.lr: got 'auto', expected a number: {spec.config.__name__} has a rate for {spec.optimizer} only"
            )
        lr = spec.lr * scale["linear"]
    else:
        lr = config.optim.lr * scale[config.optim.lr_scale]
    config = replace(
        config,
        {
            "data.image_size": side,
            "data.root": None if config.data.root is None else os.path.abspath(os.path.expanduser(config.data.root)),
            "encoder.stem": stem,
            "optim.name": optimizer,
            "optim.lr": lr,
            "optim.lr_scale": "none",
        },
    )
    uri = config.tracking.uri
    if uri is not None and uri.startswith("sqlite:///"):  # workers run in another folder
        uri = f"sqlite:///{os.path.abspath(uri.removeprefix('sqlite:///'))}"
    default = "~/rotssl-results" if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") else "results"
    path = os.path.abspath(os.path.expanduser(config.storage.path or default))
    run_name = config.tracking.run_name or f"{config.method.name}-{config.data.name}-{fingerprint(config)}"
    return replace(config, {"storage.path": path, "tracking.run_name": run_name, "tracking.uri": uri})


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Nested plain values, as a recipe would hold them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))  # type: ignore[no-any-return]


def flat_dict(nested: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Dotted name -> value, from sections."""
    return {f"{section}.{leaf}": value for section, values in nested.items() for leaf, value in values.items()}


def flat(config: Config) -> dict[str, Any]:
    """Dotted name -> value."""
    return flat_dict(to_dict(config))


def identity(config: Config) -> dict[str, Any]:
    """The fields that decide what is computed; a run goes on only under the same ones."""
    return {key: value for key, value in flat(config).items() if not key.startswith(_NOT_IDENTITY)}


def fingerprint(config: Config) -> str:
    """Eight hexadecimal digits of the identity."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:8]
