"""What the benchmarks compute from their runs, on made-up ones, and that contenders don't run in one another's time."""

import csv
import itertools
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """The folder of the benchmarks, from which they can be imported."""
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def study(scripts, tmp_path):
    """Plain, the paper's recipe at twice the cost, and a form at 1.04 of it; kNN is a function of form, epochs and seed."""
    from rotation_study import Study

    found = Study("fashion-mnist-sample", "byol", 20, [0, 1], ["plain", "paper", "shared"], str(tmp_path))
    found.ratios = {"plain": 1.0, "paper": 2.0, "shared": 1.04}
    found.weights = {"plain": 0.0, "paper": 1.0, "shared": 1.0}
    points = {("plain", 20): 0.60, ("paper", 10): 0.66, ("paper", 20): 0.70, ("shared", 20): 0.68}
    for (variant, epochs), knn in points.items():
        for seed in found.seeds:
            cell = found.cell(variant, found.weights[variant], epochs, seed)
            found.runs[cell] = {epochs: {"knn/top1": knn + 0.01 * seed, "linear/top1": knn + 0.1}}
    return found


def test_equal_compute_gives_a_dearer_form_fewer_epochs(study):
    assert (study.share("plain"), study.share("paper"), study.share("shared")) == (20, 10, 20)
    assert study.compute("paper", "compute") == pytest.approx(1.0)
    assert study.compute("shared", "compute") == pytest.approx(1.04)
    assert study.scores("paper", "compute") == pytest.approx([0.66, 0.67])
    assert study.scores("paper", "epochs") == pytest.approx([0.70, 0.71])


def test_the_paper_s_accuracy_is_read_on_a_line_over_the_logarithm_of_its_compute(study):
    assert study.paper(1.0, "kNN") == pytest.approx([0.66, 0.67])
    assert study.paper(2.0, "kNN") == pytest.approx([0.70, 0.71])
    assert study.paper(2.0**0.5, "kNN") == pytest.approx([0.68, 0.69])


def test_the_table_has_gain_share_and_difference_over_paired_seeds(study):
    from rotation_variants import table

    rows = {line.split(" | ")[0].strip("| "): line for line in table([study], study.variants, "kNN")[2:]}
    cells = [cell.strip() for cell in rows["shared"].strip("|").split("|")]
    assert cells[3] == "68.5 (68.0 to 69.0)"
    assert cells[4].startswith("+8.0 (")
    assert cells[5] == "80 %"  # of the ten points that the paper's recipe gains
    # The paper's recipe at 1.04 of plain's compute: 66 + 4 * log2(1.04) = 66.23.
    assert cells[9].startswith("+1.8 (")


def test_a_missing_seed_leaves_the_row_empty_rather_than_a_mean_of_fewer(study):
    from rotation_variants import table

    del study.runs[study.cell("shared", 1.0, 20, 1)]
    row = next(line for line in table([study], study.variants, "kNN") if line.startswith("| shared"))
    assert row.count("|  ") >= 5 and "68" not in row


def test_weights_are_chosen_on_the_mean_over_the_methods(study, tmp_path):
    from rotation_study import Study
    from rotation_variants import weights

    other = Study("fashion-mnist-sample", "simclr", 20, [0, 1], study.variants, str(tmp_path))
    study.tuned = {"shared": {0.3: 0.60, 1.0: 0.62, 3.0: 0.70}}
    other.tuned = {"shared": {0.3: 0.69, 1.0: 0.70, 3.0: 0.50}}
    assert weights([study, other], None) == {"plain": 0.0, "shared": 1.0}
    assert weights([study, other], 3.0) == {"plain": 0.0, "paper": 3.0, "shared": 3.0}


def test_known_runs_of_another_precision_or_method_are_left_out(scripts, tmp_path):
    from rotation_study import COLUMNS, PRECISION, Cell, Study

    other = "fp32" if PRECISION == "bf16" else "bf16"
    cells = [
        Cell("fashion-mnist-sample", "byol", 0.24, "paper", 1.0, 20, 0, PRECISION),
        Cell("fashion-mnist-sample", "byol", 0.24, "paper", 1.0, 20, 1, other),
        Cell("fashion-mnist-sample", "simclr", 0.24, "paper", 1.0, 20, 2, PRECISION),
    ]
    file = tmp_path / "known.csv"
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow([*Cell._fields, "step", *COLUMNS])
        for cell in cells:
            writer.writerow([*cell, 1.9, 0.7, *[""] * (len(COLUMNS) - 1)])
    study = Study("fashion-mnist-sample", "byol", 20, [0, 1], ["plain", "paper"], str(tmp_path))
    study.know(file)
    assert study.runs == {cells[0]: {20: {"knn/top1": 0.7}}}
    assert study.ratios == {"paper": 1.9}


@pytest.mark.contract
def test_contenders_rest_while_another_one_works(scripts, tmp_path):
    from paired import started, take_turns

    # Each one writes down when it is at work, in a thread that goes on between its turns unless it is stopped.
    code = (
        "import sys, threading, time; sys.path.insert(0, sys.argv[1]); from paired import serve\n"
        "log = open(sys.argv[2], 'w', buffering=1)\n"
        "def tick():\n"
        "    while True: log.write(f'{time.time()}\\n'); time.sleep(0.005)\n"
        "threading.Thread(target=tick, daemon=True).start()\n"
        "def work(n): time.sleep(0.05 * n); return 0.01 * n\n"
        "serve(lambda: (work, {'who': sys.argv[2]}), 1)\n"
    )
    names = ("a", "b")
    commands = {name: [sys.executable, "-c", code, str(FOLDER), str(tmp_path / f"{name}.txt")] for name in names}
    with started(commands, 1, tmp_path) as contenders:
        before = time.time()
        samples = take_turns(contenders, dict.fromkeys(names, 4), 3)
        after = time.time()
    ticks = {name: [float(line) for line in (tmp_path / f"{name}.txt").read_text().split()] for name in names}
    merged = sorted((at, name) for name in names for at in ticks[name] if before < at < after)
    runs = [(name, len(list(run))) for name, run in itertools.groupby(name for _, name in merged)]
    # A signal takes a moment to arrive, in which one more line may be written.
    order = [name for name, _ in itertools.groupby(name for name, length in runs if length > 2)]
    assert order == ["a", "b", "a", "b"]  # a b, b a, a b
    for own in samples.values():
        assert all(0.2 <= each.seconds < 5 and each.waited == 0.04 for each in own)
