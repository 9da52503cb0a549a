"""The registry of auxiliary tasks: their sections of the configuration, and where their code lives.

A new task is a section here, a line in ``TaskSections``, and its module in rotssl/tasks/. If its section has fields that may be
``auto``, ``TaskConfig.resolve`` gives their values, and rotssl/config/resolved.py their types. Imports no torch.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_type_hints

from rotssl.config.fields import Auto, load_class, opt, require

if TYPE_CHECKING:
    from rotssl.tasks.base import Task

# Tiles of 64 pixels in cells of 75, as in section 4.2 of the paper: the gap keeps edges from giving the order away.
TILE_SHARE = 0.85


def part_of(side: int) -> int:
    """The 96 pixels that go with 224."""
    return max(4, round(side * 3 / 7))


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """The section of a task.

    Attributes:
        FOLLOWS: field -> the fields that ``auto`` makes it from: where it is as they have it, it tells no runs apart.
        ENDS: fields that say where something ends that changes over the run; None: it stays.
        weight: of its loss; 0 is off.
        schedule: of the weight over the run.
    """

    FOLLOWS: ClassVar[dict[str, tuple[str, ...]]] = {}
    ENDS: ClassVar[tuple[str, ...]] = ()

    weight: float
    schedule: Literal["constant", "linear", "cosine"] = opt("constant", "Course of the weight over the run, down to 0.")

    def check(self) -> None:
        """The rules between its fields.

        Raises:
            ConfigError: one is broken.
        """

    def check_share(self, each: int) -> None:
        """The rule for the number of images that a worker has in a forward pass; asked where the task is on.

        Raises:
            ConfigError: there are too few.
        """

    def resolve(self, side: int, batch: int) -> dict[str, Any]:
        """What ``auto`` stands for, by field, for global views of a side in pixels and a batch of all workers."""
        return {}

    def sides(self, side: int) -> dict[str, int]:
        """Side of each kind of view that the task makes for itself, in pixels, by the field that decides; once resolved."""
        return {}

    @property
    def least_share(self) -> float:
        """The least share of the images that enter its loss in a step."""
        return 1.0

    @property
    def changes(self) -> bool:
        """Whether its work changes over the run, along a cosine; once resolved."""
        return False


@dataclass(frozen=True, kw_only=True)
class RotationConfig(TaskConfig):
    """The auxiliary task of predicting a rotation by 0, 90, 180 or 270 degrees (arXiv 2210.09866)."""

    FOLLOWS: ClassVar[dict[str, tuple[str, ...]]] = {
        "fraction_end": (
            *("rotation.mode", "rotation.angles", "rotation.fraction"),
            *("train.batch_size", "train.accumulate"),
        )
    }
    ENDS: ClassVar[tuple[str, ...]] = ("fraction_end",)

    weight: float = opt(1.0, "Weight of the mean cross-entropy over the rotated views; 0 is off.", ge=0)
    mode: Literal["extra", "in_place", "four_way"] = opt(
        "in_place",
        "in_place: the method's views turn, no extra forward; extra: rotated views get a forward of their own (the paper's "
        "recipe); four_way: a small crop of its own, in all four angles (E-SSL, arXiv 2111.00899).",
    )
    angles: Literal["shared", "independent"] = opt(
        "shared",
        "In place: one angle for all views of an image, or one for each student view (teacher's stay upright).",
    )
    views: int = opt(2, "Number of rotated views of an image in extra mode.", ge=1, le=2)
    resolution: float = opt(1.0, "Side of the extra views, as a share of the method's.", gt=0, le=1)
    joint: bool = opt(False, "Whether the extra views share a pass, and so BatchNorm's statistics, with the method's.")
    fraction: float = opt(1.0, "Share of the images that are rotated and enter the loss.", gt=0, le=1)
    fraction_end: float | Auto | None = opt(
        "auto",
        "That share at the end of the run, reached along a cosine; none: it stays; auto: 1/8 (or 16 images a step, if these "
        "are more) in place with shared angles where fraction is 1, else it stays.",
        gt=0,
        le=1,
    )
    update_bn: bool = opt(True, "Whether the extra forward also updates BatchNorm's running statistics.")
    hidden_dim: int = opt(128, "Width of the head's hidden layer.", ge=1)
    head_on: Literal["encoder", "projector"] = opt(
        "encoder",
        "What the head sees: the encoder's features (the official code), or the projector's output (the paper, eq. 1).",
        later=True,
    )
    crop_size: int | Auto = opt(
        "auto", "Side of four_way's crop; auto: half of the global views' up to 64 pixels, else 3/7.", ge=4
    )
    crop_scale: tuple[float, float] = opt((0.2, 1.0), "Share of the area of four_way's crop.", gt=0, le=1)

    def extra_side(self, side: int) -> int:
        """Side of the extra views in pixels, for the method's."""
        return max(1, round(side * self.resolution))

    def check(self) -> None:
        """Fields that are for other modes; shares of area."""
        low, high = self.crop_scale
        require(low <= high, "rotation.crop_scale", f"({low}, {high})", "the smaller share first")
        modes = {"views": ("extra",), "resolution": ("extra",), "joint": ("extra",), "update_bn": ("extra", "four_way")}
        modes["angles"] = ("in_place",)
        for key, takes in modes.items():
            given, value = getattr(self, key), getattr(RotationConfig, key)
            fits = self.mode in takes or given == value or self.weight == 0
            expected = f"{value} in mode {self.mode}; it is for rotation.mode {' and '.join(takes)}"
            require(fits, f"rotation.{key}", given, expected)
        fits = self.update_bn or not self.joint or self.weight == 0
        require(fits, "rotation.update_bn", "false", "true: with rotation.joint there is one pass for all views")

    def check_share(self, each: int) -> None:
        """At least two images of a worker's are rotated: the head normalises over them."""
        expected = f"at least {2 / each:g}: two rotated images a worker and step"
        for key, stays in (("fraction", ""), ("fraction_end", ", or none: the share stays")):
            share = getattr(self, key)
            enough = share in (None, "auto") or int(each * share) >= 2
            require(enough, f"rotation.{key}", share, expected + stays)

    def resolve(self, side: int, batch: int) -> dict[str, Any]:
        """Half of small views for four_way's crop; the share of rotated images falls where that was measured to be best.

        benchmarks/rotation_variants.py found that; it falls no further than leaves 16 rotated images in a step.
        """
        crop = max(4, side // 2) if side <= 64 else part_of(side)
        falls = self.mode == "in_place" and self.angles == "shared" and self.fraction == 1
        end = max(0.125, 16 / batch) if falls and batch > 16 else None
        return {
            "crop_size": crop if self.crop_size == "auto" else self.crop_size,
            "fraction_end": end if self.fraction_end == "auto" else self.fraction_end,
        }

    def sides(self, side: int) -> dict[str, int]:
        """Of the views that get a forward of their own."""
        if self.mode == "four_way":
            assert self.crop_size != "auto"
            return {"crop_size": self.crop_size}
        return {"resolution": self.extra_side(side)} if self.mode == "extra" else {}

    @property
    def least_share(self) -> float:
        """The smaller one of both ends."""
        return self.fraction if self.fraction_end in (None, "auto") else min(self.fraction, float(self.fraction_end))

    @property
    def changes(self) -> bool:
        """The share of rotated images falls or rises."""
        return self.fraction_end is not None


@dataclass(frozen=True, kw_only=True)
class JigsawConfig(TaskConfig):
    """The auxiliary task of putting shuffled tiles back in order, Noroozi and Favaro 2016 (arXiv 1603.09246)."""

    weight: float = opt(0.0, "Weight of the cross-entropy over the orders; 0 is off.", ge=0)
    grid: int = opt(3, "The image is cut into grid x grid cells.", ge=2, le=3)
    permutations: int = opt(100, "Number of orders to tell apart; grid 2 has 24.", ge=2, le=1000)
    update_bn: bool = opt(True, "Whether its forward also updates BatchNorm's running statistics.")
    hidden_dim: int = opt(128, "Width of the head's hidden layer.", ge=1)

    def check(self) -> None:
        """No more orders than there are."""
        orders = math.factorial(self.grid**2)
        most = f"at most {orders}, the orders of {self.grid**2} tiles"
        require(self.permutations <= orders, "jigsaw.permutations", self.permutations, most)

    def tile_side(self, side: int) -> int:
        """Side of a tile, in pixels, of an image of the given side."""
        return max(1, round(TILE_SHARE * (side // self.grid)))

    def sides(self, side: int) -> dict[str, int]:
        """Of the tiles."""
        return {"grid": self.tile_side(side)}


def _task(config: type[TaskConfig], target: str, *, later: bool = False) -> Any:
    """A task of ``TaskSections``; ``later``: it came after runs had been recorded, whose identity it must not change."""
    return field(default_factory=config, metadata={"target": target, "later": later})


@dataclass(frozen=True, kw_only=True)
class TaskSections:
    """The tasks of a run, in the order in which their losses are added."""

    rotation: RotationConfig = _task(RotationConfig, "rotssl.tasks.rotation:Rotation")
    jigsaw: JigsawConfig = _task(JigsawConfig, "rotssl.tasks.jigsaw:Jigsaw")

    def active(self) -> dict[str, TaskConfig]:
        """Sections of the tasks that are on, by name."""
        sections = {name: getattr(self, name) for name in TASKS}
        return {name: section for name, section in sections.items() if section.weight > 0}


@dataclass(frozen=True)
class TaskSpec:
    """What the registry holds of a task: its section, module and class, and whether it came after recorded runs."""

    config: type[TaskConfig]
    target: str
    later: bool

    def load(self) -> "type[Task]":
        """Import the task's class (and with it torch)."""
        return load_class(self.target)  # type: ignore[no-any-return]


_HINTS = get_type_hints(TaskSections)
TASKS = {f.name: TaskSpec(_HINTS[f.name], **f.metadata) for f in dataclasses.fields(TaskSections)}
WEIGHTS = tuple(f"{name}.weight" for name in TASKS)
