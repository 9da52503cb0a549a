"""The layering: where ray and mlflow may be imported, and that imports point one way."""

import ast
import re
from pathlib import Path

import pytest

from rotssl.config.methods import METHODS
from rotssl.config.tasks import TASKS

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "rotssl").rglob("*.py"))
# A room imports only itself and the rooms to its left.
ROOMS = (
    *("base", "config", "runs", "models", "data", "packing", "methods", "tasks", "evaluation", "engine"),
    *("explain", "tracking", "export", "runtimes", "assessment", "lifecycle", "sweeps", "reports", "commands", "api"),
)


def module_name(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file):
    """Names of all modules that a file imports, wherever in it."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):  # what only the type checker imports makes no arrow
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import, in line {node.lineno}"
            for alias in node.names:
                path = ROOT / node.module.replace(".", "/") / alias.name
                submodule = path.with_suffix(".py").exists() or path.is_dir()
                yield f"{node.module}.{alias.name}" if submodule else node.module


def test_ray_and_mlflow_stay_in_their_rooms():
    found = []
    for file in FILES:
        here, top = module_name(file), {name.split(".")[0] for name in imported(file)}
        found += [
            f"{here}: {name}"
            for name, room in (("ray", "runtimes"), ("mlflow", "tracking"))
            if name in top and f".{room}." not in here
        ]
    assert found == []


def test_rooms_import_only_to_their_left():
    inside = {path.stem for path in (ROOT / "rotssl").iterdir() if path.is_dir() or path.suffix == ".py"}
    assert inside - {"__init__", "__pycache__"} == set(ROOMS)
    wrong = []
    for file in FILES:
        here = module_name(file)
        if here != "rotssl":
            ours = [name for name in imported(file) if name.startswith("rotssl.")]
            wrong += [f"{here} imports {name}" for name in ours if room(name) > room(here)]
    assert wrong == []


def test_no_circle_of_files():
    arrows = {module_name(file): {name for name in imported(file) if name.startswith("rotssl.")} for file in FILES}

    def circle(module, above):
        if module in above:
            return [*above[above.index(module) :], module]
        if module in clear:
            return []
        for name in sorted(arrows.get(module, ())):
            if found := circle(name, [*above, module]):
                return found
        clear.add(module)
        return []

    clear = set()
    assert [found for module in sorted(arrows) if (found := circle(module, []))] == []


def room(module):
    """Place of a module's room in the house."""
    return ROOMS.index(module.split(".")[1])


def test_no_worker_loads_what_writes_to_mlflow():
    # Importing mlflow takes seconds, which a worker would spend before its first step; the driver has it open already.
    for file in FILES:
        if ".engine." in module_name(file) or module_name(file).startswith("rotssl.runtimes.ray_"):
            assert not [name for name in imported(file) if name.startswith("rotssl.tracking")]


@pytest.mark.parametrize(("folder", "forbidden"), [("methods", TASKS), ("tasks", METHODS)])
def test_no_method_names_a_task_and_no_task_a_method(folder, forbidden):
    files = [file for file in (ROOT / "rotssl" / folder).glob("*.py") if file.name != "__init__.py"]
    assert len(files) >= 3
    for file in files:
        for word in forbidden:
            found = re.search(rf"\b{word.removesuffix('v2')}", file.read_text(), re.IGNORECASE)
            assert not found, f"{file.name} names {word}, in code or in words"
