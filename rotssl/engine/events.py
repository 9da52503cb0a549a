"""The events that a run emits to its observers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Note:
    """A message to the user."""

    text: str


@dataclass(frozen=True)
class Alert:
    """A warning that a worker logged."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Facts that the configuration leaves open, for the tags of the run."""

    tags: Mapping[str, str]


@dataclass(frozen=True)
class Missing:
    """Names of the accuracies that could not be measured at the end of the run."""

    names: list[str]


@dataclass(frozen=True)
class StepDone:
    """A finished step of an epoch (1-based); ``step`` counts the steps of the whole run."""

    epoch: int
    step: int
    total_steps: int


@dataclass(frozen=True)
class EpochDone:
    """An epoch (1-based) that is in the journal and, if ``saved``, in a checkpoint."""

    epoch: int
    step: int
    total_steps: int
    metrics: Mapping[str, float]
    saved: bool = True


@dataclass(frozen=True)
class Usage:
    """How much a machine is used: a measure's name in MLflow -> its value. It is no sign of progress."""

    PREFIX: ClassVar[str] = "system/"  # by which MLflow tells such metrics from others
    metrics: Mapping[str, float]


Event = Note | Alert | Facts | Missing | StepDone | EpochDone | Usage
