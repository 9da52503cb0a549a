"""The figures of the texts stand in the results that they link to; their links lead somewhere."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_figures, derive_figures = script("check_figures"), script("derive_figures")

TEXTS = [
    "README.md",
    "METHODS.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md")),
]


@pytest.fixture
def copy(tmp_path):
    """The texts and their results, to be broken."""
    for name in ("README.md", "METHODS.md", "ARCHITECTURE.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*.png"))
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    shutil.copy(ROOT / "benchmarks" / "LOG.md", tmp_path / "benchmarks")
    return tmp_path


def change(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_every_figure_stands_in_a_linked_result():
    assert check_figures.check(ROOT) == []


@pytest.mark.parametrize(
    "name, old, new, figure",
    [
        ("README.md", "| 57.2 | 59.5 (", "| 77.2 | 59.5 (", "77.2"),
        ("README.md", "| 57.2 | 59.5 (", "| 57.2 | 79.5 (", "79.5"),
        ("README.md", "(benchmarks/results/gain/README.md), [log](benchmarks/LOG.md)", "()", "57.2"),
        ("docs/results.md", "| plain | 67.0% |", "| plain | 67.5% |", "67.5"),
        ("docs/results.md", "| 86.37% |", "| 86.38% |", "86.38"),
        ("docs/results.md", "| 82% | 99% |", "| 83% | 99% |", "83%"),
        ("docs/speed.md", "-26%", "-25%", "-25%"),
        (
            "docs/decisions/012-allocator-keeps-memory.md",
            "6 to 11% of a ResNet-18's step",
            "0.11 of a step.\n\n",
            "0.11",
        ),
    ],
)
def test_a_changed_figure_in_a_text_is_found(copy, name, old, new, figure):
    change(copy / name, old, new)
    (offence, *_) = [line for line in check_figures.check(copy) if f": {figure} is in none of: " in line]
    file, line, _ = offence.split(":", 2)
    assert file == name
    assert figure.split()[0].rstrip("%") in (copy / name).read_text().splitlines()[int(line) - 1]


@pytest.mark.parametrize(
    "name, old, new, text",
    [
        ("rotation_variants_fashion-mnist-sample_10ep_2026-11-24.md", "+4.1 (+2.5", "+4.0 (+2.5", "docs/results.md"),
        ("methods_sample_2026-11-23.md", "72.2 (71.8 to 72.6)", "72.3 (71.8 to 72.6)", "docs/results.md"),
        ("paper.csv", "91.89", "91.88", "docs/results.md"),
        ("derived.md", "+5.3", "+5.4", "docs/results.md"),
    ],
)
def test_a_changed_table_is_found(copy, name, old, new, text):
    change(copy / "benchmarks" / "results" / name, old, new)
    assert any(line.startswith(f"{text}:") for line in check_figures.check(copy))


def test_code_versions_and_numbers_of_papers_are_no_figures(copy):
    (copy / "METHODS.md").write_text(
        "# A\n\n`0.123`, torch 2.99, arXiv 1234.56789\n\n    0.123\n\n```\n0.123\n```\n\n0.321\n"
    )
    assert [line for line in check_figures.check(copy) if line.startswith("METHODS")] == [
        "METHODS.md:11: 0.321 is in none of: no results file linked in the section"
    ]


def test_derived_figures_are_those_of_the_csv_files():
    assert derive_figures.text() == (ROOT / "benchmarks" / "results" / "derived.md").read_text()


@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_links_lead_somewhere(text):
    file = ROOT / text
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", file.read_text())):
        if not target.startswith("http"):
            there = file.parent / target if target else file
            assert there.exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.*)", there.read_text(), re.M)
                assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, anchor
