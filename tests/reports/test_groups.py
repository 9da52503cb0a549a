"""Runs into cells: which count, what tells cells apart, and which is whose baseline."""

import dataclasses

import pytest

from rotssl.config.fields import ConfigError
from rotssl.reports import tables
from rotssl.reports.groups import baseline_of, cells_of, conditions, sift
from tests.reports.made_up import LEFT, PLAIN, compare, rotated, run


@pytest.mark.parametrize(("record", "reason"), LEFT.values(), ids=LEFT)
def test_what_is_no_result_is_left_out_with_the_reason(record, reason):
    used, left = sift([run(), rotated((0.3, 0.5, 0.7, 0.8), seed=1), record], "knn/top1")
    assert len(used) == 2 and record not in used
    assert [entry.run for entry in left] == [record] and reason in left[0].reason


def test_a_run_that_has_all_epochs_counts_whatever_became_of_it_and_sweeps_are_no_runs():
    whole = rotated((0.3, 0.5, 0.7, 0.8), status="FAILED", reason="disk full at the export")
    gap = run(train__seed=1)
    del gap.points[2]  # MLflow was away for an epoch
    others = [dataclasses.replace(run(started=7), tags={"kind": kind}) for kind in ("sweep", "evaluation")]
    used, left = sift([whole, gap, *others], "knn/top1")
    assert used == [gap, whole] or used == [whole, gap]
    assert left == []


def test_labels_say_what_differs_and_no_more():
    records = [
        run(method__name="simclr"),
        run(method__name="byol"),
        run(method__name="byol", rotation__weight=0.3, rotation__mode="extra"),
        run(method__name="byol", rotation__weight=1.0),
        run(method__name="byol", rotation__weight=1, jigsaw__weight=2, rotation__mode="extra"),
        run(method__name="byol", optim__lr=0.5),
    ]
    assert [(cell.family, cell.variant) for cell in cells_of(records)] == [
        ("byol, lr 0.48", "plain"),
        ("byol, lr 0.48", "rotation weight 0.3, mode extra"),
        ("byol, lr 0.48", "rotation weight 1, mode in_place"),
        ("byol, lr 0.48", "jigsaw weight 2 + rotation weight 1, mode extra"),
        ("byol, lr 0.5", "plain"),
        ("simclr, lr 0.24", "plain"),
    ]
    # The rate follows from the method: no word of it. Nor of the fields of a task that is off.
    cells = cells_of([run(method__name="swav"), run(method__name="byol", rotation__mode="extra")])
    assert [cell.family for cell in cells] == ["byol", "swav"] and {cell.variant for cell in cells} == {"plain"}
    # What auto made of the mode was none above either; where something else was asked for, it is one.
    kinds = [{}, {"rotation__fraction_end": 0.5}, {"rotation__mode": "extra"}]
    assert [cell.variant for cell in cells_of([run(rotation__weight=1, **kind) for kind in kinds])] == [
        "rotation weight 1, fraction_end 0.125, mode in_place",
        "rotation weight 1, fraction_end 0.5, mode in_place",
        "rotation weight 1, fraction_end none, mode extra",
    ]


def test_fields_of_a_task_that_is_off_separate_nothing():
    others = {"rotation__mode": "extra", "jigsaw__hidden_dim": 64, "tasks__log_gradients_every": 5}
    (cell,) = cells_of([run(), run(train__seed=1, **others)])
    assert set(cell.runs[4]) == {0, 1}
    assert len(cells_of([run(rotation__weight=1), run(train__seed=1, rotation__weight=1, rotation__mode="extra")])) == 2


def test_what_follows_from_the_budget_does_not_tear_a_cell_apart():
    records = [run((0.5,) * n, optim__warmup_epochs=n / 10) for n in (10, 20)]
    (cell,) = cells_of(records)
    assert list(cell.runs) == [10, 20]
    records.append(run((0.5,) * 10, optim__warmup_epochs=3))  # now it varies by itself
    assert len(cells_of(records)) == 3


def test_equal_numbers_are_equal():
    one = rotated((0.3, 0.5, 0.7, 0.8))
    other = dataclasses.replace(one, params={**one.params, "rotation.weight": "1", "train.seed": "1"})
    (cell,) = cells_of([one, other])
    assert set(cell.runs[4]) == {0, 1}


def baselines(cells, text=None):
    wanted = conditions(text, cells)
    matches = {(c.family, c.variant): baseline_of(c, cells, wanted) for c in cells}
    return {key: (base.family, base.variant) if base else why for key, (base, why) in matches.items()}


def test_baselines_of_methods_times_rotation():
    records = [run(method__name=m, rotation__weight=w) for m in ("byol", "simclr") for w in (0, 1)]
    cells = cells_of(records)
    assert baselines(cells) == {
        (m, v): (m, "plain") for m in ("byol", "simclr") for v in ("plain", "rotation weight 1")
    }
    against_byol = baselines(cells, "method.name=byol,rotation.weight=0")
    assert set(against_byol.values()) == {("byol", "plain")} and len(against_byol) == 4
    # Only the method is freed: rotation stays what it is.
    assert baselines(cells, "method.name=byol")["simclr", "rotation weight 1"] == ("byol", "rotation weight 1")
    assert baselines(cells, "rotation.weight=1.0")["simclr", "plain"] == ("simclr", "rotation weight 1")


def test_a_baseline_method_has_an_optimizer_of_its_own():
    records = [run(method__name="byol"), *(run(method__name="simclr", optim__lr=lr) for lr in (0.1, 0.2))]
    found = baselines(cells_of(records), "method.name=byol")
    assert [found[f"simclr, lr {lr}", "plain"] for lr in (0.1, 0.2)] == [("byol, lr 0.48", "plain")] * 2


def test_a_baseline_of_one_task_keeps_the_other():
    cells = cells_of([run(rotation__weight=r, jigsaw__weight=j) for r in (0, 1) for j in (0, 2)])
    both = ("byol", "jigsaw weight 2 + rotation weight 1")
    assert baselines(cells)[both] == ("byol", "plain")
    assert baselines(cells, "rotation.weight=0")[both] == ("byol", "jigsaw weight 2")


def test_no_baseline_is_guessed():
    cells = cells_of([run(optim__lr=0.1), run(optim__lr=0.2, rotation__weight=1)])
    assert "no complete run" in baselines(cells)["byol, lr 0.2", "rotation weight 1"]
    assert "optim.lr" in baselines(cells)["byol, lr 0.2", "rotation weight 1"]
    modes = cells_of([run(), *(run(rotation__weight=1, rotation__mode=mode) for mode in ("extra", "in_place"))])
    assert "2 configurations" in baselines(modes, "rotation.weight=1")["byol", "plain"]
    assert set(baselines(modes, "rotation.weight=1,rotation.mode=extra").values()) == {
        ("byol", "rotation weight 1, mode extra")
    }
    found = compare([run(optim__lr=0.1), run(optim__lr=0.2, rotation__weight=1)])
    (row,) = [row for row in found.rows if row.variant != "plain"]
    assert (row.gain, row.reach, row.baseline) == (None, None, None) and row.remark
    assert any(row.remark in cell for table in tables.tables_of(found) for line in table.rows for cell in line)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("rotation.weight", "key=value"),
        ("rotation.wieght=0", "rotation.weight"),
        ("rotation.weight=7", "rotation.weight is 0, 1"),
        ("train.seed=0", "train.seed"),
        ("=3", "key=value"),
    ],
)
def test_a_baseline_that_cannot_be_is_refused(text, named):
    with pytest.raises(ConfigError, match=named):
        conditions(text, cells_of([run(), rotated(PLAIN)]))


def test_a_baseline_can_have_values_with_commas_and_words():
    cells = cells_of([run(views__global_scale=[0.1, 1.0]), run(data__limit=4000)])
    assert conditions("views.global_scale=[0.1, 1.0],data.limit=none", cells).fields == {
        "views.global_scale": "[0.1, 1.0]",
        "data.limit": "None",
    }


def test_what_a_sweep_varied_separates_and_what_follows_from_it_does_not():
    sizes = [{"train__batch_size": 64, "optim__lr": 0.06}, {"train__batch_size": 128, "optim__lr": 0.12}]
    records = [
        run(rotation__weight=weight, **size, train__seed=seed) for size in sizes for weight in (0, 1) for seed in (0, 1)
    ]
    asked = ["train.batch_size", "rotation.weight", "jigsaw.weight"]
    cells = cells_of(records, asked)
    assert [cell.axes.keys() for cell in cells] == [{"train.batch_size", "rotation.weight"}] * 4
    assert {cell.family for cell in cells} == {"byol, batch_size 64", "byol, batch_size 128"}
    assert all(sorted(cell.runs[4]) == [0, 1] for cell in cells)
    assert {cell.family for cell in cells_of(records)} == {
        "byol, lr 0.06, batch_size 64",
        "byol, lr 0.12, batch_size 128",
    }
    # Started again with another decay: what was varied tells these from the others no more.
    other = run(**sizes[0], optim__weight_decay=0.5, rotation__weight=0, train__seed=0)
    assert cells_of([*records, other], asked) == cells_of([*records, other])
    # Also where the seeds are others: two rates are not two seeds.
    changed = [
        run(**sizes[0] | {"optim__lr": 0.1 + seed}, rotation__weight=weight, train__seed=seed)
        for weight in (0, 1)
        for seed in (0, 1)
    ]
    assert cells_of(changed, asked) == cells_of(changed) and {
        len(cell.runs[4]) for cell in cells_of(changed, asked)
    } == {1}
