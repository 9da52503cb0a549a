"""Cells into numbers: gains, speed-ups, the cheapest way, and accuracy at equal compute."""

import dataclasses
import json
import random

import pytest

from rotssl.reports import tables
from tests.reports.made_up import LEFT, PLAIN, budgets, compare, rotated, row_of, run, seeds, words


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
    assert "epochs to the baseline's final accuracy: at least 4.00x (one seed), at most 1.0 instead of 4.0" in words(
        found
    )
    (table, *_) = tables.tables_of(found)
    assert table.rows[1][4] == "at least\n4.00x\n(one seed)\n≤1.0 vs 4.0" and "≤: already reached" in table.caption

    found = compare([run((0.7, 0.4, 0.5, 0.6)), rotated(slow)], target=0.6)
    assert row_of(found, "rotation weight 1").reach["flops"].bound == "at most"
    assert "at most 0.40x (one seed), 2.5 instead of at most 1.0" in words(found)

    found = compare([run((0.7, 0.4, 0.5, 0.6)), rotated(fast)], target=0.6)
    reach = row_of(found, "rotation weight 1").reach["epochs"]
    assert (reach.bound, reach.speed_up) == ("none", None)
    assert "both reach it by their first measured epoch" in words(found) and "1.00x" not in words(found)
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


def test_a_metric_of_the_last_epoch_has_no_crossing_within_a_run():
    found = compare([run((None, None, None, 0.6)), rotated((None, None, None, 0.8)), rotated((None, 0.7))])
    row = row_of(found, "rotation weight 1")
    assert row.gain.value == pytest.approx(0.2) and row.reach is None
    reach = found.cheapest[1].reach["epochs"]
    assert (reach.ours, reach.bound) == (2, None)  # but over runs there is one, at the cost of a whole run
    assert "only at the end of the runs" in tables.tables_of(found)[1].caption


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
