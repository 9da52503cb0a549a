"""The sections of a configuration: frozen dataclasses whose fields carry their help text, default and bounds.

Imports no torch, ray or mlflow. The section ``method`` belongs to the method: rotssl.config.methods.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_type_hints

from rotssl.config.datasets import DatasetName
from rotssl.config.fields import Auto, opt
from rotssl.config.methods import METHODS, MethodConfig
from rotssl.config.tasks import TaskSections

OFF = "off"  # tracking.uri of a run without MLflow; none is the default, as for all fields
RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images."""

    name: DatasetName = opt("fashion-mnist-sample", "Data set.")
    root: str | None = opt(None, "Folder of the data set; the sample and synthetic need none.")
    limit: int | None = opt(None, "Train on a class-balanced subset of this many images.", ge=1)
    image_size: int | Auto = opt("auto", "Side of the global views, in pixels; auto: native up to 96, else 224.", ge=8)
    download: bool = opt(False, "Let torchvision download the data set into data.root.")
    store: Literal["auto", "memory", "disk"] = opt(
        "auto",
        "Where decoded images are kept; disk: in a file that all processes of a node map, for sets in folders; auto: memory "
        "for up to 0.15 of this machine's.",
    )
    cache: str | None = opt(
        None, "Folder of such files, on each node's own disk; default: rotssl in the user's cache folder."
    )


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """How the random views of an image are made. ``blur`` and ``solarize``: one value, or one a global view."""

    global_count: int = opt(2, "Number of global views.", ge=2, le=8)
    global_scale: tuple[float, float] = opt((0.2, 1.0), "Smallest and largest share of the area of a crop.", gt=0, le=1)
    local_count: int = opt(0, "Number of small local views (multi-crop), which only the student sees.", ge=0, le=16)
    local_size: int | Auto = opt("auto", "Side of the local views; auto: 3/7 of the global ones' (96 of 224).", ge=4)
    local_scale: tuple[float, float] = opt((0.05, 0.14), "Share of the area of a local crop.", gt=0, le=1)
    jitter: tuple[float, float, float, float] = opt(
        (0.4, 0.4, 0.4, 0.1), "Strength of brightness, contrast, saturation and hue.", ge=0, le=1
    )
    jitter_p: float = opt(0.8, "Probability of the colour jitter.", ge=0, le=1)
    grayscale: float = opt(0.2, "Probability of turning gray.", ge=0, le=1)
    blur: tuple[float, ...] = opt((0.0,), "Probability of Gaussian blur.", ge=0, le=1)
    local_blur: float = opt(0.0, "The same for local views.", ge=0, le=1)
    solarize: tuple[float, ...] = opt((0.0,), "Probability of solarisation; local views have none.", ge=0, le=1)
    flip: float = opt(0.5, "Probability of a horizontal flip.", ge=0, le=1)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The network that is pretrained."""

    name: str = opt(
        "small", f"small (three residual blocks, for CPUs), {', '.join(RESNETS)} of torchvision, or timm/NAME."
    )
    stem: Literal["imagenet", "cifar", "auto"] = opt(
        "auto",
        "cifar: 3x3 stride 1, no pooling; imagenet: strided. auto: cifar for a ResNet on images up to 64 pixels.",
    )
    zero_init: bool = opt(False, "Start with the last norm of each residual block at 0 (small and torchvision's).")
    patch_size: int | Auto = opt(
        "auto", "Side of a patch, of timm's vision transformers; auto: as the name has it.", ge=1
    )
    drop_path: float = opt(0.0, "Stochastic depth, of timm's encoders.", ge=0, lt=1)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What encoder and heads share."""

    norm: Literal["batch", "sync", "group"] = opt(
        "sync", "BatchNorm per worker, over all workers, or GroupNorm; for sync and group N workers train as one would."
    )
    joint_views: bool | Auto = opt(
        "auto",
        "Whether views of one size share a pass, and so BatchNorm's statistics; it is faster. auto: as the method's authors do.",
    )


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """What all auxiliary tasks share."""

    log_gradients_every: int = opt(
        0, "Steps between comparisons of each task's gradient with the method's, at the encoder; 0: never.", ge=0
    )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    name: Literal["auto", "sgd", "lars", "adamw"] = opt("auto", "Optimizer; auto: the one that suits the method.")
    lr: float | Auto = opt("auto", "Peak learning rate; auto: the method's, scaled linearly by batch_size / 256.", gt=0)
    lr_scale: Literal["none", "linear", "sqrt"] = opt(
        "none", "Scale given rates (lr, warmup_lr, final_lr) by batch_size / 256."
    )
    weight_decay: float = opt(5e-4, "Weight decay; biases and norm layers are left out.", ge=0)
    weight_decay_end: float | None = opt(None, "Weight decay at the end of the run, reached along a cosine.", ge=0)
    momentum: float = opt(0.9, "Momentum (AdamW: beta 1).", ge=0, lt=1)
    trust: float = opt(0.001, "LARS: the trust coefficient eta.", gt=0)
    clip_norm: float | None = opt(None, "Largest norm of the whole gradient; a longer one is scaled down.", gt=0)
    warmup_epochs: float = opt(1.0, "Epochs of linear warm-up.", ge=0)
    warmup_lr: float = opt(0.0, "Learning rate that the warm-up starts from.", ge=0)
    schedule: Literal["cosine", "constant"] = opt("cosine", "Course of the learning rate after warm-up.")
    final_lr: float = opt(0.0, "Learning rate at the end of the cosine.", ge=0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    epochs: int = opt(10, "Length of the run; the schedules span it.", ge=1)
    batch_size: int = opt(256, "Images a step over all workers.", ge=2)
    accumulate: int = opt(
        1,
        "Forward passes that a step's batch is cut into, for memory; only where the loss is a mean over images.",
        ge=1,
    )
    seed: int = opt(0, "Seed of weights, sample order, views and rotations.", ge=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = opt("auto", "auto: bf16 on GPUs that have it, else fp32.")
    deterministic: bool = opt(False, "Refuse operations that have no deterministic form.")
    compile: bool = opt(
        False,
        "Compile encoder and projector (torch.compile), which takes half a minute or more at the start.",
    )
    channels_last: bool = opt(True, "Memory layout of images; convolutions are faster with it, on CPUs too.")
    stop_after: int | None = opt(None, "Stop after this epoch as if interrupted; not part of the run's identity.", ge=1)
    on_nan: Literal["fail", "skip"] = opt(
        "fail", "A gradient that is not finite: end the run as failed, or skip such steps, which then change nothing."
    )

    def share(self, workers: int) -> int:
        """Images of a batch that each of so many workers has; 0 stands for one."""
        return math.ceil(self.batch_size / max(1, workers))


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """The workers."""

    num_workers: int | Auto = opt(
        "auto", "Ray Train workers; auto: one a GPU, else 2 CPU workers, if they can share the batch; 0: no Ray.", ge=0
    )
    use_gpu: bool | Auto = opt("auto", "Whether each worker takes a GPU.")
    cpus_per_worker: int = opt(1, "CPU cores a worker reserves.", ge=1)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured while training."""

    knn_every: int = opt(1, "Epochs between kNN evaluations on validation; 0: never.", ge=0)
    knn_bf16: bool = opt(
        False, "Compute kNN's cosines in bf16, for large banks on devices that have it; a few predictions change."
    )
    linear: bool = opt(True, "Train a linear probe on the features of the last epoch.")
    holdout: float = opt(
        0.1,
        "Share of train held out for validation where the data have no validation split; 0: train on all of it, and measure "
        "once, at the end, on the test split.",
        ge=0,
        lt=1,
    )


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow."""

    uri: Literal["off"] | str | None = opt(
        None,
        "MLflow tracking URI; off (in YAML in quotes): no MLflow, curves in metrics.jsonl only; default: an sqlite file below "
        "storage.path.",
    )
    experiment: str = opt("rotssl", "MLflow experiment, and folder below storage.path.")
    run_name: str | None = opt(None, "Name of the run; default: method-data-hash of the configuration.")


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """Results."""

    path: str | None = opt(None, "Folder that all nodes see; default: ./results, inside a Ray job ~/rotssl-results.")


@dataclass(frozen=True, kw_only=True)
class _First:
    """The sections that come before the tasks."""

    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=METHODS["byol"].config)


@dataclass(frozen=True, kw_only=True)
class Config(TaskSections, _First):
    """One run: its sections, in the order of the field's base classes, the last one first."""

    tasks: TasksConfig = field(default_factory=TasksConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)


def fields_of(section: str, cls: type) -> dict[str, tuple[Any, dataclasses.Field[Any]]]:
    """Dotted name -> (type, field) of a section's fields."""
    hints = get_type_hints(cls)
    return {f"{section}.{f.name}": (hints[f.name], f) for f in dataclasses.fields(cls)}


@functools.cache  # typing takes a millisecond to tell what the types are, which flags and sweeps ask for again and again
def schema(method: str = "byol") -> Mapping[str, tuple[Any, dataclasses.Field[Any]]]:
    """Dotted name -> (type, field) of every field, with the fields of the given method."""
    classes = get_type_hints(Config) | {"method": METHODS[method].config}
    parts = ((section.name, classes[section.name]) for section in dataclasses.fields(Config))
    return MappingProxyType({key: spec for part in parts for key, spec in fields_of(*part).items()})
