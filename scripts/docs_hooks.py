"""Hooks of mkdocs.yml: the site has docs/, the texts of the checkout's root, and whatever of the checkout these link to.

A text is written once, for the forge, with links to the files of the checkout. Here each linked file becomes a page of the site:
texts as they are, code and tables as listings, pictures as files, folders as lists. Each room of ``rotssl`` gets a page of its
docstrings. Links are then turned from the files to the pages, and MkDocs, in strict mode, refuses what leads nowhere.
"""

import ast
import functools
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
ROOT_TEXTS = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "METHODS.md": "methods.md",
    "CONTRIBUTING.md": "contributing.md",
    "TESTING.md": "testing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")
PICTURES = {".png", ".svg"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".sbatch": "bash", ".toml": "toml", ".json": "json"}
FIRST = (
    "index.md",
    "ray.md",
    "slurm.md",
    "kubernetes.md",
    "cloud.md",
    "image.md",
    "watching.md",
)  # the order of docs/clusters
OF_USE = {
    "rotssl.export.source.load_encoder": "the encoder of a run, as `rotssl.load_encoder`",
    "rotssl.runs.journal.read": "the metrics of a run, by epoch",
    "rotssl.config.resolution.build": "a checked configuration from dotted fields",
    "rotssl.tracking.reader.read_runs": "the runs of an experiment in MLflow",
    "rotssl.methods.base.Method": "the contract of a method",
    "rotssl.tasks.base.Task": "the contract of a task",
    "rotssl.engine.runtime.Runtime": "what the engine needs of its surroundings",
}
SOURCE = "source"  # folder of the site for what is neither in docs/ nor a text of the root


def place(path: str) -> str:
    """Where a file or a folder of the checkout stands in the site, as MkDocs names sources."""
    if path in ROOT_TEXTS:
        return ROOT_TEXTS[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    suffix = posixpath.splitext(path)[1]
    if (ROOT / path).is_dir():
        return f"{SOURCE}/{path}/index.md"
    name = path.replace("README.md", "readme.md")  # MkDocs takes README.md for the index of its folder
    return f"{SOURCE}/{name}" if suffix in PICTURES | {".md"} else f"{SOURCE}/{name}.md"


def links(path: str, text: str) -> Iterator[str]:
    """The files and folders of the checkout that a text of it links to."""
    for _, target, _, _ in LINK.findall(text):
        found = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if ":" not in target and not found.startswith("..") and (ROOT / found).exists():
            yield found


def listing(path: str) -> str:
    """A page for a folder, or for a file that is no text."""
    if (ROOT / path).is_dir():
        inside = sorted(entry.name for entry in (ROOT / path).iterdir())
        shown = [f"[{name}]({name})" if name.endswith((".md", ".csv")) else f"`{name}`" for name in inside]
        return f"# {path}/\n\n" + "".join(f"- {name}\n" for name in shown)
    language = LANGUAGES.get(posixpath.splitext(path)[1], "text")
    return f"# {path}\n\n````{language}\n{(ROOT / path).read_text().rstrip()}\n````\n"


@functools.cache
def sources() -> dict[str, str]:
    """File or folder of the checkout -> text of its page, of all pages; pictures outside docs/ have no text."""
    waiting = [*ROOT_TEXTS, *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]
    found: dict[str, str] = {}
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        suffix = posixpath.splitext(path)[1]
        if suffix in PICTURES:
            found[path] = ""
            continue
        found[path] = (ROOT / path).read_text() if suffix == ".md" else listing(path)
        folder = f"{path}/." if (ROOT / path).is_dir() else path
        waiting += links(folder, found[path]) if suffix in (".md", "") else ()
    return found


def rooms() -> dict[str, list[str]]:
    """Room of the package, in the order of ARCHITECTURE.md -> its modules, by the names under which they are imported."""
    order = re.findall(r"^\| `(\w+)` \|", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE)
    made: dict[str, list[str]] = {name: [] for name in order}
    for path in sorted((ROOT / "rotssl").rglob("*.py")):
        *folders, name = path.relative_to(ROOT).with_suffix("").parts
        if name != "__init__" and (len(folders) > 1 or name == "lifecycle"):
            made.setdefault(folders[1] if len(folders) > 1 else name, []).append(".".join([*folders, name]))
    return made


def about(room: str) -> str:
    """The docstring of a room."""
    path = ROOT / "rotssl" / room / "__init__.py"
    return ast.get_docstring(ast.parse((path if path.exists() else path.parent.with_suffix(".py")).read_text())) or ""


def api_index() -> str:
    """The first page on the docstrings: what is of use from outside, and the rooms."""
    lines = ["# API", "", "The docstrings of all modules, by room. From outside these are of use:", ""]
    lines += [f"- [`{name.rpartition('.')[2]}`][{name}]: {why}." for name, why in OF_USE.items()]
    return "\n".join([*lines, "", *(f"- [{room}]({room}.md): {' '.join(about(room).split())}" for room in rooms())])


def api(room: str, modules: list[str]) -> str:
    """The page of a room: the docstrings of its modules."""
    return "\n".join([f"# {room}", "", *(f"::: {module}\n" for module in modules)])


def expanded(entry: Any) -> Any:
    """An entry of the navigation; a folder, which ends in a slash, stands for its pages."""
    if isinstance(entry, dict):
        return {title: expanded(below) for title, below in entry.items()}
    if isinstance(entry, list):
        return [expanded(below) for below in entry]
    if entry == "api/":
        return ["api/index.md", *(f"api/{room}.md" for room in rooms())]
    if entry.endswith("/"):
        names = sorted(path.name for path in (ROOT / "docs" / entry).glob("*.md"))
        names = [*(name for name in FIRST if name in names), *(name for name in names if name not in FIRST)]
        first = [name for name in names if name in ("index.md", "README.md")]
        return [entry + name for name in (*first, *(name for name in names if name not in first))]
    return entry


def on_config(config: "MkDocsConfig") -> "MkDocsConfig":
    """Fill the navigation with the pages that there are; `mkdocs serve` does so again after a change."""
    sources.cache_clear()
    origins.cache_clear()
    config.nav = expanded(config.nav)
    return config


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the pages that are not in docs/."""
    for path, text in sources().items():
        if path.startswith("docs/"):
            continue
        if posixpath.splitext(path)[1] in PICTURES:
            files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
        else:
            files.append(File.generated(config, place(path), content=text))
    files.append(File.generated(config, "api/index.md", content=api_index()))
    for room, modules in rooms().items():
        files.append(File.generated(config, f"api/{room}.md", content=api(room, modules)))
    return files


def on_page_markdown(markdown: str, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    """Turn links from files of the checkout to pages of the site."""
    here = page.file.src_uri
    if here.startswith("api/"):
        return markdown
    if here.startswith(f"{SOURCE}/"):
        page.meta["search"] = {"exclude": True}  # tables and listings would bury the texts
    origin = origins().get(here, f"docs/{here}")

    def turned(match: re.Match[str]) -> str:
        before, target, anchor, after = match.groups()
        found = next(links(origin, f"]({target})"), None)
        if found is None:
            return match.group()
        return before + posixpath.relpath(place(found), posixpath.dirname(here) or ".") + (anchor or "") + after

    return LINK.sub(turned, markdown)


@functools.cache
def origins() -> dict[str, str]:
    """Page of the site -> where its text stands in the checkout."""
    return {place(path): f"{path}/." if (ROOT / path).is_dir() else path for path in sources()}
