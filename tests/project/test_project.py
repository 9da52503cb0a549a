"""The project's own files: dependencies stated once, recipes that build, jobs that stay thin."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def test_conda_environment_repeats_the_dependencies():
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in conda if isinstance(entry, dict)]
    assert sorted(pip) == sorted(ours)
    assert "python>=3.11" in conda


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.stem)
def test_jobs_are_thin(path):
    assert len(path.read_text().splitlines()) <= 60


def test_files_and_functions_are_short():
    long = []
    for path in (*(ROOT / "rotssl").rglob("*.py"), *(ROOT / "tests").rglob("*.py")):
        text = path.read_text()
        long += [str(path)] * (len(text.splitlines()) > 350)
        functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        long += [f"{path}: {f.name}" for f in functions if f.end_lineno - f.lineno + 1 > 60]
    assert long == []


@pytest.mark.system
def test_core_runs_without_ray_and_mlflow(tmp_path):
    # Hides both packages, then trains: what a user of the library without a cluster has.
    code = f"""
import sys
sys.modules["ray"] = sys.modules["mlflow"] = None
from pathlib import Path
from rotssl import config as cfg
from rotssl.runs import journal
from rotssl.data import datasets
assert "torch" not in sys.modules  # which takes seconds, before a driver says that its data are not there
import torch
from rotssl.engine.trainer import Trainer
from rotssl.engine.runtime import LocalRuntime
config = cfg.build({{"data.name": "synthetic", "data.limit": 64, "train.batch_size": 16, "train.epochs": 1,
                     "optim.warmup_epochs": 0, "storage.path": {str(tmp_path)!r}}})
config = cfg.resolve(config, 32, 64)
Trainer(config, datasets.load(config.data, 0.1), LocalRuntime(config.run_dir, torch.device("cpu")),
        journal.Journal(config.run_dir)).run()
assert journal.read(config.run_dir)[1]["knn/top1"] > 0
assert sys.modules["ray"] is None and sys.modules["mlflow"] is None
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_versions_agree():
    from rotssl import __version__

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__
    assert re.search(rf"^## .*{re.escape(__version__)}", (ROOT / "CHANGELOG.md").read_text(), re.M)
