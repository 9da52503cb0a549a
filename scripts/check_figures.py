"""Check that every measured figure in the texts stands in a results file that the same section links to.

    python scripts/check_figures.py

Prints one line per offence and exits with 1 if there is any. A figure is a decimal number; in a section that links to results, a
whole percentage counts too. A mean with its interval, `+4.1 (+2.5 to +5.7)`, must stand there as a whole. Any other figure in a
table row must share a line there with another figure of that row. Markdown results must have a figure exactly; a csv value may be
rounded. A figure with a sign needs that sign. Code, link targets, versions and arXiv numbers are no figures. In docs/decisions a
paragraph that says "measured once, no table" is exempt.
"""

import csv
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
D = r"[+-]?\d+\.\d+"
GROUP = re.compile(rf"({D})(?: ?(?:%|points|s|ms))? \(({D}) ?%? to ({D}) ?%?\)")
FIGURE = re.compile(rf"(?<![\w.,])({D})(?![\w.]*\d)")
PERCENT = re.compile(r"(?<![\w.,])([+-]?\d+) ?%(?! (?:Student|interval|level))")
NO_FIGURES = re.compile(r"`[^`]*`|\]\([^)]*\)|\b\d{4}\.\d{5}\b|(?:torch|Python|MLflow|Ray|version) \d+(?:\.\d+)+")
LINK = re.compile(r"\]\(([^)#\s]+)")
TEXTS = ("README.md", "METHODS.md", "ARCHITECTURE.md", "docs/**/*.md")
EXEMPT = "measured once, no table"


def figures_of(text: str) -> set[str]:
    """Figures in a text: groups as `mean (low to high)`, other decimals as written, whole percentages as `82%`."""
    groups = {f"{mean} ({low} to {high})" for mean, low, high in GROUP.findall(text)}
    rest = GROUP.sub(" ", text)
    return groups | set(FIGURE.findall(rest)) | {f"{number}%" for number in PERCENT.findall(rest)}


@cache
def read_result(suffix: str, text: str) -> tuple[list[set[str]], list[float]]:
    """The figures in each line of a markdown file, or the values of a csv file."""
    lines = text.splitlines()
    if suffix == ".csv":
        return [], [float(cell) for row in csv.reader(lines) for cell in row if re.fullmatch(r"-?\d+(\.\d+)?", cell)]
    wrapped = {figure for figure in figures_of(" ".join(lines)) if "(" in figure}  # a line may end within them
    return [wrapped, *(figures_of(line) | {mean for mean, _, _ in GROUP.findall(line)} for line in lines)], []


def stands(figure: str, others: set[str], lines: list[set[str]], values: list[float]) -> bool:
    """Whether a result holds a figure, in a line with one of the others if there are any."""
    forms = {figure} if figure[0] in "+-" else {figure, f"+{figure}", f"-{figure}"}
    if any(forms & line and not (others and others.isdisjoint(line)) for line in lines):
        return True
    number, places = figure.rstrip("%"), len(figure.rstrip("%").partition(".")[2])
    return "(" not in figure and any(float(number) in (round(v, places), round(100 * v, places)) for v in values)


def blocks_of(text: str) -> Iterator[tuple[int, int, str]]:
    """(section, first line, text) of each paragraph, list item and table row outside of code; headings count sections."""
    section, fenced, start, block = 0, False, 0, list[str]()
    for number, line in enumerate([*text.splitlines(), ""], 1):
        fenced ^= line.startswith("```")
        code = fenced or line.startswith(("```", "    "))
        if code or not line.strip() or re.match(r"#|\||\s*- |\s*\d+\. ", line):
            if block:
                yield section, start, "\n".join(block)
            start, block = number, []
        section += line.startswith("#") and not code
        if line.strip() and not code:
            start, block = start if block else number, [*block, line]


def check(root: Path) -> list[str]:
    """The offences below a checkout, one line each."""
    measured = root / "benchmarks"
    files = [*(measured / "results").glob("**/*.[mc][ds]*"), measured / "LOG.md"]
    results = {path.resolve(): read_result(path.suffix, path.read_text()) for path in files}
    offences = []
    for file in sorted(path for pattern in TEXTS for path in root.glob(pattern)):
        blocks = list(blocks_of(file.read_text()))
        for section, start, text in blocks:
            if "decisions" in file.parts and EXEMPT in " ".join(text.split()):
                continue
            targets = LINK.findall(" ".join(text for at, _, text in blocks if at == section))
            sources = results.keys() & {(file.parent / target).resolve() for target in targets}
            plain = NO_FIGURES.sub(lambda match: re.sub(r"\S", " ", match.group()), text)
            figures = figures_of(plain.replace("\n", " "))
            for figure in sorted(figures):
                others = figures - {figure} if text.startswith("|") and "(" not in figure else set()
                found = any(stands(figure, others, *results[path]) for path in sources)
                if found or (figure.endswith("%") and not sources):
                    continue
                line = start + plain.partition(figure.split()[0].rstrip("%"))[0].count("\n")
                names = ", ".join(sorted(path.name for path in sources)) or "no results file linked in the section"
                offences.append(f"{file.relative_to(root)}:{line}: {figure} is in none of: {names}")
    return offences


if __name__ == "__main__":
    print("\n".join(offences := check(ROOT)))
    sys.exit(bool(offences))
