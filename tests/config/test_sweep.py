"""What a sweep file stands for: its cells, their order, baselines and labels, and draws."""

import math
import re

import pytest

from rotssl import config as cfg
from rotssl.config.sweep import draw, expand, parse
from tests.config.sweeps import names_in, reader
from tests.programs import ROOT


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    return reader(tmp_path, monkeypatch)


@pytest.fixture
def cells(sweep):
    return lambda content, *flags: list(expand(sweep(content, *flags)))


@pytest.fixture
def names(sweep):
    return names_in(sweep)


def points(cells, *keys):
    """The values of some fields in each cell."""
    return [tuple(cfg.flat(cell.config)[key] for key in keys) for cell in cells]


# --- what a file stands for ---------------------------------------------------------------------------------------------------


def test_cells_come_in_the_order_of_the_file_each_with_its_seeds(cells):
    found = cells("sweep: {seeds: 2}\ntrain: {seed: 5}\ngrid: {train.epochs: [4, 2], rotation.weight: [1, 0, 3]}")
    assert points(found, "train.epochs", "rotation.weight", "train.seed") == [
        (epochs, weight, seed)
        for epochs in (4, 2)
        for weight, seed in ((0, 5), (1, 5), (0, 6), (1, 6), (3, 5), (3, 6))  # the baseline before what it is for
    ]
    assert [cell.baseline for cell in found[:4]] == [True, False, True, False]


# Axes, and how many cells (baselines among them) they make with two seeds.
COUNTS = """
rotation.weight: [0, 0.3, 1], train.epochs: [2, 4] | 12 | 4
rotation.weight: [0.3, 1], train.epochs: [2, 4] | 12 | 4
rotation.weight: [0.3, 1], train.epochs: [2, 4], method.name: [byol, simclr] | 24 | 8
rotation.mode: [extra, in_place], rotation.fraction: [0.5, 1] | 10 | 2
rotation.angles: [shared, independent], rotation.weight: [0, 1], rotation.schedule: [constant, cosine] | 10 | 2
rotation.weight: [0], jigsaw.weight: [0, 1] | 4 | 2
rotation.weight: [0, 1], jigsaw.weight: [0, 1] | 8 | 2
rotation.weight: [0], jigsaw.weight: [1], jigsaw.grid: [3, 2], jigsaw.permutations: [20] | 6 | 2
rotation.weight: [0.3, 0.30, '0.3', 3e-1] | 4 | 2
optim.lr: [0.1, 0.2] | 8 | 4
"""


@pytest.mark.parametrize("line", COUNTS.strip().splitlines())
def test_a_baseline_is_run_once_for_each_method_budget_and_seed(cells, line):
    axes, count, plain = line.split(" | ")
    found = cells(f"sweep: {{seeds: 2}}\ngrid: {{{axes}}}")
    assert (len(found), sum(cell.baseline for cell in found)) == (int(count), int(plain))
    assert len({cfg.fingerprint(cell.config) for cell in found}) == len(found)


def test_without_baseline_there_are_only_the_cells_of_the_grid(cells):
    grid = "grid: {rotation.weight: [%s], train.epochs: [2, 4]}\nsweep: {baseline: false}"
    assert sorted(points(cells(grid % "1, 3"), "rotation.weight")) == [(1,), (1,), (3,), (3,)]
    assert sorted(points(cells(grid % "0, 3"), "rotation.weight")) == [(0,), (0,), (3,), (3,)]


def test_recipes_are_an_axis_and_a_file_beside_the_sweep_wins(cells, tmp_path):
    (tmp_path / "a.yaml").write_text("optim: {lr: 0.5}")
    (tmp_path / "work" / "a.yaml").write_text("optim: {lr: 0.7}")
    (tmp_path / "work" / "b.yaml").write_text("method: {name: simclr, temperature: 0.4}\noptim: {lr: 0.9}")
    found = cells("grid: {recipe: [a.yaml, b.yaml], train.epochs: [2, 4]}\ntrain: {batch_size: 64}")
    assert points(found, "method.name", "optim.lr", "train.epochs", "train.batch_size")[::2] == [
        ("byol", 0.5, 2, 64),
        ("byol", 0.5, 4, 64),
        ("simclr", 0.9, 2, 64),
        ("simclr", 0.9, 4, 64),
    ]
    assert found[4].config.method.temperature == 0.4
    # Given once, it is what all start from; the sweep file wins over it, a flag over both.
    one = "sweep: {recipe: b.yaml}\ngrid: {rotation.weight: [1]}\nmethod: {temperature: 0.6}"
    assert cells(one)[0].config.method.temperature == 0.6
    assert cells(one, "--method.temperature", "0.8")[0].config.method.temperature == 0.8


def test_a_flag_takes_the_place_of_an_axis(cells, tmp_path):
    file = "grid: {rotation.weight: [0, 1], train.epochs: [2, 4]}\ndistributions: {optim.lr: {uniform: [0.1, 1]}}"
    found = cells(file, "--train.epochs", "3", "--optim.lr", "0.2", "--sweep.seeds", "2")
    assert sorted(points(found, "rotation.weight", "train.epochs", "optim.lr", "train.seed")) == [
        (0, 3, 0.2, 0),
        (0, 3, 0.2, 1),
        (1, 3, 0.2, 0),
        (1, 3, 0.2, 1),
    ]
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.yaml").write_text(f"method: {{name: {'simclr' if name == 'c' else 'byol'}}}")
    found = cells("grid: {recipe: [a.yaml, b.yaml], rotation.weight: [1]}", "--sweep.recipe", "c.yaml")
    assert {cell.config.method.name for cell in found} == {"simclr"}


LABELLED = """
rotation.weight: [0, 1], train.epochs: [2, 4] | train.epochs=4 rotation.weight=0 | rotation.weight=1 train.epochs=4
train.epochs: [2, 4] | train.epochs=2 rotation.weight=0 | train.epochs=2 rotation.weight=auto
method.name: [byol, simclr] | method.name=simclr | method.name=byol rotation.weight=auto
train.seed: [0, 1] | rotation.weight=0 | rotation.weight=auto
rotation.mode: [extra, in_place], rotation.weight: [0, 1] | rotation.weight=0 | rotation.mode=in_place rotation.weight=1
jigsaw.weight: [0, 1] | jigsaw.weight=0 rotation.weight=0 | jigsaw.weight=0 rotation.weight=auto
optim.weight_decay: [0.12345678, 0.12345679] | optim.weight_decay=0.12345679 rotation.weight=0
recipe: [a.yaml, b.yaml] | recipe=a rotation.weight=0 | recipe=b rotation.weight=1
"""


@pytest.mark.parametrize("line", LABELLED.strip().splitlines())
def test_a_label_says_what_is_varied_and_tells_all_that_differ_apart(cells, tmp_path, line):
    for i, name in enumerate("ab"):
        (tmp_path / f"{name}.yaml").write_text(f"optim: {{lr: 0.{i + 1}}}")
    axes, *expected = line.split(" | ")
    found = cells(f"grid: {{{axes}}}")
    assert {" ".join(sorted(label.split())) for label in expected} <= {
        " ".join(sorted(cell.label.split())) for cell in found
    }
    assert len({(cell.label, cell.config.train.seed) for cell in found}) == len(found)


@pytest.mark.parametrize("file", sorted((ROOT / "jobs" / "sweeps").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_sweeps_that_come_with_the_project_are_good(file):
    header = " ".join(line.lstrip("# ") for line in file.read_text().splitlines() if line.startswith("#"))
    command, cost = re.search("Command: .*python jobs/ablate.py (.*) Cost: +([0-9]+) runs", header).groups()
    found = list(expand(parse(command.replace("jobs/", f"{ROOT}/jobs/").split(), "jobs/ablate.py", "").sweep))
    assert len(found) == int(cost) and any(cell.baseline for cell in found)


# --- draws --------------------------------------------------------------------------------------------------------------------


DRAWN = [
    ("uniform", [0.1, 3.0]),
    ("uniform", [0.123456, 0.123457]),
    ("log_uniform", [1e-6, 10.0]),
    ("integer", [2, 4]),
    ("choice", ["a", "b", "c"]),
]


@pytest.mark.parametrize(("kind", "values"), DRAWN, ids=lambda value: str(value))
def test_draws_stay_within_their_bounds_and_reach_all_of_them(kind, values):
    drawn = [draw("optim.lr", i, kind, values) for i in range(2000)]
    if kind == "choice":
        assert set(drawn) == set(values)
        return
    low, high = values
    assert low <= min(drawn) and max(drawn) <= high
    if kind == "integer":
        assert set(drawn) == {2, 3, 4} and {type(number) for number in drawn} == {int}
    elif kind == "log_uniform":  # as many in each decade
        decades = [math.floor(math.log10(number)) for number in drawn]
        assert all(230 < decades.count(decade) < 340 for decade in range(-6, 1))
    elif high > 1:
        assert sum(number < 1.55 for number in drawn) / 2000 == pytest.approx(0.5, abs=0.03)


def test_more_samples_keep_those_that_there_are(cells, names):
    file = "distributions: {optim.lr: {log_uniform: [0.01, 1]}, rotation.weight: {uniform: [0.1, 3]}}"
    few, many = (cells(file, "--sweep.samples", str(count)) for count in (3, 8))
    assert (len(few), len(many)) == (6, 16)
    assert points(few, "optim.lr", "rotation.weight") == points(many, "optim.lr", "rotation.weight")[:6]
    assert len({cell.config.optim.lr for cell in many}) == 8
    assert draw("optim.lr", 0, "uniform", [0, 1]) != draw("rotation.weight", 0, "uniform", [0, 1])
    assert set(names(file, "--sweep.samples", "3")) < set(names(file, "--sweep.samples", "8"))


def test_every_point_of_the_grid_has_the_same_draws(cells):
    file = "sweep: {samples: 2, baseline: false}\ngrid: {train.epochs: [2, 4]}\ndistributions: {optim.lr: {uniform: [0, 1]}}"
    assert len(set(points(cells(file), "optim.lr"))) == 2
