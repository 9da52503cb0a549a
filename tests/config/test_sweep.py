"""Sweeps up to where a cluster is needed: files to trials, trials to slots, who is stopped, and what is refused."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rotssl import config as cfg
from rotssl.commands import run_command
from rotssl.commands.ablate import trials_of
from rotssl.config.fields import ConfigError
from rotssl.config.sweep import SweepConfig, draw, expand, parse
from rotssl.runs.state import RunState, check_writable, run_folder
from rotssl.runtimes import ray_cluster, ray_tune
from tests.programs import ROOT, job

RECIPES = ROOT / "jobs" / "recipes"
SMALL = "data: {name: synthetic}\n"


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A function from the content of a file and flags to the sweep; the working directory is an empty folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def read(content, *flags):
        (tmp_path / "some.yaml").write_text(content)
        return parse(["--config", str(tmp_path / "some.yaml"), *flags], "jobs/ablate.py", "").sweep

    return read


@pytest.fixture
def cells(sweep):
    return lambda content, *flags: list(expand(sweep(content, *flags)))


@pytest.fixture
def names(sweep):
    return lambda content, *flags: [trial.name for trial in trials_of(sweep(SMALL + content, *flags))]


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
train.epochs: [2, 4] | train.epochs=2 rotation.weight=0 | train.epochs=2 rotation.weight=1
method.name: [byol, simclr] | method.name=simclr rotation.weight=0 | method.name=simclr rotation.weight=1
train.seed: [0, 1] | rotation.weight=0 | rotation.weight=1
rotation.mode: [extra, in_place], rotation.weight: [0, 1] | rotation.weight=0 | rotation.mode=in_place rotation.weight=1
jigsaw.weight: [0, 1] | jigsaw.weight=0 rotation.weight=0 | jigsaw.weight=0 rotation.weight=1
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


# --- names --------------------------------------------------------------------------------------------------------------------


def test_a_trial_is_its_resolved_configuration(names):
    grid = "grid: {rotation.weight: [0, %s], train.epochs: [2, %s]}"
    old, wide = set(names(grid % ("1", "4"))), set(names(grid % ("1, 3", "4, 6")))
    assert (len(old), len(wide)) == (4, 9) and old < wide
    for flags in (
        ["--scaling.num_workers", "2"],
        ["--scaling.cpus_per_worker", "3", "--scaling.use_gpu", "true"],
        ["--tracking.experiment", "other", "--tracking.uri", "http://127.0.0.1:9"],
        ["--storage.path", "elsewhere"],
        ["--sweep.name", "other", "--sweep.scheduler", "asha", "--sweep.concurrency", "1"],
        ["--data.image_size", "32", "--encoder.stem", "imagenet"],  # what auto stands for
        ["--evaluation.linear", "false", "--train.accumulate", "2"],  # not what is computed
    ):
        assert set(names(grid % ("1", "4"), *flags)) == old, flags
    for flags in (["--optim.lr", "0.3"], ["--train.seed", "1"], ["--data.limit", "512"], ["--model.norm", "batch"]):
        assert not set(names(grid % ("1", "4"), *flags)) & old, flags


def test_a_name_says_what_matters_most(names):
    found = names("grid: {rotation.weight: [0.3], train.epochs: [2, 4], jigsaw.weight: [2]}")
    assert [name.rsplit("-", 1)[0] for name in found] == [
        "byol-rotation0-2ep-seed0",
        "byol-rotation0.3-jigsaw2-2ep-seed0",
        "byol-rotation0-4ep-seed0",
        "byol-rotation0.3-jigsaw2-4ep-seed0",
    ]


def test_what_only_the_data_show_to_be_equal_is_one_trial(names):
    assert len(names("grid: {data.image_size: [auto, 32], optim.lr: [0.1]}")) == 2


def test_trials_of_one_worker_run_without_ray_train_and_others_with(sweep):
    for flag, expected in (("auto", 0), ("0", 0), ("1", 0), ("2", 2)):
        (trial, *_) = trials_of(sweep(SMALL + "grid: {rotation.weight: [1]}", "--scaling.num_workers", flag))
        assert trial.config.scaling.num_workers == expected
        assert trial.config.tracking.experiment == "some" and trial.config.run_dir.name == trial.name


def test_a_stopped_trial_is_done_for_a_sweep_that_stops(sweep):
    (trial, *_) = trials_of(sweep(SMALL + "grid: {rotation.weight: [1]}"))
    trial.config.run_dir.mkdir(parents=True)
    for status, ends, prunes in (
        ("finished", True, True),
        ("pruned", False, True),
        ("failed", False, False),
        ("running", False, False),
        ("stopped", False, False),
    ):
        trial.record().write(status)
        assert (trial.is_done(False), trial.is_done(True)) == (ends, prunes)


# --- what is refused ----------------------------------------------------------------------------------------------------------

GRID = "grid: {rotation.weight: [0, 1]}"
BAD = """
grid: {rotation.wieght: [0, 1]} | grid.rotation.wieght: no such field (did you mean 'rotation.weight'?)
grid: {rotation: [0, 1]} | grid.rotation: no such field
grid: {rotation: {weight: [0, 1]}} | grid.rotation: no such field
grid: {röt.weight: [1]} | grid.röt.weight: no such field
grid: {3: [1]} | grid.3: no such field
grid: {null: [1]} | grid.None: no such field
girds: {rotation.weight: [0, 1]} | girds: no such section (did you mean 'grid'?)
Grid: {rotation.weight: [0, 1]} | Grid: no such section (did you mean 'grid'?)
trian: {epochs: 3};GRID | trian: no such section (did you mean 'train'?)
3: {epochs: 3};GRID | 3: no such section
train.epochs: 3;GRID | train.epochs: no such section (did you mean 'train'?)
train: {epoch: 3};GRID | train.epoch: no such field (did you mean 'train.epochs'?)
train: 3;GRID | train: got 3, expected a section
train: {epochs: [2, 4]};GRID | train.epochs: got [2, 4], expected an integer
train: {epochs: 0};GRID | train.epochs: got 0, expected an integer at least 1
train: {seed: -1};GRID | train.seed: got -1
grid: {} | grid: is empty
grid: [] | grid: got []
grid: 3 | grid: got 3
grid: | grid: | varies nothing
# nothing | grid: | varies nothing
rotation: {weight: 0.3} | grid: | varies nothing
distributions: {} | grid: | varies nothing
grid: {rotation.weight: []} | grid.rotation.weight: got [], expected a list of values
grid: {rotation.weight: 0.3} | grid.rotation.weight: got 0.3, expected a list of values
grid: {rotation.weight: null} | grid.rotation.weight: got None, expected a list of values
grid: {rotation.weight: {a: 1}} | grid.rotation.weight: got {'a': 1}, expected a list of values
grid: {rotation.weight: '0,1'} | grid.rotation.weight: got '0,1', expected a list of values
grid: {rotation.weight: [[0, 1]]} | rotation.weight: got [0, 1], expected a number at least 0
grid: {rotation.weight: &a [0, *a]} | rotation.weight: got [0, [...]], expected a number
grid: {rotation.weight: [null]} | rotation.weight: got None
grid: {rotation.weight: [0.3, big]} | rotation.weight: got 'big', expected a number at least 0
grid: {rotation.weight: [0.3, true]} | rotation.weight: got True
grid: {rotation.weight: [.nan]} | rotation.weight: got nan
grid: {rotation.weight: [.inf]} | rotation.weight: got inf
grid: {rotation.weight: [-1]} | rotation.weight: got -1
grid: {train.epochs: [2, 0]} | train.epochs: got 0, expected an integer at least 1
grid: {train.epochs: [-1]} | train.epochs: got -1
grid: {train.epochs: [1.5]} | train.epochs: got 1.5, expected an integer
grid: {train.epochs: [2020-01-01]} | train.epochs: got datetime.date(2020, 1, 1)
grid: {scaling.num_workers: [1, 2]} | grid.scaling.num_workers: cannot be varied
grid: {tracking.run_name: [a]} | grid.tracking.run_name: cannot be varied
grid: {tasks.log_gradients_every: [0, 5]} | grid.tasks.log_gradients_every: cannot be varied
grid: {evaluation.knn_every: [1, 0]} | grid.evaluation.knn_every: cannot be varied
grid: {storage.path: [a]} | grid.storage.path: cannot be varied
grid: {train.stop_after: [1]} | grid.train.stop_after: cannot be varied
grid: {data.download: [true]} | grid.data.download: cannot be varied
distributions: {scaling.num_workers: {integer: [1, 2]}} | distributions.scaling.num_workers: cannot be varied
rotation: {weight: 1};GRID | rotation.weight: given twice
distributions: {rotation.weight: {uniform: [0, 1]}};GRID | rotation.weight: given twice
sweep: {recipe: FASHION};grid: {recipe: [FASHION]} | sweep.recipe: given twice
tracking: {run_name: x};GRID | tracking.run_name: a sweep's runs are named after their configuration
sweep: {sedes: 3};GRID | sweep.sedes: no such field (did you mean 'sweep.seeds'?)
sweep: {seeds: 0};GRID | sweep.seeds: got 0, expected an integer at least 1
sweep: {seeds: 1.5};GRID | sweep.seeds: got 1.5
sweep: {seeds: 2};grid: {train.seed: [0, 1]} | sweep.seeds: got 2, but train.seed is varied
sweep: {samples: 0};GRID | sweep.samples: got 0
sweep: {concurrency: 0};GRID | sweep.concurrency: got 0
sweep: {concurrency: many};GRID | sweep.concurrency: got 'many', expected an integer at least 1 or 'auto'
sweep: {gpus_per_trial: 2};GRID | sweep.gpus_per_trial: got 2
sweep: {gpus_per_trial: 0};GRID | sweep.gpus_per_trial: got 0
sweep: {grace_epochs: 0};GRID | sweep.grace_epochs: got 0
sweep: {reduction_factor: 1};GRID | sweep.reduction_factor: got 1, expected a number greater than 1
sweep: {baseline: 1};GRID | sweep.baseline: got 1, expected true or false
sweep: {scheduler: hyperband};GRID | sweep.scheduler: got 'hyperband', expected 'none', 'asha', 'median'
sweep: {scheduler: asha};evaluation: {knn_every: 0};GRID | evaluation.knn_every: got 0, but asha compares kNN
sweep: {scheduler: asha};evaluation: {holdout: 0};GRID | evaluation.holdout: got 0, expected more: asha compares kNN
sweep: {scheduler: median};evaluation: {knn_every: 0};GRID | evaluation.knn_every: got 0, but median
sweep: 3;GRID | sweep: got 3, expected a section
sweep: {name: a/b};GRID | sweep.name: got 'a/b'
sweep: {name: ..};GRID | sweep.name: got '..'
sweep: {name: 3};GRID | sweep.name: got 3, expected text
sweep: {name: LONG};GRID | sweep.name: got 'LLL | expected a short name
sweep: {recipe: nowhere.yaml};GRID | sweep.recipe: cannot read nowhere.yaml: No such file
sweep: {recipe: LONG};GRID | sweep.recipe: cannot read LLL | too long
sweep: {recipe: work};GRID | sweep.recipe: cannot read | work: Is a directory
sweep: {recipe: binary.yaml};GRID | sweep.recipe: | binary.yaml is not a text file
sweep: {recipe: broken.yaml};GRID | sweep.recipe: | broken.yaml, line 2: not valid YAML
sweep: {recipe: 3};GRID | sweep.recipe: got 3, expected text
grid: {recipe: [FASHION, nowhere.yaml]} | grid.recipe: cannot read nowhere.yaml
grid: {recipe: [[a]]} | grid.recipe: got [['a']], expected a list of files
grid: {recipe: [null]} | grid.recipe: got [None], expected a list of files
grid: {recipe: [FASHION, two_workers.yaml]} | scaling.num_workers: got nothing and 2 from the recipes
grid: {recipe: [elsewhere.yaml, FASHION]} | storage.path: got /x and nothing from the recipes
distributions: {recipe: {choice: [FASHION]}} | distributions.recipe: got
distributions: 3 | distributions: got 3
distributions: {rotation.wieght: {uniform: [0, 1]}} | distributions.rotation.wieght: no such field
distributions: {rotation.weight: 3} | distributions.rotation.weight: got 3, expected one of uniform, log_uniform
distributions: {rotation.weight: {normal: [0, 1]}} | distributions.rotation.weight: got {'normal': [0, 1]}
distributions: {rotation.weight: {uniform: [1]}} | distributions.rotation.weight: got {'uniform': [1]}
distributions: {rotation.weight: {uniform: 1}} | distributions.rotation.weight: got {'uniform': 1}
distributions: {rotation.weight: {uniform: [1, 0]}} | distributions.rotation.weight: got [1, 0], expected two numbers
distributions: {rotation.weight: {uniform: [0, 1, 2]}} | distributions.rotation.weight: got [0, 1, 2]
distributions: {rotation.weight: {uniform: [a, b]}} | distributions.rotation.weight: got 'a', expected a number
distributions: {rotation.weight: {uniform: [0, .inf]}} | distributions.rotation.weight: got inf
distributions: {rotation.weight: {uniform: [-5, -4]}} | rotation.weight: got -4
distributions: {rotation.weight: {log_uniform: [0, 1]}} | distributions.rotation.weight: got [0, 1] | above 0
distributions: {rotation.weight: {uniform: [0, 1], choice: [3]}} | distributions.rotation.weight: got {
distributions: {rotation.weight: {choice: []}} | distributions.rotation.weight: got {'choice': []}
distributions: {rotation.weight: {choice: [[1]]}} | rotation.weight: got [1]
distributions: {train.epochs: {integer: [1.2, 3.7]}} | distributions.train.epochs: got 1.2, expected an integer
distributions: {train.epochs: {uniform: [1, 3]}} | train.epochs: got 2.588, expected an integer
grid: {method.name: [byol, bjol]} | method.name: got 'bjol' | did you mean 'byol'?
grid: {method.name: byol} | grid.method.name: got 'byol', expected a list
grid: {method.name: [[byol]]} | method.name: got ['byol']
method: {name: [byol]};GRID | method.name: got ['byol']
method: {name: bjol};GRID | method.name: got 'bjol'
grid: {method.name: [simclr, byol], method.temperature: [0.1]} | method.temperature: no such field
method: {temperature: 0.1};grid: {method.name: [simclr, byol]} | method.temperature: no such field
grid: {rotation.weight: [0, 1], rotation.weight: [3]} | --config: | line 1 | rotation.weight is given twice
GRID;data: {name: synthetic};GRID | --config: | line 3 | grid is given twice
grid: {rotation.weight: [0, 1] | --config: | not valid YAML
- grid | --config: | holds list, expected sections
grid: {rotation.weight: !!python/tuple [1]} | --config: | not valid YAML
train: {accumulate: 3};GRID | train.batch_size: got 256, expected a multiple of
grid: {rotation.fraction: [0.001]} | rotation.fraction: got 0.001
grid: {data.limit: [100]} | train.batch_size: got 256, expected at most the 100 training images
grid: {data.name: [cifar10], data.root: [/nowhere]} | data.root: no data_batch_1 in /nowhere
grid: {optim.name: [sgd, lars]} | optim.lr: got 'auto'
sweep: {seeds: 10001} | grid: | stands for 10001 configurations, expected at most 10000
sweep: {samples: 100000000000000000000};distributions: {optim.lr: {uniform: [0, 1]}} | grid: | expected at most 10000
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where sweeps are submitted from, with recipes good and bad."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    (tmp_path / "broken.yaml").write_text("a:\n b: {")
    (tmp_path / "two_workers.yaml").write_text("scaling: {num_workers: 2}")
    (tmp_path / "elsewhere.yaml").write_text("storage: {path: /x}")
    (tmp_path / "file").write_text("x")
    return tmp_path


def write(folder, content):
    words = {"GRID": GRID, "LONG": "L" * 300, "FASHION": str(RECIPES / "byol_fashion_mnist_sample.yaml"), ";": "\n"}
    for word, text in words.items():
        content = content.replace(word, text)
    (folder / "some.yaml").write_text(content)
    return str(folder / "some.yaml")


def refused(argv, capsys, *words):
    """Refused as jobs/ablate.py does it: one line that holds the words, and code 2."""
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: trials_of(parse(argv, "jobs/ablate.py", "").sweep) and 0)
    written = capsys.readouterr()
    assert ended.value.code == 2
    assert written.out == "" and written.err.startswith(f"error: {words[0]}"), written.err
    assert len(written.err.splitlines()) == 1 and all(word in written.err for word in words), written.err


@pytest.mark.parametrize("line", BAD.strip().splitlines())
def test_a_bad_sweep_file_is_refused_by_name(folder, capsys, line):
    content, *words = line.split(" | ")
    argv = ["--config", write(folder, content)]
    before = sorted(folder.rglob("*"))
    refused(argv, capsys, *words)
    assert sorted(folder.rglob("*")) == before


BAD_FLAGS = """
--sweep.seeds 0 | sweep.seeds: got '0', expected an integer at least 1
--sweep.sedes 2 | sweep.sedes: no such field (did you mean 'sweep.seeds'?)
--grid.rotation.weight 1 | grid.rotation.weight: no such field (did you mean 'rotation.weight'?)
--sweep.name a/b | sweep.name: got 'a/b'
--sweep.recipe nowhere | sweep.recipe: cannot read nowhere
--rotation.weight 0.5 | grid: | varies nothing
--train.epochs 2,4 | train.epochs: got '2,4', expected an integer
--method.temperature 0.1 | method.temperature: no such field
--method.tempertaure 0.1 | method.tempertaure: no such field (did you mean 'method.temperature'?)
--method.name bjol | method.name: got 'bjol'
--tracking.run_name a | tracking.run_name: a sweep's runs
--tracking.uri ftp://x | tracking.uri: got 'ftp://x'
--tracking.uri off | tracking.uri: got off, expected a store: a sweep's report is read from it
--storage.path s3://x | storage.path: got 's3://x'
--scaling.num_workers 3 | train.batch_size: got 256, expected a multiple of the 3 workers
--print_config | print_config: no such field
--resume x | got 'x', expected flags
--config other.yaml | --config: got 2 files, expected one
"""


@pytest.mark.parametrize("line", BAD_FLAGS.strip().splitlines())
def test_bad_flags_are_refused_by_name(folder, capsys, line):
    flags, *words = line.split(" | ")
    refused(["--config", write(folder, GRID), *flags.split()], capsys, *words)


@pytest.mark.parametrize("given", [[], ["--config="], ["--config"], ["--config", "nowhere"], ["--config", "."]])
def test_a_sweep_needs_a_file(folder, capsys, given):
    nothing, bare = given in ([], ["--config="]), given == ["--config"]
    why = "--config: expected a sweep file" if nothing else "--config: cannot read"
    refused(given, capsys, "argument --config: expected one argument" if bare else why)


PROGRAM = [
    ("grid: {train.epochs: [2, 0]}", "", "train.epochs: got 0"),
    ("grid: {rotation.weight: [0.3, big]}", "--dry-run", "rotation.weight: got 'big'"),
    ("GRID", "--resume", "--resume: "),
    ("GRID", "--dry-run --storage.path {}/file", "storage.path: cannot write to"),
]


def given(folder, content, flags):
    words = flags.format(folder).split()
    words += [] if "--storage.path" in words else ["--storage.path", str(folder / "results")]
    return "--config", write(folder, content), *words


@pytest.mark.parametrize(("content", "flags", "named"), PROGRAM, ids=[named for *_, named in PROGRAM])
def test_the_program_ends_with_one_line_and_code_2(folder, main, content, flags, named):
    before = sorted(folder.rglob("*"))
    code, _, err = main("ablate.py", *given(folder, content, flags))
    assert code == 2 and len(err.splitlines()) == 1 and named in err, err
    assert sorted(folder.rglob("*")) == sorted([*before, folder / "some.yaml"])


@pytest.mark.contract
def test_a_cluster_that_is_not_there_is_one_line_and_code_2(folder):
    env = os.environ | {"RAY_ADDRESS": "127.0.0.1:1"}
    done = job(*given(folder, "GRID", "--dry-run"), script="ablate.py", env=env)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "RAY_ADDRESS" in done.stderr, done.stderr
    assert not (folder / "results").exists()


def test_what_the_file_alone_shows_is_refused_without_importing_anything_heavy(folder):
    code = """
import atexit, sys
from rotssl.commands import run_command
from rotssl.config.sweep import expand, parse
atexit.register(lambda: print(sorted({"torch", "ray", "mlflow", "numpy"} & set(sys.modules))))
run_command(lambda: len(list(expand(parse(sys.argv[1:], "jobs/ablate.py", "").sweep))))
"""
    command = [sys.executable, "-c", code, "--config", write(folder, "grid: {rotation.weight: [1, big]}")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (2, "[]\n")
    assert done.stderr.splitlines() == ["error: rotation.weight: got 'big', expected a number at least 0"]


@pytest.mark.parametrize("file", sorted((ROOT / "jobs" / "sweeps").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_sweeps_that_come_with_the_project_are_good(file):
    header = " ".join(line.lstrip("# ") for line in file.read_text().splitlines() if line.startswith("#"))
    command, cost = re.search("Command: .*python jobs/ablate.py (.*) Cost: +([0-9]+) runs", header).groups()
    found = list(expand(parse(command.replace("jobs/", f"{ROOT}/jobs/").split(), "jobs/ablate.py", "").sweep))
    assert len(found) == int(cost) and any(cell.baseline for cell in found)


# --- the cluster --------------------------------------------------------------------------------------------------------------


def node(cpus, gpus=0, alive=True):
    return {"Alive": alive, "Resources": {"CPU": float(cpus), **({"GPU": float(gpus)} if gpus else {}), "memory": 1e9}}


# Nodes | fields | expected count, workers, resources of the Tune actor
FITS = [
    ([node(4)], {}, (4, 1, {"CPU": 1})),
    ([node(4), node(3)], {"scaling.cpus_per_worker": 2}, (3, 1, {"CPU": 2})),
    ([node(4), node(8, alive=False)], {}, (4, 1, {"CPU": 1})),
    ([node(0), node(2)], {}, (2, 1, {"CPU": 1})),
    ([node(4)], {"sweep.concurrency": 3}, (3, 1, {"CPU": 1})),
    ([node(4)], {"scaling.num_workers": 0}, (4, 1, {"CPU": 1})),
    ([node(5)], {"scaling.num_workers": 2}, (2, 2, {"memory": 1})),
    ([node(1), node(1), node(1)], {"scaling.num_workers": 2}, (1, 2, {"memory": 1})),
    ([node(3), node(3)], {"scaling.num_workers": 2, "scaling.cpus_per_worker": 2}, (1, 2, {"memory": 1})),
    ([node(8, 2)], {}, (2, 1, {"CPU": 1, "GPU": 1})),
    ([node(8, 2), node(8)], {}, (2, 1, {"CPU": 1, "GPU": 1})),
    ([node(8, 2)], {"scaling.use_gpu": False}, (8, 1, {"CPU": 1})),
    ([node(3, 2)], {"sweep.gpus_per_trial": 0.5}, (3, 1, {"CPU": 1, "GPU": 0.5})),
    ([node(8, 2)], {"sweep.gpus_per_trial": 0.5}, (4, 1, {"CPU": 1, "GPU": 0.5})),
    ([node(8, 2)], {"sweep.gpus_per_trial": 0.3}, (6, 1, {"CPU": 1, "GPU": 0.3})),
    ([node(8, 2)], {"sweep.gpus_per_trial": 1 / 3}, (6, 1, {"CPU": 1, "GPU": 1 / 3})),
    ([node(8, 2)], {"sweep.gpus_per_trial": 0.6}, (2, 1, {"CPU": 1, "GPU": 0.6})),
    ([node(8, 1)], {"sweep.gpus_per_trial": 0.142857}, (6, 1, {"CPU": 1, "GPU": 0.142857})),  # Ray has 0.1429
    ([node(8, 1)], {"sweep.gpus_per_trial": 0.1428}, (7, 1, {"CPU": 1, "GPU": 0.1428})),
    ([node(8, 4)], {"scaling.num_workers": 2}, (2, 2, {"memory": 1})),
    ([node(8, 4)], {"scaling.num_workers": 2, "sweep.gpus_per_trial": 1}, (2, 2, {"memory": 1})),
]


def planned(nodes, fields):
    settings = SweepConfig(**{key[6:]: value for key, value in fields.items() if key.startswith("sweep.")})
    config = cfg.build({key: value for key, value in fields.items() if not key.startswith("sweep.")})
    return ray_tune.plan_slots(config, settings, nodes)


@pytest.mark.parametrize(("nodes", "fields", "expected"), FITS)
def test_as_many_trials_run_as_the_cluster_holds(nodes, fields, expected):
    slots = planned(nodes, fields)
    assert (slots.count, slots.workers, slots.resources) == expected
    gpus = sum(one["Resources"].get("GPU", 0) for one in nodes)
    assert slots.use_gpu is (gpus > 0 and fields.get("scaling.use_gpu", True))


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 16),  # with 32, one rotated image in the end
        ({"rotation.fraction_end": None}, 32),
        ({"rotation.mode": "extra"}, 32),
        ({"train.batch_size": 48}, 8),  # of 12, each would be left with one of its four
    ],
)
def test_as_many_workers_as_can_share_the_batch(fields, count):
    config = cfg.resolve(cfg.build(fields), 28, 5000)
    workers = ray_cluster.plan_workers(config, {"CPU": 64, "GPU": 32}, [node(64, 32) | {"NodeManagerAddress": "a"}])
    assert workers.count == count
    # Those that stay idle are told of, with the field that keeps them so.
    assert bool(workers.why) == (count < 32) and (not workers.why or workers.why.split(":")[0] in cfg.schema())


TOO_MUCH = [
    ([node(4)], {"sweep.concurrency": 5}, "sweep.concurrency: got 5, expected at most 4"),
    ([node(8, 2)], {"sweep.concurrency": 3}, "sweep.concurrency: got 3, expected at most 2"),
    ([node(4)], {"sweep.concurrency": 3, "scaling.num_workers": 2}, "sweep.concurrency: got 3, expected at most 2"),
    ([node(4)], {"scaling.use_gpu": True}, "scaling.use_gpu: got true, but the cluster has no GPU"),
    ([node(4), node(8, 2, False)], {"scaling.use_gpu": True}, "scaling.use_gpu: got true"),
    ([node(4), node(4)], {"scaling.cpus_per_worker": 5}, "scaling.cpus_per_worker: got 5"),
    ([node(1), node(8, 8, False)], {"scaling.num_workers": 2}, "scaling.num_workers: got 2"),
    ([node(8, 2)], {"scaling.num_workers": 4}, "scaling.num_workers: got 4"),
    ([node(8, 2)], {"scaling.num_workers": 2, "sweep.gpus_per_trial": 0.5}, "sweep.gpus_per_trial: got 0.5"),
    ([], {}, "scaling.cpus_per_worker: got 1, but the cluster (0 CPUs, 0 GPUs) holds no trial"),
]


@pytest.mark.parametrize(("nodes", "fields", "message"), TOO_MUCH)
def test_what_the_cluster_does_not_hold_is_refused_by_name(nodes, fields, message):
    with pytest.raises(ConfigError) as caught:
        planned(nodes, fields)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


# --- who is stopped -----------------------------------------------------------------------------------------------------------


class FakeTrial:
    """What Tune's schedulers see of a trial."""

    status = "RUNNING"

    def __init__(self, index):
        self.trial_id, self.config = f"t{index}", {"trial": index}


class FakeController:
    """With trials that wait, for which a scheduler could pause others."""

    def get_live_trials(self):
        waiting = FakeTrial(99)
        waiting.status = "PENDING"
        return [waiting]


class Race:
    """Trials in lockstep under a scheduler; a stopped one says nothing more."""

    def __init__(self, configs, **settings):
        self.configs = [cfg.build({"optim.warmup_epochs": 0, **config}) for config in configs]
        self.scheduler = ray_tune.scheduler(SweepConfig(**settings), self.configs)
        self.trials = [FakeTrial(i) for i in range(len(configs))]
        for trial in self.trials:
            self.scheduler.on_trial_add(FakeController(), trial)

    def tell(self, index, epoch, accuracy):
        metrics = {} if accuracy is None else {"knn/top1": accuracy}
        result = {"epoch": epoch, "training_iteration": 1, **metrics}
        action = self.scheduler.on_trial_result(FakeController(), self.trials[index], result)
        assert action in ("CONTINUE", "STOP")
        return action

    def run(self, accuracy):
        """Epoch at which each trial was stopped, or None; accuracy is a function of trial and epoch."""
        stopped = dict.fromkeys(range(len(self.configs)))
        for epoch in range(1, 1 + max(config.train.epochs for config in self.configs)):
            for index, config in enumerate(self.configs):
                if stopped[index] is not None or epoch > config.train.epochs:
                    continue
                if self.tell(index, epoch, accuracy(index, epoch)) == "STOP":
                    stopped[index] = epoch
        return list(stopped.values())


stopping = pytest.mark.parametrize("rule", ["asha", "median"])
WEIGHTS = (0, 1, 2, 3, 4)


def group(epochs, weights=WEIGHTS, **fields):
    return [{"rotation.weight": weight, "train.epochs": epochs, **fields} for weight in weights]


def rising(index, epoch):
    return 0.5 - 0.05 * (index % 5) + 0.01 * epoch  # the first of five is the best


@pytest.mark.contract
@stopping
@pytest.mark.parametrize(
    "other",
    [
        group(16),
        group(8, **{"method.name": "simclr"}),
        group(8, **{"data.limit": 512}),
        group(8, **{"evaluation.knn_every": 2}),
        group(8, **{"evaluation.holdout": 0.2}),
    ],
    ids=["budget", "method", "data", "how often", "holdout"],
)
def test_only_what_is_alike_is_compared(rule, other):
    alone = Race(group(8), scheduler=rule).run(rising)
    assert alone[0] is None and sum(epoch is not None for epoch in alone) >= 2  # there is something to see
    for shift in (-0.4, 0.4):
        together = Race([*group(8), *other], scheduler=rule)
        found = together.run(lambda index, epoch, shift=shift: rising(index, epoch) + shift * (index >= 5))
        assert found == [*alone, *found[5:]]
        assert len(together.scheduler.parts) == 2


@stopping
def test_seeds_weights_and_rates_are_compared(rule):
    configs = [{"train.epochs": 8, "train.seed": 0}, {"train.epochs": 8, "train.seed": 1}]
    race = Race(
        [*configs, {"train.epochs": 8, "optim.lr": 0.1}, {"train.epochs": 8, "model.norm": "group"}], scheduler=rule
    )
    race.run(rising)
    assert len(race.scheduler.parts) == 1


@stopping
def test_a_baseline_goes_on_but_counts(rule):
    weights = (1, 2, 0, 3, 4)
    worst = Race(group(8, weights), scheduler=rule).run(lambda i, epoch: 0.01 if i == 2 else rising(i, epoch))
    assert worst[2] is None  # last of all, in every epoch
    # With jigsaw it is no baseline.
    jigsaw = Race([*group(8, (1, 2, 3)), *group(8, (0,), **{"jigsaw.weight": 1})], scheduler=rule)
    assert jigsaw.run(lambda i, epoch: 0.01 if i == 3 else 0.5)[3] is not None
    # Good baselines stop others, which without them would go on.
    seeds = [{"rotation.weight": 0, "train.epochs": 8, "train.seed": seed} for seed in range(2)]
    assert Race([*seeds, *group(8, (1,))], scheduler=rule).run(rising)[2] is not None
    assert Race(group(8, (1,)), scheduler=rule).run(rising) == [None]


@stopping
def test_no_trial_is_stopped_in_its_last_epoch_or_before_its_time(rule):
    for grace in (4, 8, 100):
        found = Race(group(8), scheduler=rule, grace_epochs=grace).run(rising)
        assert all(epoch is None or grace <= epoch < 8 for epoch in found)
    assert any(Race(group(8), scheduler=rule, grace_epochs=4).run(rising))
    assert Race(group(1), scheduler=rule).run(rising) == [None] * 5


@stopping
def test_what_is_told_again_after_a_restart_changes_nothing(rule):
    once, twice = Race(group(8), scheduler=rule), Race(group(8), scheduler=rule)
    for epoch, index in itertools.product(range(1, 4), (0, 1)):
        for race in (once, twice):
            assert race.tell(index, epoch, rising(index, epoch)) == "CONTINUE" or index == 1
    for epoch in range(1, 4):
        assert twice.tell(0, epoch, 0.0) == "CONTINUE"
    assert [part.debug_string() for part in twice.scheduler.parts.values()] == [
        part.debug_string() for part in once.scheduler.parts.values()
    ]
    for index, accuracy in ((2, 0.2), (3, 0.44), (4, 0.9)):
        assert once.tell(index, 2, accuracy) == twice.tell(index, 2, accuracy)


@stopping
def test_an_epoch_without_accuracy_is_passed_over(rule):
    found = Race(group(8), scheduler=rule).run(lambda i, epoch: None if epoch < 4 else rising(i, epoch))
    assert min(epoch for epoch in found if epoch) >= 4
    race = Race(group(8), scheduler=rule)
    assert race.tell(1, 3, None) == "CONTINUE" and race.scheduler.seen == {}


@stopping
def test_time_is_our_epoch_and_not_tune_s_iteration(rule):
    # Tune's iteration stays 1 in these races; by it nobody would get beyond the first rung.
    found = Race(group(8), scheduler=rule).run(lambda i, epoch: 0.5 if epoch < 4 else rising(i, epoch))
    assert {epoch for epoch in found if epoch} <= set(range(4, 8)) and any(found)


def test_asha_halves_at_rungs_that_the_factor_sets():
    race = Race(group(9, (1, 2, 3)), scheduler="asha", reduction_factor=3)
    (part,) = race.scheduler.parts.values()
    assert [rung for rung in (1, 3, 9) if f"Iter {rung}.000" in part.debug_string()] == [1, 3, 9]
    assert "Iter 2.000" not in part.debug_string()


@stopping
def test_a_scheduler_can_be_pickled_on_the_way(rule):
    from ray import cloudpickle

    race = Race(group(8), scheduler=rule)
    for index in range(3):
        race.tell(index, 1, rising(index, 1))
    again = Race(group(8), scheduler=rule)
    again.scheduler = cloudpickle.loads(cloudpickle.dumps(race.scheduler))
    assert again.scheduler.seen == {0: 1, 1: 1, 2: 1}
    for index in (3, 4):
        assert again.tell(index, 1, 0.1) == race.tell(index, 1, 0.1)


def test_without_a_scheduler_nobody_is_stopped():
    race = Race(group(8), scheduler="none")
    assert race.run(rising) == [None] * 5


# --- records ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    asked = cfg.build({"data.name": "synthetic", "storage.path": str(tmp_path), "tracking.run_name": "run"})
    return cfg.resolve(asked, 32, 1024)


def test_a_record_is_what_was_written_or_new(config):
    with run_folder(config.run_dir) as folder:
        record = RunState.of(config)
        assert (record.status, record.run_id) == ("new", None)
        record.run_id = "abc"
        record.write("pruned", "why")
        again = RunState.of(config)
        assert (again.status, again.reason, again.run_id) == ("pruned", "why", "abc")
        assert sorted(path.name for path in folder.iterdir()) == [".lock", "run.json"]
    with pytest.raises(ConfigError, match=r"optim.lr: got 0.5, but run 'run' was started with 0.24"):
        RunState.of(cfg.replace(config, {"optim.lr": 0.5}))
    assert RunState.of(cfg.replace(config, {"scaling.num_workers": 3})).status == "pruned"


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"config": 3}', '{"config": {}, "colour": 1}', "\x00"])
def test_a_record_that_cannot_be_read_is_said(config, content):
    with run_folder(config.run_dir) as folder:
        (folder / "run.json").write_text(content)
        with pytest.raises(ConfigError, match=r"^storage.path: .*run.json cannot be read") as caught:
            RunState.of(config)
    assert "\n" not in str(caught.value)


def test_a_run_is_held_by_one_process_and_waited_for(config):
    import threading
    import time

    holder = run_folder(config.run_dir)
    holder.__enter__()
    with pytest.raises(ConfigError, match="another process"), run_folder(config.run_dir):
        pass
    timer = threading.Timer(0.3, lambda: holder.__exit__(None, None, None))
    timer.start()
    started = time.monotonic()
    with run_folder(config.run_dir, patience=30) as folder:
        assert 0.2 < time.monotonic() - started < 20 and folder == config.run_dir
    timer.join()


def test_a_folder_that_cannot_be_written_is_refused_and_none_is_made(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(ConfigError, match=r"^storage.path: cannot write to"):
            check_writable(folder)


def test_a_record_is_written_whole(config, monkeypatch):
    with run_folder(config.run_dir):
        record = RunState.of(config)
        record.write("running")
        monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            record.write("finished")
        assert json.loads((config.run_dir / "run.json").read_text())["status"] == "running"
