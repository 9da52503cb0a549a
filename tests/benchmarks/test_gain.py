"""What benchmarks/gain.py computes from its runs, and which runs it wants, on made-up ones."""

import base64
import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from rotssl.config.methods import METHODS

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def hits(seeds, images, chance, seed=0):
    return (np.random.default_rng(seed).random((seeds, images)) < chance).astype(np.int8)


def test_an_identical_pair_has_no_gain():
    from gain_stats import Difference, bootstrap, t_difference

    same = hits(3, 500, 0.6)
    assert bootstrap(same - same) == Difference(0, 0, 0, 1)
    assert t_difference([0.5, 0.6], [0.5, 0.6]) == Difference(0, 0, 0, 1)


def test_the_t_interval_and_p_are_those_of_the_table():
    from gain_stats import Difference, t_difference

    found = t_difference([0.61, 0.62, 0.63], [0.60, 0.60, 0.60])
    half = 4.302653 * 0.01 / 3**0.5  # t(0.975, 2)
    assert (found.mean, found.low, found.high) == pytest.approx((0.02, 0.02 - half, 0.02 + half))
    assert found.p == pytest.approx(0.0371, abs=1e-4)  # t = 3.464
    assert t_difference([0.60] * 3, [0.61, 0.62, 0.63]).p == pytest.approx(1 - 0.0371, abs=1e-4)
    assert t_difference([0.7], [0.6]) == Difference(pytest.approx(0.1))


@pytest.mark.parametrize("of_seeds, of_images", [(0.0, 1.0), (1.0, 0.0), (0.03, 1.0)], ids=["images", "seeds", "both"])
def test_the_bootstrap_has_the_analytic_standard_error(of_seeds, of_images):
    from gain_stats import bootstrap

    draw, seeds, images = np.random.default_rng(1), 30, 2000
    a, b = of_seeds * draw.normal(size=seeds // 2), of_images * draw.normal(size=images)
    a = np.concatenate([a, -a])[:, None]  # no skew, which the interval would follow
    found = bootstrap(0.01 + a + b)
    error = (a.var() / seeds + b.var() / images) ** 0.5
    centre = 0.01 + a.mean() + b.mean()
    assert found.mean == pytest.approx(centre)
    assert (found.low, found.high) == pytest.approx((centre - 1.96 * error, centre + 1.96 * error), abs=0.06 * error)
    assert found.p == pytest.approx(0.5 * math.erfc(centre / error / 2**0.5), abs=0.012)


def test_the_bootstrap_of_a_mean_keeps_images_together():
    from gain_stats import bootstrap

    one = hits(4, 1000, 0.5, 1) - hits(4, 1000, 0.4, 2)
    # Two comparisons that agree on every image are no more certain than one; two that are opposed gain nothing, certainly.
    assert bootstrap(np.mean([one, one], axis=0)) == bootstrap(one) == bootstrap(one)
    against = bootstrap(np.mean([one, -one], axis=0))
    assert (against.low, against.high) == (0, 0)


def test_what_is_kept_of_a_gain_is_the_ratio_of_the_means_of_the_same_seeds_and_images():
    from gain_stats import Difference, kept

    other = np.tile(hits(1, 4000, 0.5, 1) - hits(1, 4000, 0.4, 2), (2, 1))
    half = np.where(np.arange(4000) % 2, other, 0)
    assert kept(other, other) == Difference(1, 1, 1)
    found = kept(half, other)
    # Of 4,000 images, which both seeds agree on, each gains or loses with the odds 0.3 and 0.2; every second counts above.
    error = (0.49 / 4000) ** 0.5 / 0.1 / 2
    assert found.mean == pytest.approx(half.mean() / other.mean()) and found.mean == pytest.approx(0.5, abs=2 * error)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.15)
    nothing = hits(2, 4000, 0.5, 3) - hits(2, 4000, 0.5, 4)
    assert kept(other, nothing).low is None
    assert math.isnan(kept(-other, -other).mean)  # twice a loss is no gain


def test_costs_are_read_on_lines_between_measured_epochs():
    from gain_stats import cost_to

    points = {epoch: {"cost/train_seconds": 10.0 * epoch} for epoch in (1, 2, 3, 4)}
    for epoch, score in ((1, 0.3), (3, 0.5), (4, 0.45)):
        points[epoch]["knn/top1"] = score
    assert cost_to(points, 0.4) == pytest.approx(20)
    assert cost_to(points, 0.45) == pytest.approx(25)
    assert cost_to(points, 0.2) == 10 and cost_to(points, 0.5) == pytest.approx(30)
    assert cost_to(points, 0.51) is None and cost_to({}, 0.1) is None


def test_cheap_epochs_count_less_and_all_together_as_many_plain_ones_as_were_timed():
    from gain_stats import with_plain_epochs

    points = {epoch: {"cost/flops": flops} for epoch, flops in ((1, 5.0), (2, 10.0), (3, 20.0))}
    assert [p["cost/plain_epochs"] for p in with_plain_epochs(points, 0.8).values()] == pytest.approx([0.6, 1.2, 2.4])


PLAN = {
    "base": {"byol": {"optim.lr": 0.2}},
    "defaults": ["own"],
    "forms": {
        "plain": {"rotation.weight": 0},
        "paper": {"rotation.mode": "extra"},
        "own": {"byol": {"rotation.weight": 2}, "simclr": {"rotation.weight": 3}},
    },
    "stages": {
        "rates": {
            "data": ["cifar10"],
            "methods": ["byol", "simclr"],
            "forms": ["plain"],
            "base": False,
            "factors": {"optim.lr": [0.5, 1]},
            "variants": {"byol": {"ema0.9": {"method.momentum": 0.9}}},
            "epochs": 5,
            "seeds": [100],
        },
        "search": {
            "data": ["cifar10"],
            "methods": ["byol"],
            "forms": ["plain", "paper", "own"],
            "grid": {"rotation.weight": [0.5, 1]},
            "halving": {"epochs": [2, 4, 8], "keep": 0.34},
            "seeds": [100, 101],
        },
        "finals": {
            "data": ["cifar10"],
            "methods": ["byol", "simclr"],
            "forms": ["plain", "paper", "own"],
            "epochs": 10,
            "seeds": [0, 1, 2],
            "final": True,
        },
    },
}


@pytest.fixture
def study(tmp_path):
    """The plan, its results, and a function that pretends to run a cell with given accuracies."""
    from gain_plan import Plan, Results

    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    plan = Plan(tmp_path / "plan.yaml")
    about = {"date": "2026-01-01", "commit": "abc", "machine": "one", "precision": "fp32", "plain_seconds": 0.1}
    numbers = {"lowest": 1.9, "highest": 2.1}
    entries = [
        {"data": "cifar10", "method": m, "form": form, "fields": fields, "ratio": ratio} | numbers | about
        for m in ("byol", "simclr")
        for form, fields, ratio in (("paper", {"rotation.mode": "extra"}, 2.0), ("own", {}, 1.04))
    ]
    (tmp_path / "cells").mkdir()
    (tmp_path / "steps.json").write_text(json.dumps(entries))
    return plan, Results(tmp_path, plan.common), lambda *args, **more: pretend(tmp_path, *args, **more)


def pretend(folder, cell, score, error="", **changed):
    """A result: kNN at the score and linear 10 points above, of 1000 images, the first of which are right."""
    import dataclasses

    right = {"knn/top1": np.arange(1000) < 1000 * score, "linear/top1": np.arange(1000) < 1000 * (score + 0.1)}
    points = {
        epoch: {"knn/top1": epoch / cell.epochs * score, "cost/train_seconds": 10.0 * epoch, "cost/flops": 1e9 * epoch}
        for epoch in range(1, cell.epochs + 1)
    }
    points[cell.epochs] |= {name: float(found.mean()) for name, found in right.items()}
    content = dataclasses.asdict(cell) | {
        "common": {},
        "lr": 0.2,
        "train_images": 5000,
        "measured_images": 1000,
        "error": error,
        "points": points,
        "hits": {name: base64.b64encode(np.packbits(found)).decode() for name, found in right.items()},
        "commit": "abc",
        "machine": "one",
        "precision": "fp32",
    }
    (folder / "cells" / f"{cell.name}.json").write_text(json.dumps(content | changed))


def test_names_are_the_form_and_what_is_varied(study):
    plan, _, _ = study
    labels = {m: [c.label for c in plan.candidates(plan.stages["rates"], "cifar10", m)] for m in ("byol", "simclr")}
    assert labels["simclr"] == ["plain-lr0.12", "plain-lr0.24"]
    assert labels["byol"] == ["plain-lr0.24", "plain-lr0.48", "plain-ema0.9"]
    found = plan.candidates(plan.stages["search"], "cifar10", "byol")
    assert [c.label for c in found] == ["plain", *(f"{form}-weight{w}" for form in ("paper", "own") for w in (0.5, 1))]
    assert {c.reference for c in found} == {"plain"}
    assert found[1].fields == {"optim.lr": 0.2, "rotation.mode": "extra", "rotation.weight": 0.5}
    (own,) = [c for c in plan.candidates(plan.stages["finals"], "cifar10", "simclr") if c.form == "own"]
    assert own.fields == {"rotation.weight": 3}


def test_a_name_for_two_contents_is_refused(study, tmp_path):
    from gain_plan import Plan

    stages = PLAN["stages"] | {"again": PLAN["stages"]["finals"] | {"fields": {"optim.weight_decay": 0.1}}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN | {"stages": stages}, sort_keys=False))
    with pytest.raises(SystemExit, match="again: there is another cifar10_byol_plain_10ep_seed0_test"):
        Plan(tmp_path / "plan.yaml")


def test_a_gain_is_kept_of_a_form_of_the_stage(study, tmp_path):
    from gain_plan import Plan

    stages = PLAN["stages"] | {"finals": PLAN["stages"]["finals"] | {"kept_of": "papr"}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN | {"stages": stages}))
    with pytest.raises(SystemExit, match="finals: kept_of: there is no papr"):
        Plan(tmp_path / "plan.yaml")


def test_a_run_of_other_fields_is_refused(study):
    plan, results, run = study
    cell = plan.needed(plan.stages["finals"], results)[0]
    run(cell, 0.5, fields={**cell.fields, "optim.lr": 0.3})
    with pytest.raises(SystemExit, match="other fields"):
        plan.needed(plan.stages["finals"], results)


def test_a_run_may_measure_more_often_than_the_plan_says_and_not_more_seldom():
    from gain_plan import same

    every = "evaluation.knn_every"
    for run, wanted, epochs, right in (
        *((1, 2, 14, True), (2, 2, 13, True), (4, 2, 14, False), (13, 2, 13, False), (2, 1, 14, False)),
        *((2, 13, 13, True), (13, 13, 13, True), (13, 1, None, True)),
    ):
        assert same({every: run, "a": 1}, {every: wanted, "a": 1}, epochs) == right, (run, wanted)
    assert not same({every: 1, "a": 1}, {every: 1, "a": 2}, None)


def test_equal_compute_sets_the_epochs(study):
    from gain_steps import length

    assert [length(10, ratio) for ratio in (0.5, 0.94, 0.96, 1.04, 1.06, 2, 30)] == [20, 11, 10, 10, 9, 5, 1]
    plan, results, _ = study
    rows = plan.rows(plan.stages["finals"], "cifar10", "byol", results)
    assert {row.candidate.label: row.cells[0].epochs for row in rows} == {"plain": 10, "paper": 5, "own": 10}
    assert [cell.fields["evaluation.knn_every"] for row in rows for cell in row.cells] == [1] * 9
    results.steps.entries.clear()
    rows = plan.rows(plan.stages["finals"], "cifar10", "byol", results)
    assert {row.candidate.label: len(row.cells) for row in rows} == {"plain": 3, "paper": 0, "own": 0}


def test_halving_keeps_the_best_share_and_plain(study):
    plan, results, run = study
    stage, scores = plan.stages["search"], {"own-weight0.5": 0.4, "own-weight1": 0.6, "paper-weight1": 0.5}
    seen = []
    while needed := plan.needed(stage, results):
        seen.append(sorted({(cell.form, cell.epochs) for cell in needed}))
        for cell in needed:
            failed = cell.form == "paper-weight0.5" and cell.seed == 101
            run(cell, scores.get(cell.form, 0.1 if cell.form == "plain" else 0.9), "too large" if failed else "")
    first = {*scores, "plain", "paper-weight0.5"}
    assert seen[0] == sorted((form, 1 if form.startswith("paper") else 2) for form in first)
    assert seen[1:] == [[("own-weight1", 4), ("paper-weight1", 2), ("plain", 4)], [("own-weight1", 8), ("plain", 8)]]


def test_the_report_has_all_runs_and_their_gains(study):
    from gain_report import write

    plan, results, run = study
    for method, gain in (("byol", 0.02), ("simclr", -0.01)):
        for row in plan.rows(plan.stages["finals"], "cifar10", method, results):
            for cell in row.cells:
                score = 0.5 + 0.01 * cell.seed + (gain if cell.form == "own" else 0)
                failed = (cell.form, method, cell.seed) == ("paper", "byol", 1)
                run(cell, round(score, 3), "diverged" if failed else "")
    text = write(plan, results)
    assert (
        "17 of 18" not in text and "18 of 18 runs" in text and "- failed: cifar10 byol paper, seed 1: diverged" in text
    )
    knn = text.split("### cifar10: kNN")[-1].split("###")[0]
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]): line for line in knn.splitlines() if "| " in line}
    cells = [cell.strip() for cell in rows["byol", "own"].split("|")[1:-1]]
    assert cells[:9] == ["byol", "own", "10", "10", "1.04", "0.2", "3", "53.00", "+2.00 (+2.00 to +2.00)"]
    assert float(cells[10].split()[0]) == 2 and cells[11] == "0.0001"
    # 52 %, for one, at the end of the tenth epoch has 50 between the ninth, with 46.8, and the tenth.
    assert (
        cells[12]
        == f"{sum(90 + 10 * (s - 0.9 * (s + 0.02)) / (0.1 * (s + 0.02)) for s in (0.5, 0.51, 0.52)) / 3:.0f} (100)"
    )
    assert cells[13].endswith("(10.0)") and float(cells[13].split()[0]) == pytest.approx(1.04 * 9.66, abs=0.1)
    assert "0 of 3" in rows["simclr", "own"] and "-1.00" in rows["simclr", "own"]
    assert "3, failed |  |  |" in rows["byol", "paper"]
    assert "+0.50 (+0.50 to +0.50)" in rows["mean of 2", "own"] and knn.count("mean of") == 1
    assert (results.folder / "finals.png").stat().st_size > 1000
    summary = text.split("## All finals")[1].split("\n## ")[0]
    heads, *entries = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in summary.splitlines() if "| " in line
    ]
    assert heads[3:6] == ["kNN: plain", "kNN: paper", "kNN: own"] and heads[6] == "linear: plain"
    byol = dict(zip(heads, entries[0], strict=True))
    assert (byol["method"], byol["seeds"], byol["kNN: plain"], byol["kNN: paper"]) == (
        "byol",
        "0 to 2",
        "51.0",
        "failed",
    )
    low, high = map(float, byol["kNN: own"].removeprefix("53.0 (+2.0: ").removesuffix(")").split(" to "))
    assert low < 1.9 and high > 2.1  # by the sampling of images: the seeds agree
    table = text.split("## The defaults, cifar10")[1].split("\n## ")[0]
    own, _, mean = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "| " in line][1:]
    assert own[:5] == ["byol", "own", "0 to 2", byol["kNN: plain"], byol["kNN: own"]] and own[7:] == cells[12:]
    assert (
        mean[0] == "mean of 2" and mean[4].startswith("+0.50: ") and (results.folder / "defaults_cifar10.png").exists()
    )


@pytest.mark.parametrize("curve", [None, 0])
def test_a_part_of_a_data_set_has_a_line_and_with_a_curve_a_picture_of_its_own(study, tmp_path, curve):
    from gain_plan import Plan
    from gain_report import write

    fields = {"data.limit": 512, "data.image_size": 24}
    keys = {"seeds": [3, 4], "equal": "epochs", "fields": fields, "kept_of": "paper", "curve": curve}
    stages = {"part": PLAN["stages"]["finals"] | keys}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN | {"stages": PLAN["stages"] | stages}, sort_keys=False))
    plan, (_, results, run) = Plan(tmp_path / "plan.yaml"), study
    for name in ("finals", "part"):
        for cell in plan.needed(plan.stages[name], results):
            run(cell, {"plain": 0.5, "paper": 0.6, "own": 0.58}[cell.form])
    text = write(plan, results)
    assert "`own` has 80% of the mean gain of `paper` (" in text and text.count("of the mean gain of `") == 2
    assert "| cifar10 | byol | 0 to 2 |" in text and "| cifar10, 512 images at 24 pixels | byol | 3, 4 |" in text
    for data, drawn in (("cifar10", True), ("cifar10_512_images_at_24_pixels", curve is None)):
        assert (f"(defaults_{data}.png)" in text) == (results.folder / f"defaults_{data}.png").exists() == drawn


def test_the_registered_plan_holds(tmp_path):
    from gain_plan import Plan, Results

    plan = Plan(FOLDER / "gain_plan.yaml")
    for method, spec in METHODS.items():
        if spec.recommended:  # what the newest of the defaults was run as
            form = plan.forms[plan.defaults[0]]
            assert {key: value for key, value in form.items() if "." in key} | form[method] == spec.recommended, method
    names = {cell.name for cell in plan.needed(plan.stages["rates"], Results(tmp_path, plan.common))}
    assert len(names) == 3 * 5 + 7 + 3 + 3 + 1 and "cifar10_byol_plain-ema0.95-1_5ep_seed100_held-out" in names
