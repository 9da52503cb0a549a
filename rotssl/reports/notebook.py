"""What a notebook shows of runs: tables as HTML that take the notebook's own colours."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from rotssl.reports.html import Picture
from rotssl.reports.tables import Table

_COLUMNS = (
    ("loss/total", "loss", "{:.3f}"),
    ("loss/ssl", "method's loss", "{:.3f}"),
    ("rotation/accuracy", "rotation accuracy", "{:.1%}"),
    ("knn/top1", "kNN", "{:.1%}"),
    ("linear/top1", "linear probe", "{:.1%}"),
    ("test/knn/top1", "kNN on test", "{:.1%}"),
    ("test/linear/top1", "linear probe on test", "{:.1%}"),
    ("feature/effective_rank", "effective rank", "{:.1f}"),
    ("cost/train_seconds", "training time", "{:.1f} s"),
)


class Points(dict[int, dict[str, float]]):
    """Epoch (1-based) -> metrics, as in the run's metrics.jsonl. A notebook shows them as a table."""

    def column(self, metric: str) -> dict[int, float]:
        """Epoch -> one metric, at the epochs that have it."""
        return {epoch: point[metric] for epoch, point in sorted(self.items()) if metric in point}

    def _repr_html_(self) -> str:
        present = [spec for spec in _COLUMNS if any(spec[0] in point for point in self.values())]
        rows = [
            [str(epoch), *(form.format(point[key]) if key in point else "" for key, _, form in present)]
            for epoch, point in sorted(self.items())
        ]
        return table(["epoch", *(label for _, label, _ in present)], rows)


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", names: int = 1) -> str:
    """A table; the first ``names`` columns are text."""

    def line(tag: str, cells: Sequence[str]) -> str:
        aligned = ("left" if i < names else "right" for i in range(len(cells)))
        return "".join(
            f'<{tag} style="text-align:{side}">{escape(cell)}</{tag}>'
            for cell, side in zip(cells, aligned, strict=True)
        )

    head = f"<thead><tr>{line('th', headers)}</tr></thead>"
    title = f'<caption style="text-align:left">{escape(caption)}</caption>' if caption else ""
    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f"<table>{title}{head}<tbody>{body}</tbody></table>"


def facts(title: str, known: Mapping[str, object], bad: bool = False) -> str:
    """A heading, red if something is wrong, and names with values."""
    colour = ' style="color:#c0392b"' if bad else ""
    rows = "".join(
        f'<tr><td style="text-align:left">{escape(name)}</td><td style="text-align:left">{escape(str(value))}</td></tr>'
        for name, value in known.items()
    )
    return f"<div><b{colour}>{escape(title)}</b></div><table><tbody>{rows}</tbody></table>"


def comparison(
    answers: Sequence[Sequence[str]], warnings: Sequence[str], tables: Sequence[Table], pictures: Sequence[Path]
) -> str:
    """The answer in words, warnings, pictures and tables of a comparison."""
    parts = []
    for first, *others in answers:
        lines = "".join(f"<div>{escape(line)}</div>" for line in others)
        parts.append(f'<div style="border-left:4px solid #0072b2;padding-left:1em"><b>{escape(first)}</b>{lines}</div>')
    parts += [f'<div style="border-left:4px solid #d55e00;padding-left:1em">{escape(text)}</div>' for text in warnings]
    parts += [f'<img style="background:#fff" width="800" src="{Picture(path, "", "").source}">' for path in pictures]
    for found in tables:
        parts.append(f"<details><summary>{escape(found.title)}</summary><div>{escape(found.caption)}</div>")
        parts.append(table(found.headers, found.rows, names=found.names) + "</details>")
    return "".join(parts)
