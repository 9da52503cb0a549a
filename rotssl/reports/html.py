"""A comparison as one HTML page that needs no other file and no network; everything that comes from MLflow is escaped."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader

from rotssl.reports.tables import SHARED_MACHINE, Table, is_remark

# How each number is made, as (number, explanation).
_METHOD = (
    ("Final accuracy", "Of the last epoch, never the best one. Mean over seeds; the range is that of the seeds."),
    (
        "Gain",
        "Mean of the differences between runs of the same seed and length, and the 95% interval of Student's t. "
        "One seed has no interval.",
    ),
    (
        "Cost to reach a level",
        "Where the curve of a run first crosses it, linear between measured epochs. A run that is there at its first measured "
        "epoch counts with that epoch's cost, an upper bound, and its speed-up is a bound too. A run that never comes there has "
        "no cost but is 'not reached'.",
    ),
    (
        "Speed-up",
        "What the baseline takes, over what the variant takes, for each seed; the geometric mean over seeds, and its 95% "
        "bootstrap interval (of two or three seeds: the range). There is none unless every seed of both comes there. It is 'at "
        "least' so much where the variant is there by its first measured epoch in any seed, 'at most' where the baseline is; "
        "where both are, there is none.",
    ),
    (
        "Costs",
        "FLOPs are counted by torch, a multiply-add as two; device time is training time x devices, without evaluation. "
        + SHARED_MACHINE,
    ),
    (
        "Recommendation",
        "The highest mean at the longest length that can be compared, over the seeds that all ranked variants have: the baseline "
        "and those of the others that have the most seeds. Two variants are separated where the interval of their "
        "paired difference is above 0. The choice was made on the validation images that it is stated for.",
    ),
)


@dataclass(frozen=True)
class Picture:
    """A PNG, and what is to be said below it."""

    path: Path
    title: str
    caption: str

    @property
    def width(self) -> int:
        """On the page, in pixels."""
        # A PNG's header has its width in pixels at byte 16; the pictures are drawn at 150 dots an inch, a page has 96.
        return int.from_bytes(self.path.read_bytes()[16:20], "big") * 96 // 150

    @property
    def source(self) -> str:
        """The picture itself, as an address."""
        return f"data:image/png;base64,{base64.b64encode(self.path.read_bytes()).decode()}"


@dataclass(frozen=True)
class Page:
    """What the page shows, from top to bottom.

    Attributes:
        title: its heading.
        subtitle: one line below it.
        answers: paragraphs of each recommendation.
        warnings: what to be careful about.
        pictures: to be embedded.
        tables: tables.
        facts: name and value of what the runs share.
    """

    title: str
    subtitle: str
    answers: Sequence[Sequence[str]]
    warnings: Sequence[str]
    pictures: Sequence[Picture]
    tables: Sequence[Table]
    facts: Sequence[tuple[str, str]]


def render(page: Page) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader("rotssl.reports", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("report.html.j2")
    return template.render(page=page, method=_METHOD, is_remark=is_remark) + "\n"
