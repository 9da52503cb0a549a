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
from rotssl.config.evaluation import EvaluationConfig
from rotssl.config.fields import Auto, opt
from rotssl.config.methods import METHODS, MethodConfig
from rotssl.config.oracle import OracleConfig
from rotssl.config.tasks import TaskSections
from rotssl.config.views import ViewsConfig

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
    """The images."""

    name: DatasetName = opt("fashion-mnist-sample", "Data set.")
    root: str | None = opt(None, "Folder of the data set; not needed for the sample and synthetic.")
    limit: int | None = opt(None, "Train on a class-balanced subset of this size.", ge=1)
    image_size: int | Auto = opt("auto", "Side of the global views in pixels; auto: native up to 96, else 224.", ge=8)
    download: bool = opt(False, "Let torchvision download the data set into data.root.")
    on_bad: Literal["error", "skip"] = opt(
        "error", "What is done about image files that cannot be read: stop, or leave them out and say so.", later=True
    )
    store: Literal["auto", "memory", "disk"] = opt(
        "auto",
        "Where decoded images are kept. disk: in one file that all processes of a node map (data sets in folders only). "
        "auto: in memory if they fit into 0.15 of this machine's, else on disk.",
    )
    cache: str | None = opt(
        None,
        "Folder for the files of data.store disk, and for shards of a packed set from an object store, on a local disk of each "
        "node; default: rotssl in the user's cache folder.",
    )
    cache_gb: float | None = opt(
        None,
        "Gigabytes of a packed set that are copied there; other pictures are read one by one. none: all of it.",
        gt=0,
    )
    interpolation: Literal["bilinear", "bicubic"] = opt(
        "bilinear", "How crops of a packed set's pictures are resized, always with antialiasing.", later=True
    )


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The network that is pretrained."""

    name: str = opt(
        "small", f"small (three residual blocks, for CPUs), torchvision's {', '.join(RESNETS)}, or timm/NAME."
    )
    stem: Literal["imagenet", "cifar", "auto"] = opt(
        "auto",
        "cifar: 3x3 stride 1, no pooling; imagenet: strided. auto: cifar for a ResNet on images up to 64 pixels.",
    )
    zero_init: bool = opt(False, "Start with the last norm of each residual block at 0 (small and torchvision's).")
    patch_size: int | Auto = opt(
        "auto", "Patch side in pixels of timm's vision transformers; auto: taken from the name.", ge=1
    )
    drop_path: float = opt(0.0, "Rate of stochastic depth in timm's encoders.", ge=0, lt=1)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Settings shared by the encoder and the heads."""

    norm: Literal["batch", "sync", "group", "split"] = opt(
        "sync",
        "BatchNorm per worker, BatchNorm over all workers, GroupNorm, or BatchNorm over each of norm_splits parts of the batch, "
        "which a teacher sees shuffled (MoCo); with sync and group, and mostly with split, N workers train as one would.",
    )
    norm_splits: int = opt(8, "Parts of the batch with norm split.", ge=2, later=True)
    joint_views: bool | Auto = opt(
        "auto",
        "Views of one size share a forward pass, and so BatchNorm's statistics; faster. auto: as the method's authors do.",
    )


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """Settings shared by all auxiliary tasks."""

    method_weight: float = opt(1.0, "Weight of the method's loss; 0: tasks alone, for analysis.", ge=0, later=True)
    log_gradients_every: int = opt(
        0, "Compare each task's gradient with the method's, at the encoder, every N steps; 0: never.", ge=0
    )
    guard: int = opt(
        200,
        "Judge each task after the warm-up and N more steps, by its accuracy over the last half of these: one that has not "
        "left chance, or is solved, is switched off; 0: never.",
        ge=0,
        later=True,
    )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    name: Literal["auto", "sgd", "lars", "adamw"] = opt("auto", "Optimizer; auto: the method's default.")
    lr: float | Auto = opt("auto", "Peak learning rate; auto: the method's default, scaled by batch_size / 256.", gt=0)
    lr_scale: Literal["none", "linear", "sqrt"] = opt(
        "none", "How lr, warmup_lr and final_lr are scaled by batch_size / 256."
    )
    weight_decay: float = opt(5e-4, "Weight decay; see decay_norms.", ge=0)
    decay_norms: bool = opt(
        False,
        "Treat biases and norm layers as other weights: they decay, and LARS scales their rates, too.",
        later=True,
    )
    weight_decay_end: float | None = opt(
        None, "Weight decay at the end of the run, approached along a cosine; null: constant.", ge=0
    )
    momentum: float = opt(0.9, "Momentum (AdamW: beta 1).", ge=0, lt=1)
    trust: float = opt(0.001, "Trust coefficient eta of LARS.", gt=0)
    clip_norm: float | None = opt(None, "Maximum norm of the whole gradient; a longer one is scaled down.", gt=0)
    warmup_epochs: float | Auto = opt(
        "auto", "Length of the linear warm-up in epochs; auto: a tenth of the run, 1 to 10 epochs.", ge=0
    )
    warmup_lr: float = opt(0.0, "Learning rate at the start of the warm-up.", ge=0)
    schedule: Literal["cosine", "constant"] = opt("cosine", "Shape of the learning rate after the warm-up.")
    final_lr: float = opt(0.0, "Learning rate at the end of the cosine.", ge=0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    epochs: int = opt(10, "Length of the run; all schedules span it.", ge=1)
    budget: float | None = opt(
        None,
        "Minutes for the whole run, in place of train.epochs: the first start times a few steps and chooses the epochs.",
        gt=0,
        later=True,
    )
    batch_size: int = opt(256, "Images per step, over all workers.", ge=2)
    accumulate: int = opt(
        1,
        "Forward passes per step, each on a part of the batch, to save memory; only if the loss is a mean over images.",
        ge=1,
    )
    seed: int = opt(0, "Seed of weights, sample order, views and rotations.", ge=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = opt(
        "auto", "Numerical precision; auto: bf16 on GPUs that support it, else fp32."
    )
    deterministic: bool = opt(False, "Raise an error for operations that have no deterministic implementation.")
    compile: bool = opt(
        False,
        "Compile encoder and projector, and on GPUs the making of views (torch.compile); half a minute or more at the start.",
    )
    channels_last: bool = opt(
        True, "Use the channels-last memory layout for images; convolutions are faster with it, on CPUs too."
    )
    stop_after: int | None = opt(None, "Stop after this epoch as if interrupted; not part of the run's identity.", ge=1)
    init_from: str | None = opt(
        None,
        "Start with the weights of another run of the same method and networks: its folder, or that of one of its checkpoints. "
        "Schedules start anew.",
        later=True,
    )
    save_minutes: float = opt(
        15.0,
        "Save the state also within an epoch when so many minutes have passed since the last save; 0: only at its end.",
        ge=0,
        later=True,
    )
    save_every: int | Auto = opt(
        1,
        "Save the state after every N-th epoch; auto: as often as takes at most a fortieth of the training time. The first "
        "epoch of a start and the last one are saved in any case, and so is one after save_minutes.",
        ge=1,
        later=True,
    )
    keep_every: int = opt(0, "Keep the checkpoint of every N-th epoch for good; 0: of none.", ge=0, later=True)
    max_skipped: int | None = opt(
        None, "With on_nan skip: most steps of an epoch that are skipped; null: all but one.", ge=0, later=True
    )
    on_collapse: Literal["flag", "stop"] = opt(
        "flag",
        "When the spread of the projections or the rank of the features collapses: say it and go on, or end the run as failed. "
        "Reports leave it out either way.",
        later=True,
    )
    on_nan: Literal["fail", "skip"] = opt(
        "fail", "On a gradient that is not finite: end the run as failed, or skip the step, which then changes nothing."
    )

    def share(self, workers: int) -> int:
        """Images of a batch that each worker gets; 0 workers count as one."""
        return math.ceil(self.batch_size / max(1, workers))


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """The workers."""

    num_workers: int | Auto = opt(
        "auto",
        "Ray Train workers; auto: one per GPU, else 2 CPU workers, if they can share the batch; 0: no Ray.",
        ge=0,
    )
    use_gpu: bool | Auto = opt("auto", "Whether each worker uses a GPU.")
    cpus_per_worker: int = opt(1, "CPU cores reserved per worker.", ge=1)
    hang_minutes: float = opt(
        30.0,
        "End and restart Ray Train workers that show no sign of life (a step, an evaluated batch, a decoded image) for so long; "
        "0: never. Longer than any single operation takes, such as a compilation.",
        ge=0,
        later=True,
    )
    wait_minutes: float | Auto = opt(
        "auto",
        "How long a run waits for nodes: for those of a cluster that still grows, and for others in place of lost ones; auto: "
        "not at all at its start, and 10 minutes for lost ones.",
        ge=0,
        later=True,
    )
    elastic: bool = opt(
        False,
        "Go on with fewer workers while nodes are missing for over a minute, as many as share the batch, and with all once they "
        "are back.",
        later=True,
    )


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow."""

    uri: Literal["off"] | str | None = opt(
        None,
        "MLflow tracking URI; off (quoted in YAML): no MLflow, curves only in metrics.jsonl; default: an sqlite file in "
        "storage.path.",
    )
    required: bool = opt(
        True,
        "Refuse to start a run whose store cannot be used; false: go on with metrics.jsonl, and send it at the next start.",
    )
    experiment: str = opt("rotssl", "MLflow experiment, and name of the folder in storage.path.")
    run_name: str | None = opt(None, "Name of the run; default: method, data set and a hash of the configuration.")
    system_seconds: float = opt(
        10.0,
        "Seconds between two samples of the use of each machine (CPU, memory, GPUs) for MLflow's system metrics; 0: none.",
        ge=0,
        later=True,
    )


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """Where results go."""

    path: str | None = opt(
        None,
        "Folder for results that all nodes can see, or s3://BUCKET/PREFIX, gs://..., abfs://...; default: ./results, or "
        "~/rotssl-results in a Ray job.",
    )


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
    oracle: OracleConfig = field(default_factory=OracleConfig)
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


def schema(method: str = "byol") -> Mapping[str, tuple[Any, dataclasses.Field[Any]]]:
    """Dotted name -> (type, field) of every field, with the fields of the given method."""
    return _schema(METHODS[method].config)  # type: ignore[arg-type]  # a class is hashable


@functools.cache  # get_type_hints takes a millisecond, and flags and sweeps call this again and again
def _schema(method: type[MethodConfig]) -> Mapping[str, tuple[Any, dataclasses.Field[Any]]]:
    classes = get_type_hints(Config) | {"method": method}
    parts = ((section.name, classes[section.name]) for section in dataclasses.fields(Config))
    return MappingProxyType({key: spec for part in parts for key, spec in fields_of(*part).items()})
