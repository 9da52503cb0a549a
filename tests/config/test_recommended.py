"""What a run without a recipe takes from the registry of methods, and what replaces it."""

import dataclasses

import pytest

from rotssl import config as cfg
from rotssl.config import sweep
from rotssl.config.cli import parse
from rotssl.config.methods import METHODS
from rotssl.config.recipes import recommended
from tests.config.command_lines import recipe

FIELDS = {"views.size_start": 0.5, "rotation.conditioned": True, "rotation.share": 0.4}


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """An entry for BYOL that does not depend on what was measured last."""
    spec = dataclasses.replace(METHODS["byol"], recommended=FIELDS, gain="+9.9 points", paper_weight=0.17)
    monkeypatch.setitem(METHODS, "byol", spec)


# size_start, then rotation: mode, conditioned, weight, share, head_on
TAKEN = """
 | 0.5 in_place True auto 0.4 encoder
--views.size_start none | None in_place True auto 0.4 encoder
--views.size_start 20 | 20 in_place True auto 0.4 encoder
--rotation.conditioned false | 0.5 in_place False auto 0.4 encoder
--rotation.mode in_place | 0.5 in_place True auto 0.4 encoder
--rotation.share 0.1 | 0.5 in_place True auto 0.1 encoder
--rotation.weight 2 | 0.5 in_place True 2.0 0.2 encoder
--rotation.weight auto | 0.5 in_place True auto 0.2 encoder
--rotation.weight 0 | 0.5 in_place False 0.0 0.2 encoder
--rotation.mode disjoint | 0.5 disjoint False 1.0 0.2 encoder
--rotation.mode extra | 0.5 extra False 0.17 0.2 projector
--rotation.mode extra --rotation.head_on encoder | 0.5 extra False 0.17 0.2 encoder
--rotation.mode extra --rotation.weight 3 | 0.5 extra False 3.0 0.2 encoder
--rotation.mode extra --rotation.share 0.3 | 0.5 extra False auto 0.3 encoder
--rotation.mode extra --rotation.weight 0 | 0.5 extra False 0.0 0.2 encoder
--views.split 2 | 0.5 in_place False auto 0.4 encoder
--encoder.name timm/resnet18 | None in_place True auto 0.4 encoder
"""


@pytest.mark.parametrize("line", TAKEN.strip("\n").splitlines())
def test_given_fields_replace_recommended_ones(line):
    flags, expected = line.split("| ")
    config = parse(flags.split()).config
    task = config.rotation
    found = config.views.size_start, task.mode, task.conditioned, task.weight, task.share, task.head_on
    assert " ".join(map(str, found)) == expected


def test_a_recipe_is_complete_in_itself(tmp_path):
    command = parse(["--config", recipe(tmp_path, "train: {epochs: 3}")])
    assert command.recommended == {} and command.config.views.size_start is None
    assert parse([]).recommended == FIELDS


def test_a_sweep_without_a_recipe_takes_them_for_each_method(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text("grid: {method.name: [byol, barlow], rotation.weight: [0, 1]}")

    def found():
        points = sweep.expand(sweep.parse(["--config", str(path)], "ablate.py", "").sweep)
        return [(p.config.method.name, p.config.views.size_start, p.config.rotation.conditioned) for p in points]

    own = METHODS["barlow"].recommended.get("views.size_start")
    assert found()[:2] == [("byol", 0.5, False), ("byol", 0.5, True)]
    assert [side for name, side, _ in found() if name == "barlow"] == [own] * 2
    (tmp_path / "recipe.yaml").write_text("train: {epochs: 3}")
    path.write_text("sweep: {recipe: recipe.yaml}\ngrid: {rotation.weight: [0, 1]}")
    assert found() == [("byol", None, False)] * 2


def test_help_marks_them_and_says_what_they_gained(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "default: 0.5*]" in shown and "default: true*]" in shown and "without a recipe: +9.9 points." in shown
    assert shown.count("*]") == len(FIELDS)


@pytest.mark.parametrize("method", METHODS)
def test_every_entry_of_the_registry_builds(method):
    given = {"method.name": method}
    assert cfg.build({**recommended(given), **given})
    paper = {**given, "rotation.mode": "extra"}
    assert cfg.build({**recommended(paper), **paper}).rotation.mode == "extra"
