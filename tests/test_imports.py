"""The layering: where ray and mlflow may be imported, and that imports point one way."""

import ast
import re
from pathlib import Path

import pytest

from rotssl.config.methods import METHODS
from rotssl.tasks import TASKS

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "rotssl").rglob("*.py"))
# From the top down; a module imports only from its own layer or from those below it.
LAYERS = [
    ("rotssl.commands",),
    ("rotssl.sweeps", "rotssl.lifecycle"),
    ("rotssl.runtimes", "rotssl.tracking"),
    ("rotssl.engine", "rotssl.data.loader"),
    ("rotssl.tasks",),
    ("rotssl.methods",),
    ("rotssl.models", "rotssl.base.distributed", "rotssl.data", "rotssl.evaluation", "rotssl.methods.losses"),
    ("rotssl.reports", "rotssl.runs"),
    ("rotssl.config", "rotssl.base"),
]


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
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                path = ROOT / node.module.replace(".", "/") / alias.name
                submodule = path.with_suffix(".py").exists() or path.is_dir()
                yield f"{node.module}.{alias.name}" if submodule else node.module


def layer(module):
    """Index of the layer whose longest prefix matches."""
    matches = [
        (len(prefix), index)
        for index, prefixes in enumerate(LAYERS)
        for prefix in prefixes
        if module == prefix or module.startswith(prefix.removesuffix("*").removesuffix(".") + ".")
    ]
    return max(matches)[1] if matches else None


def test_ray_and_mlflow_stay_in_their_modules():
    found = []
    for file in FILES:
        here, top = module_name(file), {name.split(".")[0] for name in imported(file)}
        found += [f"{here}: ray"] * ("ray" in top and not here.startswith("rotssl.runtimes."))
        found += [f"{here}: mlflow"] * ("mlflow" in top and not here.startswith("rotssl.tracking."))
    assert found == []


def test_imports_point_downwards():
    above = []
    for file in FILES:
        here = module_name(file)
        if here == "rotssl":
            continue
        assert layer(here) is not None, f"{here} has no layer in this test"
        ours = [name for name in imported(file) if name.startswith("rotssl.")]
        above += [f"{here} imports {name}" for name in ours if layer(name) is None or layer(here) > layer(name)]
    assert above == []


def test_no_worker_loads_what_writes_to_mlflow():
    # Importing mlflow takes seconds, which a worker would spend before its first step; the driver has it open already.
    for name in ("runtimes/ray_train", "engine/trainer", "engine/recorder"):
        assert not {"rotssl.tracking.writer", "rotssl.tracking.reader"} & set(imported(ROOT / "rotssl" / f"{name}.py"))


@pytest.mark.parametrize(("folder", "forbidden"), [("methods", TASKS), ("tasks", METHODS)])
def test_no_method_names_a_task_and_no_task_a_method(folder, forbidden):
    files = [file for file in (ROOT / "rotssl" / folder).glob("*.py") if file.name != "__init__.py"]
    assert len(files) >= 3
    for file in files:
        for word in forbidden:
            found = re.search(rf"\b{word.removesuffix('v2')}", file.read_text(), re.IGNORECASE)
            assert not found, f"{file.name} names {word}, in code or in words"
