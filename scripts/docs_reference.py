"""Write the reference pages, docs/reference/*.md, from the code: registries, docstrings, parsers and the heads of recipes.

    python scripts/docs_reference.py            # `make docs` does so
    python scripts/docs_reference.py --check    # exits with 1 if a page is not what the code says

The fields and flags are read from the parsers themselves, so a page says what ``--help`` says. Imports no torch.
"""

import argparse
import ast
import dataclasses
import re
import runpy
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from rotssl.config.datasets import DATASETS
from rotssl.config.methods import METHODS, MethodSpec
from rotssl.config.recipes import load_recipe
from rotssl.config.sections import Config, get_type_hints, schema
from rotssl.config.sweep import SweepConfig
from rotssl.config.tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "reference"
UP = "../.."  # from a page to the checkout
JOBS = (
    *("pretrain", "ablate", "compare", "evaluate", "report", "export", "analyze"),
    *("status", "preview", "replay", "pack", "demo"),
)
FIELD = re.compile(r"(?P<text>.*) \[(?P<valid>.*); default: (?P<default>.*)\]", re.DOTALL)
GAINS = f"[measured]({UP}/benchmarks/results/gain/README.md)"


class _Built(Exception):
    """No error: it carries the parser out of a program that was about to use it."""


def parser_of(job: str) -> argparse.ArgumentParser:
    """The parser of a job, as the job builds it."""

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise _Built(parser)

    names = ("parse_args", "parse_known_args")
    patches = [mock.patch.object(argparse.ArgumentParser, name, stop) for name in names]
    with patches[0], patches[1], mock.patch.object(sys, "argv", [job]):
        try:
            runpy.run_path(str(ROOT / "jobs" / f"{job}.py"), run_name="__main__")
        except _Built as built:
            (parser,) = built.args
            return parser
    raise RuntimeError(f"jobs/{job}.py parses no command line")


def helps(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Flag -> help text of what a parser takes."""
    shown = [action for action in parser._actions if action.help is not argparse.SUPPRESS]
    return {max(a.option_strings, key=len) if a.option_strings else str(a.metavar): a.help or "" for a in shown}


def prose(text: str) -> str:
    """Text of the code as markdown: constants as code, arXiv numbers as links, no line breaks within paragraphs."""
    text = re.sub(r"``([^`]+)``", r"`\1`", text.replace("%%", "%"))
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    for i in range(0, len(parts), 2):
        linked = re.sub(r"arXiv (\d{4}\.\d{5})", r"arXiv [\1](https://arxiv.org/abs/\1)", parts[i])
        linked = re.sub(r"(?<![\w.,/\[])([+-]?\d+\.\d+)(?!\w|\.\d|\])", r"`\1`", linked)
        parts[i] = re.sub(r"[*_<]", r"\\\g<0>", linked)
    return "".join(parts)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a markdown table, with an empty one after it."""
    cells = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells), ""]


def page(title: str, *paragraphs: str) -> list[str]:
    """The first lines of a page."""
    told = "This page is made from the code by `scripts/docs_reference.py`."
    return [f"# {title}", "", *(line for text in (*paragraphs, told) for line in (text, ""))]


def docstrings(path: Path) -> dict[str, str]:
    """Name -> docstring of a module's classes and functions; that of the module itself is under the empty name."""
    tree = ast.parse(path.read_text())
    named = [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    return {"": ast.get_docstring(tree) or "", **{node.name: ast.get_docstring(node) or "" for node in named}}


def paragraphs(docstring: str) -> list[str]:
    """The paragraphs of a docstring before its sections."""
    return re.split(r"\n(?=Args:|Attributes:|Returns:|Raises:)", docstring)[0].strip().split("\n\n")


def file_of(target: str) -> tuple[Path, str]:
    """The file and the class of a registry's ``module:class``."""
    module, name = target.split(":")
    return ROOT / f"{module.replace('.', '/')}.py", name


def link(path: Path) -> str:
    """A link from a page to a file of the checkout."""
    return f"[`{path.name}`]({UP}/{path.relative_to(ROOT)})"


def field_rows(flags: Mapping[str, str], section: str) -> Iterator[list[str]]:
    """Rows of a table: the fields of a section, as their flags say them."""
    for flag, text in flags.items():
        found = FIELD.fullmatch(text.replace("%%", "%")) if flag.startswith(f"--{section}.") else None
        if found:
            yield [f"`{flag}`", f"`{found['default']}`", f"{prose(found['text'])} *({prose(found['valid'])})*"]


FIELDS_HEAD = ("field", "default", "meaning, and the values it takes")


def method_flags(name: str) -> dict[str, str]:
    """Flag -> help of the fields of a method, as ``--help`` says them for it."""
    from rotssl.config import cli

    return helps(cli.parser(name, "", "", ""))


def losses_of(path: Path) -> Iterator[str]:
    """What the losses that a method's file imports say of themselves, if they are of a paper."""
    known = docstrings(ROOT / "rotssl" / "methods" / "losses.py")
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module == "rotssl.methods.losses":
            for name in (alias.name for alias in node.names):
                if "eq. " in known[name]:
                    first, *rest = paragraphs(known[name])
                    yield f"- `{name}`: {prose(first)} {prose(' '.join(rest))}"


def recipes() -> list[Path]:
    """All recipes."""
    return sorted((ROOT / "jobs" / "recipes").rglob("*.yaml"))


def traits(spec: MethodSpec) -> dict[str, bool]:
    """Column -> whether the method has the trait."""
    return {"local views": spec.multi_crop, "accumulates": spec.per_image, "teacher": spec.teacher}


def methods_page() -> list[str]:
    """The registry of methods."""
    lines = page(
        "Methods",
        f"`--method.name` chooses one. [METHODS.md]({UP}/METHODS.md) says how they combine with views, tasks and encoders, and "
        f"[CONTRIBUTING.md]({UP}/CONTRIBUTING.md#a-method) how to add one.",
    )
    head, body = ("name", "what it does", "paper", "local views", "accumulates", "teacher"), []
    for name, spec in METHODS.items():
        path, target = file_of(spec.target)
        about = docstrings(path)
        paper = about[""].rstrip(".").split(": ", 1)[-1]
        cells = ("yes" if has else "" for has in traits(spec).values())
        body.append([f"[`{name}`](#{name})", prose(paragraphs(about[target])[0]), prose(paper), *cells])
    lines += table(head, body)
    for name, spec in METHODS.items():
        lines += method_section(name, spec)
    return lines


def method_section(name: str, spec: MethodSpec) -> list[str]:
    """What the registry, the docstrings and the recipes have about a method."""
    path, target = file_of(spec.target)
    about = docstrings(path)
    lines = [f"## {name}", "", prose(about[""]), ""]
    lines += [line for text in paragraphs(about[target]) for line in (prose(text), "")]
    limits = [f"{column}: {'yes' if has else 'no'}" for column, has in traits(spec).items()]
    limits += ["exactly two global views"] * spec.two_views
    lines += [f"- Code: {link(path)}. {'; '.join(limits).capitalize()}."]
    lines += [f"- Optimizer: `{spec.optimizer}`, with a rate of `{spec.lr:g}` for a batch of 256."]
    if spec.recommended:
        fields = ", ".join(f"`--{key} {str(value).lower()}`" for key, value in spec.recommended.items())
        gain = re.sub(r"\(([+-][\d.]+ to [+-][\d.]+)\)", r"[\1]", spec.gain)
        lines += [f"- Without a recipe: {fields}. Gain ({GAINS}): {gain}."]
    ours = [path for path in recipes() if load_recipe(path)["method.name"] == name]
    lines += [f"- Recipes: {', '.join(recipe_link(path) for path in ours)}.", ""]
    if losses := list(losses_of(path)):
        lines += ["Losses:", "", *losses, ""]
    return [*lines, *table(FIELDS_HEAD, field_rows(method_flags(name), "method"))]


def tasks_page() -> list[str]:
    """The registry of tasks."""
    lines = page(
        "Auxiliary tasks",
        "Every method takes every task, and several at once. A weight of 0 turns a task off. "
        f"[METHODS.md]({UP}/METHODS.md#tasks) compares the forms of rotation, and [CONTRIBUTING.md]"
        f"({UP}/CONTRIBUTING.md#a-task) says how to add a task.",
    )
    flags = helps(parser_of("pretrain"))
    for name, spec in TASKS.items():
        path, target = file_of(spec.target)
        about = docstrings(path)
        told = [about[""], spec.config.__doc__ or "", *paragraphs(about[target])]
        lines += [f"## {name}", "", *(line for text in told for line in (prose(text), ""))]
        lines += [f"Code: {link(path)}.", "", *table(FIELDS_HEAD, field_rows(flags, name))]
    return lines


def fields_page() -> list[str]:
    """All fields of a run and of a sweep."""
    parser = parser_of("ablate")  # which has those of a sweep as well
    flags = helps(parser)
    lines = page(
        "Fields",
        "Every field is a flag, `--section.field VALUE`, and an entry of a recipe, below its section. "
        f"{prose(parser.epilog or '').split(':')[0].rstrip('.')}. The text is that of `--help`.",
    )
    classes = get_type_hints(Config) | {"sweep": SweepConfig}
    for section in (*(field.name for field in dataclasses.fields(Config)), "sweep"):
        first, *rest = paragraphs(classes[section].__doc__ or "")
        lines += [f"## {section}", "", *(line for text in (first, *rest) for line in (prose(text), ""))]
        if section == "method":
            others = ", ".join(f"[`{name}`](methods.md#{name})" for name in METHODS)
            lines += [f"These are the fields of `byol`. Each method has its own: {others}.", ""]
        if section == "sweep":
            lines += [f"A sweep file has them besides its grid ([how]({UP}/docs/sweeps.md#sweep-files)).", ""]
        lines += table(FIELDS_HEAD, field_rows(flags, section))
    return lines


def commands_page() -> list[str]:
    """The programs, without the fields."""
    lines = page("Commands", "The flags of each program. Those of the fields are in [Fields](fields.md).")
    for job in JOBS:
        parser = parser_of(job)
        fields = set(schema()) | {f"sweep.{field.name}" for field in dataclasses.fields(SweepConfig)}
        own = {flag: text for flag, text in helps(parser).items() if text and flag != "--help"}
        if "--train.epochs" in own:  # the fields, too
            own = {flag: text for flag, text in own.items() if flag.removeprefix("--") not in fields}
        text = docstrings(ROOT / "jobs" / f"{job}.py")[""]
        lines += [f"## jobs/{job}.py", "", text, ""]
        rows = [[f"`{flag}`", prose(words)] for flag, words in own.items()]
        lines += table(("argument", "meaning"), rows) if rows else []
    return lines


def data_page() -> list[str]:
    """The registry of data sets."""
    lines = page(
        "Data sets",
        f"`--data.name` chooses one. [docs/runs.md]({UP}/docs/runs.md#before-it-starts) says what folders may look like, and "
        f"[how sets are packed]({UP}/docs/runs.md#packed-sets).",
    )
    body = []
    for name, spec in DATASETS.items():
        counts = [
            f"{count:,} {part}"
            for count, part in zip(spec.sizes, ("train", "validation", "test"), strict=True)
            if count
        ]
        root = {"package": "not needed"}.get(spec.kind, spec.root or "the folder that holds the data set")
        side = f"{spec.side} pixels" if spec.side else "any"
        body.append([f"`{name}`", spec.kind, ", ".join(counts) or "any", side, root])
    return lines + table(("name", "kind", "images", "side", "`data.root`"), body)


def head_of(path: Path) -> dict[str, str]:
    """What the head of a recipe or a sweep file says, by the words that its entries begin with; the first has none."""
    lines = [line[1:].removeprefix(" ") for line in path.read_text().splitlines() if line.startswith("#")]
    parts = re.split(r"^([A-Z][a-z]+): +", "\n".join(lines), flags=re.MULTILINE)
    return {word: " ".join(text.split()) for word, text in zip(["", *parts[1::2]], parts[::2], strict=True)}


def entry(word: str, text: str) -> str:
    """An entry of a head in lines of one length."""
    return textwrap.fill(text, 98, initial_indent=f"{word}:".ljust(9), subsequent_indent=" " * 9)


def recipe_link(path: Path) -> str:
    """A link to where a recipe stands on the page of recipes."""
    return f"[`{named(path)}`](recipes.md#{named(path).replace('/', '')})"


def named(path: Path) -> str:
    """The name of a recipe or a sweep, with its folder if it has one."""
    return "/".join(path.relative_to(ROOT / "jobs").with_suffix("").parts[1:])


def recipes_page() -> list[str]:
    """All recipes and sweeps, with what their heads say."""
    lines = page(
        "Recipes and sweeps",
        f"What the heads of the files say: paper, command, cost, and the score to compare with. [docs/results.md]"
        f"({UP}/docs/results.md) has what was measured here, and [the paper's table beside ours]"
        f"({UP}/docs/results.md#the-papers-table-and-ours).",
    )
    groups: dict[str, list[Path]] = {}
    for path in recipes():
        place = "the paper's settings" if path.parent.name == "paper" else re.sub(r"^[^_]+(_vit)?_", "", path.stem)
        groups.setdefault(re.sub(r"_\d+ep$", "", place), []).append(path)
    body = []
    for place, paths in groups.items():
        body.append(
            [place.replace("_", " "), ", ".join(f"[{named(path)}](#{named(path).replace('/', '')})" for path in paths)]
        )
    body.append(["sweeps", ", ".join(f"[{named(path)}](#{named(path)})" for path in sweeps())])
    lines += table(("data", "recipes"), body)
    for path in (*(path for paths in groups.values() for path in paths), *sweeps()):
        head, place = head_of(path), path.relative_to(ROOT)
        lines += [f"## {named(path)}", "", prose(head.pop("")), "", f"[{place}]({UP}/{place})", ""]
        lines += ["```bash", head.pop("Command"), "```", ""]
        lines += ["```text", *(entry(word, text) for word, text in head.items()), "```", ""]
    return lines


def sweeps() -> list[Path]:
    """All sweep files."""
    return sorted((ROOT / "jobs" / "sweeps").glob("*.yaml"))


def texts() -> dict[Path, str]:
    """Page -> its text."""
    made: dict[str, Any] = {
        "methods": methods_page,
        "tasks": tasks_page,
        "fields": fields_page,
        "commands": commands_page,
        "data": data_page,
        "recipes": recipes_page,
    }
    return {PAGES / f"{name}.md": "\n".join(lines()).rstrip() + "\n" for name, lines in made.items()}


def main(check: bool) -> int:
    """Write or check all pages; returns the exit code."""
    code = 0
    for path, text in texts().items():
        there = path.read_text() if path.exists() else ""
        if check and there != text:
            print(f"{path.relative_to(ROOT)} is not what the code says: run scripts/docs_reference.py")
            code = 1
        elif there != text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    return code


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
