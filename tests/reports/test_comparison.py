"""Runs into cells, cells into numbers; all curves are made up."""

import dataclasses
import json
import random

import pytest

from rotssl import config as cfg
from rotssl.config.fields import ConfigError
from rotssl.reports import findings, tables, terminal
from rotssl.reports.comparison import compare_cells
from rotssl.reports.groups import baseline_of, cells_of, conditions, sift
from rotssl.reports.ranking import rank
from rotssl.tracking.reader import TrackedRun

PLAIN = (0.2, 0.4, 0.5, 0.6)


def run(finals=PLAIN, *, status="FINISHED", reason="completed", started=0, std=0.8, name=None, tags=(), **fields):
    """A run with these accuracies, None where it was not measured; ``fields`` are spelt method__name.

    An epoch takes 10 FLOPs and 2 device-seconds, twice the FLOPs and three times the seconds with rotation.
    """
    overrides = {key.replace("__", "."): value for key, value in fields.items()}
    overrides = {"rotation.weight": 0, "train.epochs": len(finals), "optim.warmup_epochs": 0} | overrides
    config = cfg.resolve(cfg.build(overrides), 28, 5000)
    on = config.rotation.weight > 0
    points = {
        epoch: {
            "cost/epochs": float(epoch),
            "cost/flops": epoch * (20.0 if on else 10.0),
            "cost/device_seconds": epoch * (6.0 if on else 2.0),
            "feature/std": std,
        }
        | ({} if value is None else {"knn/top1": value})
        for epoch, value in enumerate(finals, 1)
    }
    params = {key: str(value) for key, value in cfg.flat(config).items() if not key.startswith(cfg.NOT_IDENTITY)}
    name = name or f"w{config.rotation.weight:g}-e{config.train.epochs}-s{config.train.seed}"
    tags = {"status_reason": reason, **dict(tags)}
    return TrackedRun(f"id-{name}-{started}", name, status, started, params, tags, points)


def compare(records, baseline=None, target=None, metric="knn/top1"):
    runs, left_out = sift(records, metric)
    cells = cells_of(runs)
    return compare_cells(cells, left_out, conditions(baseline, cells), metric, target)


def rotated(finals, seed=0, weight=1, **more):
    return run(finals, rotation__weight=weight, train__seed=seed, **more)


def shifted(by, seed=0):
    return tuple(value + by + 0.01 * seed for value in PLAIN)


def seeds(count=3):
    """Plain, and rotation that starts where plain is after an epoch and a half, 3 seeds."""
    plain = [run(shifted(0, seed), train__seed=seed) for seed in range(count)]
    return plain + [rotated((0.3, 0.5, 0.7, 0.8 + 0.01 * seed), seed) for seed in range(count)]


def row_of(found, variant, budget=4):
    (row,) = [row for row in found.rows if (row.variant, row.budget) == (variant, budget)]
    return row


def test_gain_and_speed_up_of_two_known_curves():
    found = compare([run(), rotated((0.3, 0.5, 0.7, 0.8))])
    row = row_of(found, "rotation weight 1")
    assert (row.baseline, row.paired, row.missing, row.final.mean) == (("byol", "plain"), (0,), (), 0.8)
    assert row.gain.value == pytest.approx(0.2) and row.gain.low is None
    # Plain's final 0.6 is halfway between epochs 2 and 3; plain itself needs all 4.
    for cost, ours, theirs in (("epochs", 2.5, 4), ("flops", 50, 40), ("device_seconds", 15, 8)):
        reach = row.reach[cost]
        assert (reach.ours, reach.theirs) == pytest.approx((ours, theirs))
        assert reach.speed_up.value == pytest.approx(theirs / ours) and reach.speed_up.low is None
    assert row_of(found, "plain").is_baseline and row_of(found, "plain").reach["epochs"].ours == 4


def test_numbers_over_three_seeds():
    row = row_of(compare(seeds()), "rotation weight 1")
    assert row.paired == (0, 1, 2)
    assert (row.final.mean, row.final.low, row.final.high) == pytest.approx((0.81, 0.8, 0.82))
    assert (row.gain.value, row.gain.low, row.gain.high) == pytest.approx((0.2, 0.2, 0.2))  # each seed by as much
    ratios = [4 / (2.5 + 0.05 * seed) for seed in range(3)]  # to 0.60, 0.61, 0.62
    speed = row.reach["epochs"].speed_up
    assert (speed.value, speed.low, speed.high) == pytest.approx(
        ((ratios[0] * ratios[1] * ratios[2]) ** (1 / 3), ratios[2], ratios[0])
    )


def test_a_level_reached_by_the_first_measured_epoch_makes_bounds():
    fast, slow = (0.7, 0.72, 0.75, 0.8), (0.3, 0.5, 0.7, 0.8)
    found = compare([run(), rotated(fast)])
    reach = row_of(found, "rotation weight 1").reach["epochs"]
    assert (reach.bound, reach.at_most, reach.baseline_at_most) == ("at least", True, False)
    assert "epochs to the baseline's final accuracy: at least 4.00x (one seed), at most 1.0 in place of 4.0" in words(
        found
    )
    (table, *_) = tables.tables_of(found)
    assert table.rows[1][4] == "at least\n4.00x\n(one seed)\n≤1.0 vs 4.0" and "≤: there by the first" in table.caption

    found = compare([run((0.7, 0.4, 0.5, 0.6)), rotated(slow)], target=0.6)
    assert row_of(found, "rotation weight 1").reach["flops"].bound == "at most"
    assert "at most 0.40x (one seed), 2.5 in place of at most 1.0" in words(found)

    found = compare([run((0.7, 0.4, 0.5, 0.6)), rotated(fast)], target=0.6)
    reach = row_of(found, "rotation weight 1").reach["epochs"]
    assert (reach.bound, reach.speed_up) == ("none", None)
    assert "both are there by their first measured epoch" in words(found) and "1.00x" not in words(found)
    assert tables.tables_of(found)[0].rows[1][4] == "both by their first\nmeasured epoch\n≤1.0 vs ≤1.0"

    found = compare(seeds())
    assert row_of(found, "rotation weight 1").reach["epochs"].bound is None
    assert "at least" not in words(found) and "≤" not in tables.tables_of(found)[0].caption


def test_one_seed_with_a_bound_makes_the_mean_a_bound_and_bounds_of_both_kinds_leave_none():
    plain, ours = [run(train__seed=seed) for seed in range(3)], [rotated((0.3, 0.5, 0.7, 0.8), s) for s in range(2)]
    found = compare([*plain, *ours, rotated((0.65, 0.5, 0.7, 0.8), 2)])
    reach = row_of(found, "rotation weight 1").reach["epochs"]
    assert reach.bound == "at least" and reach.speed_up.value == pytest.approx((1.6 * 1.6 * 4) ** (1 / 3))
    assert "at least 2.17x (range 1.60 to 4.00)" in words(found)
    (table, *_) = tables.tables_of(found)
    assert table.rows[1][4].startswith("at least\n2.17x, range\n(1.60 to 4.00)\n") and "the range" in table.caption
    early = run((0.6, 0.4, 0.5, 0.6), train__seed=0)
    reach = row_of(compare([early, *plain[1:], *ours, rotated((0.65, 0.5, 0.7, 0.8), 2)]), "rotation weight 1").reach
    assert (reach["epochs"].bound, reach["epochs"].speed_up) == ("none", None)
    # Of two ways the one that may have been there earlier may be the cheaper one, whatever its bound.
    late = rotated((0.7, 0.9))
    late.points[1]["cost/flops"] = 55.0
    reach = compare([run(), rotated((0.3, 0.5, 0.7, 0.8)), late]).cheapest[1].reach["flops"]
    assert (reach.ours, reach.at_most, reach.bound) == (pytest.approx(50), True, "at least")


def test_device_time_is_said_to_depend_on_what_else_runs():
    captions = {table.title: table.caption for table in tables.tables_of(compare(seeds()))}
    assert "slow each other down" in captions["Accuracy at equal device time"]
    assert "slow each other down" not in captions["Accuracy at equal FLOPs"]


def test_one_seed_that_never_comes_there_means_not_reached():
    records = [*seeds()[:5], rotated((0.3, 0.4, 0.5, 0.55), 2)]
    found = compare(records)
    reach = row_of(found, "rotation weight 1").reach["epochs"]
    assert (reach.reached, reach.baseline_reached, reach.ours, reach.speed_up) == (2, 3, None, None)
    assert reach.theirs == pytest.approx(4)
    (table, *_) = tables.tables_of(found)
    assert table.rows[1][4] == "not reached\n2 of 3 seeds"
    # A target that plain misses in one seed.
    reach = row_of(compare(seeds(), target=0.615), "rotation weight 1").reach["epochs"]
    assert (reach.reached, reach.baseline_reached, reach.theirs, reach.speed_up) == (3, 1, None, None)
    assert reach.ours == pytest.approx(2.575)


def test_a_lost_seed_is_named_and_the_others_are_paired():
    records = seeds()
    del records[1]
    row = row_of(compare(records), "rotation weight 1")
    assert (row.paired, row.missing, len(row.final.seeds)) == ((0, 2), (1,), 3)
    assert row.gain.value == pytest.approx(0.2)


def test_knn_of_every_second_epoch_is_interpolated_and_no_axis():
    found = compare([run(), rotated((None, 0.5, None, 0.8), evaluation__knn_every=2)])
    assert [cell.variant for cell in found.cells] == ["plain", "rotation weight 1"]
    assert row_of(found, "rotation weight 1").reach["epochs"].ours == pytest.approx(2 + 2 * 0.1 / 0.3)


LEFT = {
    "failed": (
        rotated((0.1, 0.2), train__epochs=4, status="FAILED", reason="the loss is nan"),
        "epoch 2 of 4: the loss",
    ),
    "asha": (rotated((0.1,), train__epochs=4, status="KILLED", reason="stopped by asha at epoch 1"), "stopped by asha"),
    "interrupted": (
        rotated((0.1,), train__epochs=4, status="KILLED", reason="interrupted"),
        "interrupted at epoch 1 of 4",
    ),
    "running": (rotated((0.1, 0.3), train__epochs=4, status="RUNNING", reason="running"), "still running, at epoch 2"),
    "never began": (rotated((), train__epochs=4, status="FAILED", reason="no space"), "epoch 0 of 4: no space"),
    "collapsed": (rotated((0.1, 0.1, 0.1, 0.1), std=0.02), "collapsed: feature/std 0.02"),
    "unmeasured": (rotated((0.1, 0.1, 0.1, None)), "no knn/top1 at the last epoch"),
    "twin": (run(started=5, name="later"), "the same configuration and seed as w0-e4-s0"),
    "nan": (rotated((0.1, 0.1, 0.1, float("nan"))), "no knn/top1 at the last epoch"),
    "foreign": (TrackedRun("x", "x", "FINISHED", 1, {"lr": "1"}, {}, {}), "not a pretraining run"),
}


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
        ("byol, lr 0.24", "plain"),
        ("byol, lr 0.24", "rotation weight 0.3, mode extra"),
        ("byol, lr 0.24", "rotation weight 1, mode in_place"),
        ("byol, lr 0.24", "jigsaw weight 2 + rotation weight 1, mode extra"),
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
    assert [found[f"simclr, lr {lr}", "plain"] for lr in (0.1, 0.2)] == [("byol, lr 0.24", "plain")] * 2


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


def budgets():
    """Plain with 2, 4 and 8 epochs, rotation with 2 and 4; one epoch of rotation costs as much as two of plain."""
    plain = {2: (0.2, 0.4), 4: PLAIN, 8: (0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7)}
    turned = {2: (0.4, 0.65), 4: (0.3, 0.5, 0.7, 0.8)}
    return [run(values) for values in plain.values()] + [rotated(values) for values in turned.values()]


def test_the_cheapest_way_over_all_budgets():
    plain, ours = compare(budgets()).cheapest
    assert (plain.budget, plain.reach["epochs"].ours) == (8, 8)  # no shorter plain run comes to 0.7
    reach = ours.reach["flops"]
    assert (reach.ours, reach.theirs, reach.budgets) == (pytest.approx(60), 80, (4,))
    # To 0.55 rotation's short run is the cheaper one (1.6 epochs), and so is plain's run of 4 (3.5).
    plain, ours = compare(budgets(), target=0.55).cheapest
    assert plain.reach["epochs"].ours == pytest.approx(3.5) and plain.reach["epochs"].budgets == (4,)
    assert ours.reach["epochs"].ours == pytest.approx(1.6) and ours.reach["epochs"].budgets == (2,)


def test_the_cheapest_way_takes_only_seeds_that_have_every_budget():
    more = [run(PLAIN, train__seed=1), run((0.2,) * 7 + (0.7,), train__seed=1), rotated((0.3, 0.5, 0.7, 0.8), 1)]
    ours = compare(budgets() + more).cheapest[1]
    assert (ours.paired, ours.missing) == ((0,), (1,))


def test_accuracy_at_equal_compute():
    fits = {(fit.variant, fit.budget): fit for fit in compare(budgets()).equal["flops"]}
    fitting = {key: fit.fitting for key, fit in fits.items()}
    assert fitting == {
        ("plain", 2): 2,
        ("plain", 4): 4,
        ("plain", 8): 8,
        ("rotation weight 1", 2): None,
        ("rotation weight 1", 4): 2,
        ("rotation weight 1", 8): 4,
    }
    assert fits["rotation weight 1", 8].gain.value == pytest.approx(0.1)
    assert fits["rotation weight 1", 4].gain.value == pytest.approx(0.05)
    assert (fits["rotation weight 1", 2].final, fits["rotation weight 1", 2].limit) == (None, 20)
    # Three times the seconds: the run of 4 epochs takes 24 and doesn't fit into plain's 16.
    seconds = {(fit.variant, fit.budget): fit.fitting for fit in compare(budgets()).equal["device_seconds"]}
    assert seconds["rotation weight 1", 8] == 2


@pytest.mark.parametrize(("cost", "fits"), [(40.4, True), (40.5, False)])
def test_a_run_that_costs_one_percent_more_still_fits(cost, fits):
    ours = rotated((0.3, 0.8))
    ours.points[2]["cost/flops"] = cost
    found = compare([run(), ours])
    (fit,) = [fit for fit in found.equal["flops"] if fit.variant != "plain"]
    assert (fit.fitting == 2) is fits


def words(found):
    return " ".join(
        line for choice in found.recommendations for part in findings.headline(found, choice) for line in part
    )


def test_the_recommendation_when_seeds_separate_the_best():
    noise = {0: 0.0, 1: 0.002, 2: -0.002}
    records = [run((*PLAIN[:3], 0.6 + noise[s]), train__seed=s) for s in range(3)]
    records += [rotated((0.3, 0.5, 0.7, 0.8 + noise[2 - s]), s) for s in range(3)]
    records += [rotated((0.3, 0.5, 0.6, 0.7), s, weight=0.3) for s in range(3)]
    found = compare(records)
    (choice,) = found.recommendations
    assert (choice.best.variant, choice.second.variant) == ("rotation weight 1", "rotation weight 0.3")
    assert choice.separated and choice.lead.value == pytest.approx(0.1) and choice.cheaper is None
    assert "take rotation weight 1" in words(found) and "over plain (3 paired seeds)" in words(found)


def test_the_recommendation_when_they_do_not():
    records = [run((*PLAIN[:3], 0.6 + 0.1 * s), train__seed=s) for s in range(2)]
    records += [rotated((0.3, 0.5, 0.7, 0.81 - 0.1 * s), s) for s in range(2)]
    found = compare(records)
    (choice,) = found.recommendations
    assert (choice.best.variant, choice.separated, choice.cheaper) == ("rotation weight 1", False, "plain")
    assert "do not separate it from plain" in words(found) and "plain takes fewer FLOPs" in words(found)
    (choice,) = compare([run(), rotated((0.3, 0.5, 0.7, 0.8))]).recommendations
    assert not choice.separated  # one seed separates nothing


def test_the_recommendation_when_the_task_hurts_and_when_there_is_one_variant():
    worse = [rotated((0.1, 0.2, 0.3, 0.4 + 0.01 * s), s) for s in range(3)]
    found = compare([*seeds()[:3], *worse])
    assert found.recommendations[0].best.variant == "plain" and "do not help here" in words(found)
    found = compare([run(), run((0.3, 0.4), method__name="simclr")])
    assert all(choice.second is None for choice in found.recommendations) and "nothing to choose" in words(found)


def ended(final, seed=0, weight=0.0):
    return run((0.2, 0.3, 0.4, final), rotation__weight=weight, train__seed=seed)


def test_a_variant_of_which_the_strong_seed_alone_survived_is_not_ranked():
    plain = [ended(final, seed) for seed, final in enumerate((0.6, 0.62, 0.9))]
    full = [ended(final, seed, 1) for seed, final in enumerate((0.65, 0.67, 0.95))]
    found = compare([*plain, *full, ended(0.9, 2, 0.3)])  # its mean is the highest, in its seed it is the lowest
    (choice,) = found.recommendations
    assert (choice.best.variant, choice.second.variant) == ("rotation weight 1", "plain")
    assert "not ranked: rotation weight 0.3 (1 of 3 seeds)" in words(found)
    assert "the best is rotation weight 1" not in words(found)  # it takes twice the FLOPs: nothing but plain fits
    assert "difference -" not in words(found) and "by -" not in words(found)
    assert choice.lead.value == pytest.approx(0.05) and choice.lead.low > 0


def test_the_lead_and_the_means_are_over_the_seeds_that_all_ranked_variants_share():
    plain = [ended(final, seed) for seed, final in enumerate((0.5, 0.6, 0.9))]
    found = compare([*plain, *(ended(0.7, s, 0.3) for s in (0, 1)), *(ended(0.8, s, 1) for s in (1, 2))])
    (choice,) = found.recommendations
    assert (choice.best.variant, choice.second.variant) == ("rotation weight 1", "rotation weight 0.3")
    assert choice.ranking.seeds == (1,) and choice.lead.value == pytest.approx(0.1)
    assert "kNN top-1 80.0% over the 1 of 3 seeds" in words(found) and "a single seed has all" in words(found)
    assert "rotation weight 1 gains +5.0" in words(found) and "over plain (2 paired seeds)" in words(found)


def test_the_best_at_equal_compute_is_the_one_with_the_highest_paired_gain_of_the_best_covered():
    cheap = []
    finals = {0.1: (None, None, 0.9), 0.3: (0.65, 0.6, None), 1: (None, 0.55, 0.9)}  # 0.3: +10, 1: +2.5, 0.1: one seed
    for weight, of_seeds in finals.items():
        for seed, final in enumerate(of_seeds):
            if final is not None:
                cheap.append(ended(final, seed, weight))
                for point in cheap[-1].points.values():
                    point["cost/flops"] /= 2
    found = compare([*(ended(final, seed) for seed, final in enumerate((0.5, 0.55, 0.85))), *cheap])
    (line,) = [line for line in words(found).split("With the ") if line.startswith("FLOPs of")]
    assert "the best is rotation weight 0.3, with 4 epochs: 62.5%, +10.0" in line and "2 of 3 seeds" in line


def test_variants_that_share_no_seed_are_not_ranked():
    found = compare([ended(0.6, 0), ended(0.7, 1, 1)])
    (choice,) = found.recommendations
    assert choice.second is None and "too few seeds are shared" in words(found)
    assert "not ranked: plain (1 of 2 seeds)" in words(found)


def test_a_tie_at_the_top_is_called_equal():
    found = compare([ended(0.6, seed, weight) for weight in (0, 1) for seed in range(3)])
    assert found.recommendations[0].best.variant == "plain"
    assert "plain (kNN top-1 60.0%) is equal to rotation weight 1 (3 paired seeds)" in words(found)
    assert "+0.0 (+0.0 to +0.0)" not in words(found).split("Speed-up")[0]


def test_runs_that_a_scheduler_stopped_are_a_warning():
    left = [
        rotated((0.1,), seed, train__epochs=4, status="KILLED", reason="stopped by asha after epoch 1")
        for seed in (1, 2)
    ]
    _, left_out = sift([*left, LEFT["interrupted"][0], LEFT["failed"][0]], "knn/top1")
    (warning,) = findings.facts(cells_of(seeds()), "knn/top1", left_out)[1]
    assert warning == (
        "2 runs were stopped early by a scheduler; their variants are represented by the seeds that went on."
    )
    assert findings.facts(cells_of(seeds()), "knn/top1", left_out[:2])[1] == []


@pytest.mark.parametrize("seed", range(6))
def test_the_ranking_depends_on_values_alone_and_no_lead_is_negative(seed):
    gen = random.Random(seed)
    for _ in range(40):
        finals = {
            name: {s: gen.random() for s in range(5) if gen.random() < 0.7} for name in ("plain", "a", "b", "c", "d")
        }
        if not any(finals.values()):
            continue
        found = rank(finals, ["plain"])
        assert found.seeds and all(set(found.seeds) <= set(finals[name]) for name in found.order)
        assert list(found.means) == sorted(found.means, reverse=True)
        assert set(found.order) | {name for name, _ in found.unranked} == set(finals)
        names, swapped = list(finals), dict(zip(range(5), gen.sample(range(5), 5), strict=True))
        gen.shuffle(names)
        other = rank(
            {name: {swapped[s]: value for s, value in reversed(finals[name].items())} for name in names}, ["plain"]
        )
        assert (other.order, other.means, other.total) == (found.order, found.means, found.total)
        assert set(other.unranked) == set(found.unranked)
        assert set(other.seeds) == {swapped[s] for s in found.seeds}
        for better, worse in zip(found.order, found.order[1:], strict=False):
            assert sum(finals[better][s] - finals[worse][s] for s in found.seeds) > 0


def test_of_variants_without_a_common_seed_the_least_covered_and_then_the_lowest_go():
    found = rank({"plain": {0: 0.5}, "a": {1: 0.5, 2: 0.5}, "b": {2: 0.9, 3: 0.9}, "c": {1: 0.9}}, ["plain"])
    assert (found.order, found.seeds) == (("b", "a"), (2,))
    assert found.unranked == (("plain", 1), ("c", 1)) and found.total == 4
    assert rank({"plain": {}, "a": {0: 0.5}, "b": {1: 0.5}}, ["plain"]).order == ("a",)


def test_the_recommendation_is_at_the_longest_budget_that_can_be_compared():
    found = compare([*budgets()])
    assert found.recommendations[0].best.budget == 4


def test_a_metric_of_the_last_epoch_has_no_crossing_within_a_run():
    found = compare([run((None, None, None, 0.6)), rotated((None, None, None, 0.8)), rotated((None, 0.7))])
    row = row_of(found, "rotation weight 1")
    assert row.gain.value == pytest.approx(0.2) and row.reach is None
    reach = found.cheapest[1].reach["epochs"]
    assert (reach.ours, reach.bound) == (2, None)  # but over runs there is one, at the cost of a whole run
    assert "at the end of the runs only" in tables.tables_of(found)[1].caption


@pytest.mark.parametrize("seed", range(4))
def test_neither_the_order_of_runs_nor_the_names_of_seeds_matter(seed):
    gen = random.Random(seed)
    records = [*seeds(), *budgets()[2:4], *(record for record, _ in LEFT.values())]

    def numbers(found):
        content = [dataclasses.asdict(row) for row in (*found.rows, *found.cheapest, *found.equal["flops"])]
        content += [dataclasses.asdict(choice) for choice in found.recommendations]
        return json.dumps([content, [entry.reason for entry in found.left_out], words(found)], sort_keys=True)

    expected = numbers(compare(records))
    gen.shuffle(records)
    assert numbers(compare(records)) == expected
    noisy = [
        run(
            (*(gen.uniform(0.2, 0.6) for _ in range(3)), gen.uniform(0.6, 0.9)),
            train__seed=seed,
            rotation__weight=weight,
        )
        for weight in (0, 1)
        for seed in range(7)
    ]
    names = list(range(7))
    gen.shuffle(names)
    renamed = [
        dataclasses.replace(
            record, params={**record.params, "train.seed": str(names[int(record.params["train.seed"])])}
        )
        for record in noisy
    ]

    def values(found):
        row = row_of(found, "rotation weight 1")
        return row.final.mean, row.gain, [(reach.ours, reach.speed_up) for reach in row.reach.values()]

    assert values(compare(renamed)) == values(compare(noisy))


def test_names_and_remarks_are_broken_rather_than_numbers(capsys):
    numbers = ["2.57x\n(2.25 to 2.95)"] * 5
    remark = "no complete run with rotation.weight=0 agrees in optim.lr, so there is no gain to be stated"
    table = tables.Table("title", "", list("abcdefg"), [["rotation weight 0.3, mode in_place, " * 3, remark, *numbers]])
    terminal.show(terminal.rich_table(table))
    printed = capsys.readouterr().out
    assert printed.count("(2.25 to 2.95)") == 5 and "stated" in printed
    assert max(map(len, printed.splitlines())) <= 110
