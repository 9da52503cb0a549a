"""Every recipe builds and takes two ``--smoke`` steps on synthetic images of its own size; one that cannot be read is refused."""

import re
from pathlib import Path

import pytest
import torch

from rotssl.config import cli, recipes
from rotssl.config.methods import METHODS
from rotssl.data import datasets
from rotssl.engine.runtime import LocalRuntime
from rotssl.engine.trainer import Trainer
from rotssl.lifecycle import prepare
from rotssl.runs import journal
from tests.config.command_lines import recipe, refused

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "jobs" / "recipes").rglob("*.yaml"))
SIDES = {"cifar10": 32, "cifar100": 32, "fashion-mnist-sample": 28, "tiny-imagenet": 64, "packed": 224}


def named(path):
    return str(path.relative_to(ROOT / "jobs" / "recipes").with_suffix(""))


def test_all_recipes_were_found():
    names = {path.stem for path in RECIPES if path.parent == ROOT / "jobs" / "recipes"}
    assert len(names) >= 36
    papers = {path.stem for path in RECIPES if path.parent.name == "paper"}
    assert papers == {f"{method}_cifar10" for method in ("simclr", "byol", "simsiam", "swav")}
    assert {f"{method}_fashion_mnist_sample" for method in METHODS} <= names
    for data in ("cifar10", "cifar100"):
        assert sum(name.endswith(f"_{data}") for name in names) >= 8
    assert {"swav_imagenet_30ep", "swav_imagenet_50ep"} <= names


def test_rotation_is_a_field_never_a_second_recipe():
    for path in RECIPES:
        given = recipes.load_recipe(path)
        assert given["rotation.weight"] > 0 or METHODS[given["method.name"]].labels, path.name
        assert not re.search("rot|plain", path.stem), path.name


def command(path):
    """The head of a recipe, and the flags of the command that it gives."""
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    (line,) = re.findall(r"Command: python jobs/pretrain.py (.*)", head)
    return head, line.replace(str(path.relative_to(ROOT)), str(path)).split()


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_recipe_says_what_it_is_and_its_command_parses(path):
    head, flags = command(path)
    for word in ("Paper:", "Command:", "Cost:", "Score:"):
        assert word in head, f"{path.name} does not state its {word}"
    asked, small = cli.parse(flags).config, cli.parse([*flags, "--smoke"]).config
    for section in ("views", "encoder", "rotation", "optim"):  # what the recipe is about is left alone
        ours, theirs = vars(getattr(asked, section)), vars(getattr(small, section))
        assert {key for key in ours if ours[key] != theirs[key]} <= {"warmup_epochs"}


def tier(path):
    """Recipes of one method for other data differ in rates and lengths only; large images take long."""
    name = named(path)
    short = name.endswith("sample") or name.startswith("paper") or name == "dino_vit_cifar10"
    return pytest.mark.contract if short else pytest.mark.exhaustive


@pytest.mark.parametrize("path", [pytest.param(path, id=named(path), marks=tier(path)) for path in RECIPES])
def test_recipe_takes_two_steps(tmp_path, path):
    flags = command(path)[1]
    small = cli.parse([*flags, "--smoke", "--storage.path", str(tmp_path), "--evaluation.knn_every", "0"])
    config, _ = prepare(small.config)
    assert config.data.name == "synthetic" and config.data.image_size == SIDES[cli.parse(flags).config.data.name]
    config.run_dir.mkdir(parents=True)
    run = Trainer(
        config,
        datasets.load(config.data, config.evaluation.holdout),
        LocalRuntime(config.run_dir, torch.device("cpu")),
        journal.Journal(config.run_dir),
    )
    assert run.total_steps == 2
    run.run()
    (point,) = journal.read(config.run_dir).values()
    assert point["cost/samples"] == 2 * config.train.batch_size
    assert all(point[f"loss/{task}"] > 0 for task in config.active())
    assert (config.run_dir / "views.png").exists()


BAD_RECIPES = r"""
train: {epochs: 3 | line 1 | not valid YAML
train: {epochs: 2020-99-99} | not valid YAML
train: {epochs: !!int abc} | not valid YAML
train: {epochs: !!python/name:os.system ''} | not valid YAML
- train | got list | sections
trian: {epochs: 3} | trian.epochs: no such field | did you mean 'train.epochs'?
method: {name: [byol]} | method.name: got ['byol'] | simclr, mocov2, byol
train: {epochs: 2.5} | train.epochs: got 2.5, expected an integer
"""


@pytest.mark.parametrize("line", BAD_RECIPES.strip().splitlines())
def test_a_bad_recipe_is_refused(tmp_path, line):
    content, *words = line.split(" | ")
    refused(["--config", recipe(tmp_path, content)], *words)


def test_a_recipe_that_is_no_yaml_file_is_refused(tmp_path):
    for content, word in ((b"\xff\xfe", "text file"), (b"a: \x00", "valid YAML"), (b"[" * 20000, "deeply")):
        refused(["--config", recipe(tmp_path, content)], word)
    for path, word in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "directory")):
        refused(["--config", str(path)], str(path), word)
