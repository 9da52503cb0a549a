"""The registry of auxiliary tasks: their sections of the configuration, and where their code lives.

A new task is a section here, a line in ``TaskSections``, and its module in rotssl/tasks/. If its section has fields that may be
``auto``, ``TaskConfig.resolve`` gives their values, and rotssl/config/resolved.py their types. Imports no torch.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_type_hints

from rotssl.base.schedules import cosine
from rotssl.config.fields import Auto, load_class, opt, require
from rotssl.config.task import TaskConfig

if TYPE_CHECKING:
    from rotssl.tasks.base import Task

# Tiles of 64 pixels in cells of 75, as in section 4.2 of the paper: the gap keeps edges from giving the order away.
TILE_SHARE = 0.85
SIXTEENTHS = 16  # parts of the batch that rotation's mode disjoint divides
EIGHTHS = 8  # likewise equivariance: sixteen images are whole pairs


def _in_parts(share: float, parts: int) -> float:
    """A share in whole parts, at least one unless it is 0, so that every worker's part of the batch has as many of them."""
    return max(1, round(share * parts)) / parts if share else 0.0


def part_of(side: int) -> int:
    """Return the side of a small view for global views of a given side: 96 for 224 pixels."""
    return max(4, round(side * 3 / 7))


@dataclass(frozen=True, kw_only=True)
class RotationConfig(TaskConfig):
    """The auxiliary task of predicting a rotation, by default by 0, 90, 180 or 270 degrees (arXiv 2210.09866)."""

    FOLLOWS: ClassVar[dict[str, tuple[str, ...]]] = {
        "fraction_end": (
            *("rotation.mode", "rotation.angles", "rotation.fraction"),
            *("train.batch_size", "train.accumulate"),
        ),
        "fraction": ("rotation.mode",),
    }
    ENDS: ClassVar[tuple[str, ...]] = ("fraction_end",)

    weight: float | Auto = opt(
        1.0, "Weight of the mean cross-entropy over the rotated views; 0: off; auto: set by rotation.share.", ge=0
    )
    mode: Literal["extra", "in_place", "disjoint", "four_way", "augment"] = opt(
        "in_place",
        "in_place: rotate the method's own views, no extra forward pass; disjoint: likewise, but the rotated images enter "
        "only the task's loss; extra: a separate forward pass on rotated views (the paper's recipe); four_way: a separate "
        "small crop at all four angles (E-SSL, arXiv 2111.00899). augment, for analysis: rotation as an augmentation without the "
        "task: every view, also the teacher's, by an angle of its own; the head only watches.",
    )
    angles: Literal["shared", "independent"] = opt(
        "shared",
        "In mode in_place: one angle for all views of an image, or one per student view (the teacher's stay upright).",
    )
    degrees: tuple[int, ...] = opt(
        (0, 90, 180, 270),
        "Angles to tell apart. Others than 0, 90, 180 and 270 are for mode extra: they interpolate pixels and leave empty "
        "corners, which tell the angle.",
        ge=0,
        le=359,
        later=True,
    )
    loss: Literal["cross_entropy", "contrastive", "cosine"] = opt(
        "cross_entropy",
        "cross_entropy: classify the angle; contrastive: views that turned by the same angle attract each other, and repel the "
        "others (arXiv 2004.11362), in the head's normalised outputs of the whole batch; cosine, in mode extra: the two views of "
        "an image turn by different angles, and their outputs repel each other.",
        later=True,
    )
    temperature: float = opt(0.1, "Temperature of the contrastive loss.", gt=0, later=True)
    label_noise: float = opt(
        0.0,
        "For analysis: this share of the images (exact in each batch) gets its label drawn anew, uniformly over the angles, the "
        "right one among them; at 1 labels tell nothing.",
        ge=0,
        le=1,
        later=True,
    )
    conditioned: bool = opt(
        False,
        "In mode in_place: tell the projector each view's angle, so that the method need not ignore it.",
        later=True,
    )
    views: int = opt(2, "Number of rotated views per image in mode extra.", ge=1, le=2)
    resolution: float = opt(1.0, "Side of the extra views relative to the method's.", gt=0, le=1)
    joint: bool = opt(
        False, "Whether the extra views share a forward pass, and so BatchNorm's statistics, with the method's."
    )
    fraction: float | Auto = opt(
        "auto",
        "Share of the images that is rotated and enters the loss; auto: 1/4 in mode disjoint, else 1. In mode disjoint it is "
        "rounded to sixteenths.",
        gt=0,
        le=1,
    )
    fraction_end: float | Auto | None = opt(
        "auto",
        "This share when the task ends, approached along a cosine; none: constant; 0: none below 1/16; auto: 1/16 in mode "
        "disjoint, 1/8 (at least 16 images per step) in mode in_place with shared angles and fraction 1, else constant.",
        ge=0,
        le=1,
    )
    update_bn: bool = opt(True, "Whether the extra forward pass also updates BatchNorm's running statistics.")
    hidden_dim: int = opt(128, "Width of the head's hidden layer.", ge=1)
    head_on: Literal["encoder", "projector", "stage", "stem", "stage1", "stage2"] = opt(
        "encoder",
        "Input of the head: the encoder's features (the official code), the projector's output (the paper, eq. 1), or the "
        "mean over the map of the encoder's last stage but one (stage), first layers (stem), or first or second of four stages.",
        later=True,
    )
    crop_size: int | Auto = opt(
        "auto",
        "Side of four_way's crop; auto: 1/2 of the global views' side if that is at most 64 pixels, else 3/7.",
        ge=4,
    )
    crop_scale: tuple[float, float] = opt(
        (0.2, 1.0), "Smallest and largest crop in mode four_way, as shares of the image area.", gt=0, le=1
    )

    def extra_side(self, side: int) -> int:
        """Return the side of the extra views in pixels, given the method's."""
        return max(1, round(side * self.resolution))

    def check(self) -> None:
        """Check that no field belongs to another mode, the angles, and the shares of area."""
        low, high = self.crop_scale
        require(low <= high, "rotation.crop_scale", f"({low}, {high})", "the smaller share first")
        modes = {"views": ("extra",), "resolution": ("extra",), "joint": ("extra",), "update_bn": ("extra", "four_way")}
        modes |= {"angles": ("in_place",), "conditioned": ("in_place",)}
        modes |= {"label_noise": ("in_place", "disjoint", "extra", "augment")}  # four_way has every angle of an image
        for key, takes in modes.items():
            given, value = getattr(self, key), getattr(RotationConfig, key)
            fits = self.mode in takes or given == value or not self.on
            expected = f"{value} in mode {self.mode}; it is for rotation.mode {' and '.join(takes)}"
            require(fits, f"rotation.{key}", given, expected)
        fits = self.update_bn or not self.joint or not self.on
        require(fits, "rotation.update_bn", "false", "true: with rotation.joint all views share one forward pass")
        fits = self.mode != "augment" or self.weight != "auto"
        expected = "a number, and no rotation.share, in mode augment, whose head has no gradient at the encoder"
        require(fits, "rotation.weight", self.weight, expected)
        fits = self.loss == "contrastive" or self.temperature == RotationConfig.temperature or not self.on
        require(fits, "rotation.temperature", self.temperature, "rotation.loss contrastive, which alone has one")
        fits = self.loss != "cosine" or not self.on or (self.mode == "extra" and self.views == 2)
        expected = "cross_entropy or contrastive; cosine compares the two views of rotation.mode extra"
        require(fits, "rotation.loss", self.loss, expected)
        fits = self.loss != "cosine" or not self.on or self.label_noise == 0
        require(fits, "rotation.label_noise", self.label_noise, "0 with rotation.loss cosine, which reads no label")
        apart = 2 <= len(set(self.degrees)) == len(self.degrees)
        require(apart, "rotation.degrees", self.degrees, "two or more angles, each once")
        fits = self.mode == "extra" or not self.on or all(angle % 90 == 0 for angle in self.degrees)
        expected = f"angles of 0, 90, 180 and 270 in mode {self.mode}; others are for rotation.mode extra"
        require(fits, "rotation.degrees", self.degrees, expected)
        fits = self.conditioned is False or self.head_on != "projector"
        require(fits, "rotation.head_on", "projector", "encoder or a stage: a conditioned projector is told the angle")

    def check_share(self, each: int) -> None:
        """Check that each worker rotates at least two images, over which the head normalises, and leaves the method two."""
        if self.mode == "disjoint":
            fits, expected = each % SIXTEENTHS == 0, f"a multiple of {SIXTEENTHS} in rotation.mode disjoint"
            require(fits, "train.batch_size", f"{each} images per worker and pass", expected)
        expected = f"at least {2 / each:g}: two rotated images per worker and step"
        for key, stays in (("fraction", ""), ("fraction_end", ", or none for a constant share")):
            share = getattr(self, key)
            if share in (None, "auto"):
                continue
            turned = int(each * (self._rounded(share) or 1 / SIXTEENTHS))
            require(turned >= 2, f"rotation.{key}", share, expected + stays)
            upright = self.mode != "disjoint" or each - turned >= 2
            require(upright, f"rotation.{key}", share, "less: two images per worker and step that are not rotated")

    def resolve(self, side: int, batch: int) -> dict[str, Any]:
        """Resolve four_way's crop to half the side of small views, and let the share of rotated images fall where that was best.

        Decision 002 has what was measured. At least 16 rotated images remain in each step.
        """
        crop = max(4, side // 2) if side <= 64 else part_of(side)
        disjoint = self.mode == "disjoint"
        start = (0.25 if disjoint else 1.0) if self.fraction == "auto" else self.fraction
        falls = self.mode == "in_place" and self.angles == "shared" and start == 1 and batch > 16
        end = min(start, 1 / SIXTEENTHS) if disjoint else max(0.125, 16 / batch) if falls else None
        return {
            "crop_size": crop if self.crop_size == "auto" else self.crop_size,
            "fraction": start,
            "fraction_end": end if self.fraction_end == "auto" else self.fraction_end,
        }

    def _rounded(self, share: float) -> float:
        return _in_parts(share, SIXTEENTHS) if self.mode == "disjoint" else share

    def share_at(self, progress: float) -> float:
        """Return the share of the images that is rotated."""
        assert self.fraction != "auto" and self.fraction_end != "auto"
        start, end = self.fraction, self.fraction_end
        if end is None:
            return self._rounded(start)
        share = cosine(start, end, self.part(progress))
        # A share that ends at 0 does so below a sixteenth: the head needs two images.
        return 0.0 if end == 0 and share < 1 / SIXTEENTHS else self._rounded(share)

    def sides(self, side: int) -> dict[str, int]:
        """Return the side of the views that get a separate forward pass."""
        if self.mode == "four_way":
            assert self.crop_size != "auto"
            return {"crop_size": self.crop_size}
        return {"resolution": self.extra_side(side)} if self.mode == "extra" else {}

    @property
    def least_share(self) -> float:
        """The smaller of the shares at the start and at the end."""
        given = (share for share in (self.fraction, self.fraction_end) if share not in (None, "auto"))
        shares = [float(share) or 1 / SIXTEENTHS for share in given]
        return min(shares, default=1 / SIXTEENTHS if self.mode == "disjoint" else 1.0)


@dataclass(frozen=True, kw_only=True)
class JigsawConfig(TaskConfig):
    """The auxiliary task of predicting the order of shuffled tiles, Noroozi and Favaro 2016 (arXiv 1603.09246)."""

    weight: float | Auto = opt(
        0.0, "Weight of the cross-entropy over the tile orders; 0: off; auto: set by jigsaw.share.", ge=0
    )
    grid: int = opt(3, "Cut the image into grid x grid cells.", ge=2, le=3)
    permutations: int = opt(100, "Number of tile orders to tell apart; grid 2 has 24.", ge=2, le=1000)
    update_bn: bool = opt(True, "Whether its forward pass also updates BatchNorm's running statistics.")
    hidden_dim: int = opt(128, "Width of the head's hidden layer.", ge=1)

    def check(self) -> None:
        """Check that the grid has this many orders."""
        orders = math.factorial(self.grid**2)
        most = f"at most {orders}, the number of orders of {self.grid**2} tiles"
        require(self.permutations <= orders, "jigsaw.permutations", self.permutations, most)

    def tile_side(self, side: int) -> int:
        """Return the side of a tile in pixels, given the side of the image."""
        return max(1, round(TILE_SHARE * (side // self.grid)))

    def sides(self, side: int) -> dict[str, int]:
        """Return the side of the tiles."""
        return {"grid": self.tile_side(side)}


@dataclass(frozen=True, kw_only=True)
class EquivarianceConfig(TaskConfig):
    """The auxiliary task of turning an intermediate map of the encoder with the image, after SER (arXiv 2603.06693)."""

    ENDS: ClassVar[tuple[str, ...]] = ("fraction_end",)

    weight: float | Auto = opt(
        0.0, "Weight of 1 - the mean cosine of the two maps; 0: off; auto: set by equivariance.share.", ge=0
    )
    fraction: float = opt(0.25, "Share of the images in pairs, in eighths; half are copies.", gt=0, le=0.875)
    fraction_end: float | None = opt(
        0.125, "This share when the task ends, approached along a cosine; none: constant.", ge=0, le=0.875
    )

    def check_share(self, each: int) -> None:
        """Check that an eighth of each worker's images is whole pairs."""
        fits, expected = each % (2 * EIGHTHS) == 0, f"a multiple of {2 * EIGHTHS} with equivariance"
        require(fits, "train.batch_size", f"{each} images per worker and pass", expected)

    def share_at(self, progress: float) -> float:
        """Return the share of the images that make pairs, in eighths."""
        start, end = self.fraction, self.fraction_end
        return _in_parts(start if end is None else cosine(start, end, self.part(progress)), EIGHTHS)

    @property
    def least_share(self) -> float:
        """An eighth, of which a worker's smallest batch is one pair."""
        return 1 / EIGHTHS


def _task(config: type[TaskConfig], target: str, *, later: bool = False) -> Any:
    """A task of ``TaskSections``; ``later``: it came after runs had been recorded, whose identity it must not change."""
    return field(default_factory=config, metadata={"target": target, "later": later})


@dataclass(frozen=True, kw_only=True)
class TaskSections:
    """The tasks of a run, in the order in which their losses are added."""

    rotation: RotationConfig = _task(RotationConfig, "rotssl.tasks.rotation:Rotation")
    jigsaw: JigsawConfig = _task(JigsawConfig, "rotssl.tasks.jigsaw:Jigsaw")
    equivariance: EquivarianceConfig = _task(EquivarianceConfig, "rotssl.tasks.equivariance:Equivariance", later=True)

    def active(self) -> dict[str, TaskConfig]:
        """Return the sections of the tasks that are on, by name."""
        sections = {name: getattr(self, name) for name in TASKS}
        return {name: section for name, section in sections.items() if section.on}


@dataclass(frozen=True)
class TaskSpec:
    """A registered task: its section, ``module:class`` of its code, and whether it was added after runs had been recorded."""

    config: type[TaskConfig]
    target: str
    later: bool

    def load(self) -> "type[Task]":
        """Import and return the task's class (this imports torch)."""
        return load_class(self.target)  # type: ignore[no-any-return]


_HINTS = get_type_hints(TaskSections)
TASKS = {f.name: TaskSpec(_HINTS[f.name], **f.metadata) for f in dataclasses.fields(TaskSections)}
WEIGHTS = tuple(f"{name}.weight" for name in TASKS)
