"""A comparison as one HTML page that needs no other file and no network; everything that comes from MLflow is escaped."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from rotssl.reports.tables import SHARED_MACHINE, Table, is_remark

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: #1c1c1e;
  background: #fff; max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .25rem; }
h3 { font-size: 1rem; margin: 1.75rem 0 0; }
p { margin: .35rem 0 .75rem; max-width: 46rem; }
.quiet, figcaption, caption { color: #5b5b60; font-size: .9rem; }
.answer { border-left: 4px solid #0072b2; background: #f3f7fa; padding: .75rem 1rem; margin: 1rem 0; overflow-wrap: anywhere; }
.answer p { margin: .3rem 0; max-width: none; } .answer p:first-child { font-weight: 600; }
.warning { border-left: 4px solid #d55e00; background: #fdf4ee; padding: .5rem 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.35; margin: .5rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .75rem .35rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid #e3e3e6;
  white-space: pre; }
th { vertical-align: bottom; border-bottom: 1px solid #8a8a8f; font-weight: 600; }
.name { text-align: left; min-width: 8rem; white-space: normal; }
.long { min-width: 11rem; white-space: pre-line; }
.facts td, .facts th { text-align: left; white-space: normal;
  overflow-wrap: anywhere; border-bottom: 1px solid #e3e3e6; vertical-align: top; }
.facts th { white-space: nowrap; font-weight: 400; color: #5b5b60; }
figure { margin: 1rem 0; } figure img { width: 100%; height: auto; min-width: 40rem; max-width: var(--natural); display: block; }
dt { font-weight: 600; margin-top: .6rem; } dd { margin: 0; max-width: 46rem; }
@media print { body { font-size: 11px; max-width: none; padding: 0; } .scroll { overflow: visible; }
  figure, table, .answer { break-inside: avoid; } figure img { min-width: 0; } }
"""


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
    title = escape(page.title)
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{_STYLE}</style></head><body>",
        f'<header><h1>{title}</h1><p class="quiet">{escape(page.subtitle)}</p></header><main>',
        *(f'<section class="answer">{_paragraphs(answer)}</section>' for answer in page.answers),
        *(f'<p class="warning">{escape(warning)}</p>' for warning in page.warnings),
        *map(_picture, page.pictures),
        "<h2>Numbers</h2>",
        *map(_table, page.tables),
        "<h2>What the runs share</h2>",
        '<div class="scroll"><table class="facts">',
        *(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in page.facts),
        "</table></div><h2>How the numbers are made</h2><dl>",
        *(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in _METHOD),
        "</dl></main></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _paragraphs(lines: Sequence[str]) -> str:
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _picture(picture: Picture) -> str:
    content = picture.path.read_bytes()
    # A PNG's header has its width in pixels at byte 16; the pictures are drawn at 150 dots an inch, a page has 96.
    width = int.from_bytes(content[16:20], "big") * 96 // 150
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return (
        f'<h2>{escape(picture.title)}</h2><figure><div class="scroll">'
        f'<img style="--natural: {width}px" alt="{escape(picture.title)}" src="{source}"></div>'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    def cell(tag: str, column: int, text: str) -> str:
        kind = ' class="name"' if column < table.names else ' class="long"' if is_remark(text) else ""
        return f"<{tag}{kind}>{escape(text)}</{tag}>"

    def cells(tag: str, texts: Sequence[str]) -> str:
        return "".join(cell(tag, column, text) for column, text in enumerate(texts))

    rows = "".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    return (
        f'<h3>{escape(table.title)}</h3><p class="quiet">{escape(table.caption)}</p>'
        f'<div class="scroll"><table><thead><tr>{cells("th", table.headers)}</tr></thead><tbody>{rows}</tbody></table></div>'
    )
