"""A comparison as one self-contained HTML page, which needs no network; all text from MLflow is escaped."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader

from rotssl.reports.tables import SHARED_MACHINE, Table, is_remark

# How each number is computed, as (number, explanation).
_METHOD = (
    ("Final accuracy", "Accuracy at the last epoch, never at the best one. Mean and range over seeds."),
    (
        "Gain",
        "Mean difference between runs with the same seed and length, with a 95% Student t interval. "
        "There is no interval for a single seed.",
    ),
    (
        "Cost to reach a level",
        "The cost at which the curve of a run first reaches the level, linear between measured epochs. If a run reaches it at "
        "its first measured epoch, that epoch's cost is an upper bound, and the speed-up is a bound too. A run that never "
        "reaches the level has no cost and is shown as 'not reached'.",
    ),
    (
        "Speed-up",
        "The baseline's cost divided by the variant's, per seed; geometric mean over seeds, with a 95% bootstrap interval (for "
        "two or three seeds: the range). It is given only if every seed of both reaches the level. It is 'at least' the stated "
        "value if the variant reaches the level by its first measured epoch in any seed, 'at most' if the baseline does, and "
        "omitted if both do.",
    ),
    (
        "Costs",
        "FLOPs are counted by torch, two per multiply-add. Device time is training time x devices, without evaluation. "
        + SHARED_MACHINE,
    ),
    (
        "Recommendation",
        "The variant with the highest mean at the longest comparable length. The ranking covers the baseline and the variants "
        "with the most seeds, over the seeds they share. Two variants are separated if the interval of their paired difference "
        "is above 0. The choice was made on the same validation images that its accuracy is stated for.",
    ),
)


@dataclass(frozen=True)
class Picture:
    """A PNG with a title and a caption."""

    path: Path
    title: str
    caption: str

    @property
    def width(self) -> int:
        """Width on the page, in pixels."""
        # A PNG's header has its width in pixels at byte 16; the pictures are drawn at 150 dots per inch, a page has 96.
        return int.from_bytes(self.path.read_bytes()[16:20], "big") * 96 // 150

    @property
    def source(self) -> str:
        """The picture as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(self.path.read_bytes()).decode()}"


@dataclass(frozen=True)
class Page:
    """The content of the page, from top to bottom.

    Attributes:
        title: heading.
        subtitle: one line below the heading.
        answers: paragraphs of each recommendation.
        warnings: warnings about the runs.
        pictures: pictures to embed.
        tables: tables.
        facts: names and values of what the runs share.
    """

    title: str
    subtitle: str
    answers: Sequence[Sequence[str]]
    warnings: Sequence[str]
    pictures: Sequence[Picture]
    tables: Sequence[Table]
    facts: Sequence[tuple[str, str]]


def environment() -> Environment:
    """The templates of pages; all text that they are given is escaped."""
    loader = PackageLoader("rotssl.reports", "")
    return Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def render(page: Page) -> str:
    """The page as HTML."""
    template = environment().get_template("report.html.j2")
    return template.render(page=page, method=_METHOD, is_remark=is_remark) + "\n"
