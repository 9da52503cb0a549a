"""Check that every measured figure in the texts stands in a results file that the same section links to.

    python scripts/check_figures.py    # prints one line per offence, exits 1 if there is any

A figure is a decimal number; in a section that links to results, a whole percentage counts too. A mean with its interval,
`+4.1 (+2.5 to +5.7)`, must stand there as a whole. Markdown results must have the figure exactly; a csv value may be rounded,
and may be the fraction of a percentage. A figure with a sign needs the same sign, one without matches either. Code, link
targets, versions and arXiv numbers are no figures. In docs/decisions a paragraph that says "measured once, no table" is exempt.
"""

import csv
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUMBER = r"[+-]?\d+\.\d+"
GROUP = re.compile(rf"({NUMBER})(?: ?(?:%|points|s|ms))? \(({NUMBER}) ?%?(?: to |, )({NUMBER}) ?%?\)")
FIGURE = re.compile(rf"(?<![\w.,])({NUMBER})(?![\w.]*\d)")
PERCENT = re.compile(r"(?<![\w.,])([+-]?\d+) ?%(?! (?:Student|interval|level))")
NO_FIGURES = re.compile(
    r"`[^`]*`|\]\([^)]*\)|\b\d{4}\.\d{5}\b|(?:torch|Python|MLflow|Ray|CUDA|version) v?\d+(?:\.\d+)+"
)
LINK = re.compile(r"\]\(([^)#\s]+)")
EXEMPT = "measured once, no table"


@cache
def found_in(path: Path, _stamp: int) -> tuple[frozenset[str], tuple[float, ...]]:
    """What a results file holds: its figures and groups as written, and the values of a csv file."""
    if path.suffix == ".csv":
        cells = [cell for row in csv.reader(path.open(newline="")) for cell in row]
        return frozenset(), tuple(float(cell) for cell in cells if re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", cell))
    written = path.read_text()
    return frozenset(figures_of(written) | {figure for figure in FIGURE.findall(written)}), ()


def figures_of(text: str) -> set[str]:
    """Figures in a text: groups as `mean (low to high)`, other decimals as written, whole percentages as `82%`."""
    groups = {f"{mean} ({low} to {high})" for mean, low, high in GROUP.findall(text)}
    rest = GROUP.sub(" ", text)
    return groups | set(FIGURE.findall(rest)) | {f"{number}%" for number in PERCENT.findall(rest)}


def stands(figure: str, path: Path) -> bool:
    """Whether a results file holds a figure."""
    written, values = found_in(path, path.stat().st_mtime_ns)
    if figure in written or (figure[0] not in "+-" and not written.isdisjoint({f"+{figure}", f"-{figure}"})):
        return True
    if "(" in figure or not values:
        return False
    number, places = float(figure.rstrip("%")), len(figure.rstrip("%").partition(".")[2])
    return any(number in (round(value, places), round(100 * value, places)) for value in values)


def paragraphs(text: str) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """(section, its numbered lines) for each paragraph, list item or table outside of code blocks."""
    section, code, block = 0, False, list[tuple[int, str]]()
    for number, line in enumerate([*text.splitlines(), ""], 1):
        code ^= line.startswith("```")
        heading = line.startswith("#") and not code
        if heading or code or not line.strip() or line.lstrip().startswith(("- ", "```")):
            if block:
                yield section, block
            block = []
        section += heading
        if line.strip() and not code and not re.match(r"```|    (?![-|])", line):
            block.append((number, line))


def check(root: Path) -> list[str]:
    """The offences below a checkout, one line each."""
    offences = []
    results = root / "benchmarks" / "results"
    for file in [
        *(root / name for name in ("README.md", "METHODS.md", "ARCHITECTURE.md")),
        *sorted((root / "docs").rglob("*.md")),
    ]:
        blocks = list(paragraphs(file.read_text()))
        links: dict[int, list[Path]] = {}
        for section, block in blocks:
            targets = [(file.parent / target).resolve() for _, line in block for target in LINK.findall(line)]
            links.setdefault(section, []).extend(
                t for t in targets if t.is_file() and t.is_relative_to(results.resolve())
            )
        for section, block in blocks:
            if "decisions" in file.parts and EXEMPT in " ".join(line.strip() for _, line in block):
                continue
            sources = links[section]
            lines = NO_FIGURES.sub(
                lambda match: re.sub(r"[^\n]", " ", match.group()), "\n".join(line for _, line in block)
            )
            for figure in sorted(figures_of(lines.replace("\n", " "))):
                if (figure.endswith("%") and not sources) or any(stands(figure, path) for path in sources):
                    continue
                first = figure.partition(" ")[0].rstrip("%")
                at = next(
                    (n for (n, _), line in zip(block, lines.splitlines(), strict=True) if first in line), block[0][0]
                )
                names = ", ".join(sorted(path.name for path in sources)) or "no results file linked in the section"
                offences.append(f"{file.relative_to(root)}:{at}: {figure} is in none of: {names}")
    return offences


if __name__ == "__main__":
    print("\n".join(offences := check(ROOT)))
    sys.exit(bool(offences))
