"""What sweep files and flags are refused for, each in one line that names the field."""

import os
import subprocess
import sys

import pytest

from rotssl.commands import run_command
from rotssl.commands.ablate import trials_of
from rotssl.config.sweep import parse
from tests.programs import ROOT, job

RECIPES = ROOT / "jobs" / "recipes"
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
grid: {} | grid: got an empty section
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
tracking: {run_name: x};GRID | tracking.run_name: not allowed in a sweep
sweep: {sedes: 3};GRID | sweep.sedes: no such field (did you mean 'sweep.seeds'?)
sweep: {seeds: 0};GRID | sweep.seeds: got 0, expected an integer at least 1
sweep: {seeds: 1.5};GRID | sweep.seeds: got 1.5
sweep: {seeds: 2};grid: {train.seed: [0, 1]} | sweep.seeds: got 2, expected 1
sweep: {samples: 0};GRID | sweep.samples: got 0
sweep: {concurrency: 0};GRID | sweep.concurrency: got 0
sweep: {concurrency: many};GRID | sweep.concurrency: got 'many', expected an integer at least 1 or 'auto'
sweep: {gpus_per_trial: 2};GRID | sweep.gpus_per_trial: got 2
sweep: {gpus_per_trial: 0};GRID | sweep.gpus_per_trial: got 0
sweep: {grace_epochs: 0};GRID | sweep.grace_epochs: got 0
sweep: {reduction_factor: 1};GRID | sweep.reduction_factor: got 1, expected a number greater than 1
sweep: {baseline: 1};GRID | sweep.baseline: got 1, expected true or false
sweep: {scheduler: hyperband};GRID | sweep.scheduler: got 'hyperband', expected 'none', 'asha', 'median'
sweep: {scheduler: asha};evaluation: {knn_every: 0};GRID | evaluation.knn_every: got 0, but asha needs kNN
sweep: {scheduler: asha};evaluation: {holdout: 0};GRID | evaluation.holdout: got 0, expected more: asha needs kNN
sweep: {scheduler: median};evaluation: {knn_every: auto};GRID | evaluation.knn_every: got auto, but median
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
- grid | --config: | got list in
grid: {rotation.weight: !!python/tuple [1]} | --config: | not valid YAML
train: {accumulate: 3};GRID | train.batch_size: got 256, expected a multiple of
grid: {rotation.fraction: [0.001]} | rotation.fraction: got 0.001
grid: {data.limit: [100]} | train.batch_size: got 256, expected at most the 100 training images
grid: {data.name: [cifar10], data.root: [/nowhere]} | data.root: no data_batch_1 in /nowhere
grid: {optim.name: [sgd, lars]} | optim.lr: got 'auto'
sweep: {seeds: 10001} | grid: | expands to 10001 configurations, expected at most 10000
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
--tracking.run_name a | tracking.run_name: not allowed in a sweep
--tracking.uri ftp://x | tracking.uri: got 'ftp://x'
--tracking.uri off | tracking.uri: got off, expected a store: the sweep's report is read from it
--train.budget 5 | train.budget: got 5, expected none in a sweep
--storage.path ftp://x | storage.path: got 'ftp://x'
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
    assert done.stderr.splitlines() == ["error: rotation.weight: got 'big', expected a number at least 0 or 'auto'"]
