"""The documentation is what the code says, and builds without a warning into pages that fetch nothing."""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rotssl import config as cfg
from rotssl.config import cli
from rotssl.config.datasets import DATASETS
from rotssl.config.methods import METHODS
from rotssl.config.sweep import SweepConfig
from rotssl.config.tasks import TASKS
from tests.project.test_figures import script
from tests.project.test_imports import ROOMS

ROOT = Path(__file__).parents[2]
docs_reference, docs_picture = script("docs_reference"), script("docs_picture")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def pages():
    """Name of a reference page -> the text that the code makes."""
    return {path.stem: text for path, text in docs_reference.texts().items()}


def test_reference_pages_are_what_the_code_says(pages):
    for name, text in pages.items():
        there = (ROOT / "docs" / "reference" / f"{name}.md").read_text()
        assert there == text, f"docs/reference/{name}.md: run python scripts/docs_reference.py"


def sections(text):
    """Heading -> what is below it."""
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_method_task_and_field_is_in_the_reference(pages):
    methods, tasks, fields = (sections(pages[name]) for name in ("methods", "tasks", "fields"))
    assert list(methods) == list(METHODS) and list(tasks) == list(TASKS)
    for name in METHODS:
        for key, (_, spec) in cfg.schema(name).items():
            section, text = key.split(".")[0], spec.metadata["help"]
            below = methods[name] if section == "method" else fields[section]
            (row,) = [line for line in below.splitlines() if line.startswith(f"| `--{key}` |")]
            assert text.split()[0].strip(",:;.`") in row.replace("\\", "")
    for task in TASKS:
        assert tasks[task].count(f"| `--{task}.") == sum(key.startswith(f"{task}.") for key in cfg.schema())
    assert all(f"| `--{key}` |" in fields["sweep"] for key in cfg.fields_of("sweep", SweepConfig))
    assert all(f"| `{name}` |" in pages["data"] for name in DATASETS)


def test_every_program_recipe_and_sweep_is_in_the_reference(pages):
    programs = {f"jobs/{path.name}" for path in (ROOT / "jobs").glob("*.py")}
    assert set(sections(pages["commands"])) == programs
    files = [*(ROOT / "jobs" / "recipes").rglob("*.yaml"), *(ROOT / "jobs" / "sweeps").glob("*.yaml")]
    assert all(f"](../../{path.relative_to(ROOT)})" in pages["recipes"] for path in files)
    assert pages["recipes"].count("\n```bash\n") == len(files)


def test_the_map_of_the_code_has_all_rooms_in_their_order():
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE)
    assert tuple(rows) == ROOMS


def test_the_picture_is_what_the_script_draws_and_names_code_that_exists():
    drawn = docs_picture.drawing()
    assert drawn == (ROOT / "docs" / "data_flow.svg").read_text()
    code = "\n".join(path.read_text() for path in (ROOT / "rotssl").rglob("*.py"))
    words = " ".join(re.findall(r'class="code"[^>]*>([^<]*)<', drawn))
    names = [name.rpartition(".")[2] for name in re.findall(r"[\w.]*[A-Z_.]\w*", words)]
    assert len(names) > 10
    assert [name for name in names if not re.search(rf"(def|class) {name}\b", code)] == []


def printed():
    """Patterns of the texts in the code that take part in a printed line: words, with anything where a value is filled in."""
    found = []
    for path in (ROOT / "rotssl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value = ast.Constant(0)  # a docstring
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            words = [str(part.value) if isinstance(part, ast.Constant) else "%s" for part in parts]
            words = re.split(r"%[sd]", "".join(words))
            if len(re.findall("[a-z]+", " ".join(words))) >= 3 and " " in "".join(words).strip():
                found.append(".+".join(map(re.escape, words)))
    return re.compile("|".join(found))


def test_troubleshooting_quotes_what_the_code_prints():
    text, patterns = (ROOT / "docs" / "troubleshooting.md").read_text(), printed()
    lines = [line for kind, block in BLOCK.findall(text) if kind == "text" for line in block.splitlines()]
    assert len(lines) > 30
    other = re.compile(
        r"error: (\w+\.\w+: got .+, expected .+|No space left on device: .+)"
    )  # by require(), by the system
    assert [line for line in lines if not patterns.search(line) and not other.fullmatch(line)] == []


def test_troubleshooting_gives_commands_that_parse():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    lines = [line for kind, block in BLOCK.findall(text) if kind == "bash" for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("python jobs/pretrain.py ")]
    assert len(commands) > 15
    recipe = str(ROOT / "jobs" / "recipes" / "byol_cifar10.yaml")
    for line in commands:
        flags = line.replace("RECIPE", recipe).replace("--help", "--dry-run").split()[2:]
        cli.parse([*flags, "--data.root", "DIR"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    for name in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: make docs installs it")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-3000:]
    return folder


@pytest.mark.exhaustive
def test_the_site_builds_without_a_warning_and_has_all_pages(site):
    texts = [path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")]
    expected = {str(path).replace("README", "index") for path in texts}
    expected |= {"index", "methods", "architecture", "contributing", "testing", "security", "changelog"}
    expected |= {f"api/{path.stem}" for path in (ROOT / "rotssl").iterdir() if not path.stem.startswith("__")}
    assert {name for name in expected if not (site / f"{name}.html").exists()} == set()
    assert "load_encoder" in (site / "api" / "export.html").read_text()


@pytest.mark.exhaustive
def test_no_page_fetches_anything(site):
    fetched = re.compile(
        r'<(?:script|img|iframe|source)\b[^>]*\bsrc="?(?:https?:)?//|<link\b[^>]*\bhref="?(?:https?:)?//'
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 100
    assert [str(path) for path in pages if fetched.search(path.read_text())] == []
    assert [str(path) for path in site.rglob("*.css") if re.search(r"url\([\"']?https?:", path.read_text())] == []


@pytest.mark.exhaustive
def test_a_browser_fetches_nothing_and_finds_a_word(site):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        names = [playwright.chromium.executable_path, "chromium", "chromium-browser", "google-chrome"]
        program = next((path for name in names if (path := shutil.which(name))), None)
        if program is None:
            pytest.skip("no Chromium here (Debian: apt install chromium)")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page, asked = browser.new_page(), []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / "index.html").as_uri())
        page.get_by_placeholder("Search").press_sequentially("hang_minutes")
        page.locator(".md-search-result__link[href*='fields.html#scaling']").wait_for()
        browser.close()
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
