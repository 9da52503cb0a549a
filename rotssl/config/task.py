"""What the sections of all auxiliary tasks have in common. Imports no torch."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rotssl.config.fields import Auto, opt


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """The section of a task.

    Attributes:
        FOLLOWS: field -> the fields from which ``auto`` derives it. A value that follows from them does not distinguish runs.
        ENDS: fields with the value at the end of the run of what changes over it; None: it stays constant.
        weight: of its loss; 0: off; auto: set by ``share``.
        schedule: how the weight changes over the run.
    """

    FOLLOWS: ClassVar[dict[str, tuple[str, ...]]] = {}
    ENDS: ClassVar[tuple[str, ...]] = ()

    weight: float | Auto
    schedule: Literal["constant", "linear", "cosine"] = opt(
        "constant", "How the weight (or the share) falls to 0 until the task ends, if at all."
    )
    share: float = opt(
        0.2,
        "With weight auto: the task's share of the gradient where its head branches off; given alone, it sets weight to auto.",
        gt=0,
        lt=1,
        later=True,
    )
    until: float = opt(1.0, "Share of the run after which the task ends.", gt=0, le=1, later=True)
    every: int = opt(1, "Take the task only in every N-th step.", ge=1, later=True)

    @property
    def on(self) -> bool:
        """Whether the task is part of the run."""
        return self.weight == "auto" or self.weight > 0

    def part(self, progress: float) -> float:
        """Return the share of the task's time that is over at a progress of the run, 0 to 1."""
        return min(1.0, progress / self.until)

    def active(self, step: int, progress: float) -> bool:
        """Return whether the task takes part in a step, given its number and the run's progress; needs a resolved section."""
        return progress < self.until and step % self.every == 0 and self.share_at(progress) > 0

    def check(self) -> None:
        """Check the rules between its fields.

        Raises:
            ConfigError: a rule is broken.
        """

    def check_share(self, each: int) -> None:
        """Check the number of images per worker and forward pass; called only if the task is on.

        Raises:
            ConfigError: there are too few.
        """

    def resolve(self, side: int, batch: int) -> dict[str, Any]:
        """Return the values that replace ``auto``, by field, given the side of the global views in pixels and the whole batch."""
        return {}

    def sides(self, side: int) -> dict[str, int]:
        """Return the side in pixels of each kind of view the task adds, by the field that sets it; needs a resolved section."""
        return {}

    @property
    def least_share(self) -> float:
        """Smallest share of the images that enters its loss in a step."""
        return 1.0

    def share_at(self, progress: float) -> float:
        """Return the share of the images in its loss at a progress of the run, 0 to 1; needs a resolved section.

        The cost of a step is linear in it. Until the task ends, it only rises, only falls or is constant.
        """
        return 1.0
