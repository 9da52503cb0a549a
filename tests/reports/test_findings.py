"""What a report recommends, and in which words."""

import pytest

from rotssl.reports import findings
from rotssl.reports.groups import cells_of, sift
from tests.reports.made_up import LEFT, PLAIN, budgets, compare, ended, rotated, run, seeds, words


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
    assert "do not separate it from plain" in words(found) and "plain needs fewer FLOPs" in words(found)
    (choice,) = compare([run(), rotated((0.3, 0.5, 0.7, 0.8))]).recommendations
    assert not choice.separated  # one seed separates nothing


def test_the_recommendation_when_the_task_hurts_and_when_there_is_one_variant():
    worse = [rotated((0.1, 0.2, 0.3, 0.4 + 0.01 * s), s) for s in range(3)]
    found = compare([*seeds()[:3], *worse])
    assert found.recommendations[0].best.variant == "plain" and "do not help here" in words(found)
    found = compare([run(), run((0.3, 0.4), method__name="simclr")])
    assert all(choice.second is None for choice in found.recommendations) and "no choice to make" in words(found)


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
    assert choice.second is None and "too few shared seeds" in words(found)
    assert "not ranked: plain (1 of 2 seeds)" in words(found)


def test_a_tie_at_the_top_is_called_equal():
    found = compare([ended(0.6, seed, weight) for weight in (0, 1) for seed in range(3)])
    assert found.recommendations[0].best.variant == "plain"
    assert "plain (kNN top-1 60.0%) and rotation weight 1 are equal (3 paired seeds)" in words(found)
    assert "+0.0 (+0.0 to +0.0)" not in words(found).split("Speed-up")[0]


def test_runs_that_a_scheduler_stopped_are_a_warning():
    left = [
        rotated((0.1,), seed, train__epochs=4, status="KILLED", reason="stopped by asha after epoch 1")
        for seed in (1, 2)
    ]
    _, left_out = sift([*left, LEFT["interrupted"][0], LEFT["failed"][0]], "knn/top1")
    (warning,) = findings.facts(cells_of(seeds()), "knn/top1", left_out)[1]
    assert warning == (
        "2 runs were stopped early by a scheduler; their variants are represented by the seeds that ran to the end."
    )
    assert findings.facts(cells_of(seeds()), "knn/top1", left_out[:2])[1] == []


def test_encoders_that_were_measured_in_different_precision_are_a_warning():
    runs = [rotated((0.1,), seed, tags={"evaluation_precision": ("fp32", "bf16")[seed]}.items()) for seed in (0, 1)]
    (warning,) = findings.facts(cells_of(runs), "knn/top1")[1]
    assert warning == "The encoders were measured in different precision, which moves an accuracy by about 0.1 points."
    assert findings.facts(cells_of(runs[:1]), "knn/top1")[1] == []


def test_the_recommendation_is_at_the_longest_budget_that_can_be_compared():
    found = compare([*budgets()])
    assert found.recommendations[0].best.budget == 4
