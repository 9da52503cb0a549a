"""Our runs beside the paper's tables and figures: lines, differences over paired seeds, and what is said of them."""

import json

import pytest

from rotssl.config.fields import ConfigError
from rotssl.reports import study_plot
from rotssl.reports.paper import ALONE, PLAIN, ROTATION, STUDIES
from rotssl.reports.studies import content, found_in, label, reading
from tests.reports.made_up import run

METRIC = "knn/top1"


def ended(final, seed=0, **fields):
    return run((0.2, 0.3, 0.4, final), train__seed=seed, **fields)


def oracle(final, share, seed=0, weight=0, **more):
    return ended(final, seed, rotation__weight=weight, method__name="simclr", oracle__false_negatives=share, **more)


def told(found, study):
    return " ".join(reading(found, study))


def table1(rise):
    """Plain rises with what is removed, rotation half as much; the seeds differ by a tenth of a point."""
    runs = []
    for seed in range(3):
        for share in (0, 0.3, 1):
            runs.append(oracle(0.6 + rise * share + 0.001 * seed * share, share, seed))
            runs.append(oracle(0.65 + rise * share / 2, share, seed, weight=1))
    return runs


def test_what_the_paper_reports_is_seen_where_the_interval_says_so():
    study = STUDIES["table1"]
    (found,) = found_in(table1(0.05), study, METRIC)
    assert (found.method, found.budget) == ("simclr", 4)
    assert list(found.lines) == [PLAIN, ROTATION] and list(found.lines[PLAIN]) == [0.0, 0.3, 1.0]
    first, second, *gains, change = found.answers
    assert first.what == "simclr, plain: from 0% to 100%"
    assert first.ours.value == pytest.approx(0.051) and first.paper == pytest.approx(4.5) and first.seeds == 3
    assert first.verdict == second.verdict == "up, as in the paper"
    assert [answer.paper for answer in gains] == pytest.approx([2.14, 1.68, 0.88])
    assert change.what == "simclr, the gain of rotation over plain from 0% to 100%"
    assert change.ours.value == pytest.approx(-0.026) and change.paper == pytest.approx(-1.26)
    assert change.verdict == "down, as in the paper"


def test_what_is_not_seen_and_what_is_the_other_way_round_is_said_plainly():
    study = STUDIES["table1"]
    down = told(found_in(table1(-0.05), study, METRIC), study)
    assert "plain: from 0% to 100%: -4.9 (-5.1 to -4.7) points, 3 paired seeds; the paper has +4.50." in down
    assert "Here: down, unlike the paper." in down
    runs = [oracle(0.6 + (0.02 if seed else -0.03) * share, share, seed) for seed in range(3) for share in (0, 1)]
    assert "Here: a change isn't seen: the interval contains 0." in told(found_in(runs, study, METRIC), study)
    alone = told(found_in([oracle(0.6, 0), oracle(0.7, 1)], study, METRIC), study)
    assert "+10.0 (one seed) points; the paper has +4.50. Here: one seed has no interval" in alone


def test_seeds_that_one_side_lacks_do_not_count():
    runs = [oracle(0.6 + 0.05 * share, share, seed) for seed in range(3) for share in (0, 1)]
    (found,) = found_in([*runs, oracle(0.99, 1, 7)], STUDIES["table1"], METRIC)
    (answer,) = found.answers
    assert answer.seeds == 3 and answer.ours.value == pytest.approx(0.05)


def test_a_plain_run_has_no_label_noise_and_stands_beside_every_rate():
    study = STUDIES["figureA4"]
    runs = []
    for seed in range(2):
        runs.append(ended(0.6 + 0.001 * seed, seed))
        runs += [ended(0.7 - 0.1 * rate, seed, rotation__weight=1, rotation__label_noise=rate) for rate in (0, 0.2, 1)]
    (found,) = found_in(runs, study, METRIC)
    assert list(found.lines[PLAIN]) == [None] and list(found.lines[ROTATION]) == [0.0, 0.2, 1.0]
    change, *gains = found.answers
    assert change.ours.value == pytest.approx(-0.1) and change.paper == pytest.approx(87.52 - 91.89)
    assert [answer.ours.value for answer in gains] == pytest.approx([0.0995, 0.0795, -0.0005])
    assert [answer.paper for answer in gains] == pytest.approx([2.59, 1.26, -1.78])
    assert "isn't seen" in gains[-1].verdict


def test_another_quantity_than_the_paper_s_is_compared_at_its_ends_only():
    study = STUDIES["overlap"]
    runs = [
        ended(0.6 + overlap / 10, seed, views__min_overlap=overlap) for seed in (0, 1) for overlap in (0, 0.25, 0.5)
    ]
    (found,) = found_in(runs, study, METRIC)
    (answer,) = found.answers
    assert answer.paper == pytest.approx(66.72 - 63.64)
    assert all(point["paper"] is None for point in content([found], study, METRIC)["methods"][0]["lines"][PLAIN])
    assert "this bounds the overlap" in told([found], study)


def test_angles_layers_and_lengths_are_lines_too():
    angles = [ended(0.6, s) for s in (0, 1)]
    angles += [
        ended(0.7, s, rotation__weight=1, rotation__degrees=d) for s in (0, 1) for d in ((0, 180), (0, 90, 180, 270))
    ]
    study = STUDIES["tableA5"]
    (found,) = found_in(angles, study, METRIC)
    assert [label(value, study) for value in found.lines[ROTATION]] == ["0, 180", "0, 90, 180, 270"]
    assert [answer.paper for answer in found.answers] == pytest.approx([66.21 - 60.67, 67.03 - 60.67])
    forms = [
        ended(0.6 + i / 100, s, rotation__weight=1, rotation__loss=loss, rotation__mode=mode)
        for s in (0, 1)
        for i, (mode, loss) in enumerate(
            (("extra", "cross_entropy"), ("extra", "contrastive"), ("extra", "cosine"), ("augment", "cross_entropy"))
        )
    ]
    (found,) = found_in([*angles[:2], *forms], STUDIES["tableA7"], METRIC)
    assert [answer.ours.value for answer in found.answers] == pytest.approx([0.0, 0.01, 0.02, 0.03])
    assert [answer.paper for answer in found.answers] == pytest.approx([2.59, 0.89, -0.35, -9.60])
    lengths = [run((0.2, 0.3, 0.5)[:epochs], method__name="byol") for epochs in (2, 3)]
    lengths += [
        run((0.2, 0.3, 0.4)[:epochs], rotation__weight=1, tasks__method_weight=weight, method__name="byol")
        for epochs in (2, 3)
        for weight in (0, 1)
    ]
    (found,) = found_in(lengths, STUDIES["convergence"], METRIC)
    assert set(found.lines) == {PLAIN, ROTATION, ALONE} and found.budget is None
    assert set(found.lines[ALONE]) == {2.0, 3.0}


def test_runs_that_cannot_be_told_apart_or_vary_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"^no complete runs differ in oracle\.false_negatives"):
        found_in([oracle(0.6, 0.3)], STUDIES["table1"], METRIC)
    runs = [oracle(0.6, 0, name="one"), oracle(0.7, 0, optim__lr=0.5, name="two"), oracle(0.7, 1)]
    with pytest.raises(ConfigError, match=r"one and two are both plain .* differ in optim\.lr: choose one sweep with"):
        found_in(runs, STUDIES["table1"], METRIC)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_a_field_of_ours_and_a_plot(tmp_path, name):
    from rotssl.config import schema

    study = STUDIES[name]
    assert study.field in schema("simclr")
    if name == "table1":
        found = found_in(table1(0.05), study, METRIC)
        study_plot.save(found, study, METRIC, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 10_000
        assert json.loads(json.dumps(content(found, study, METRIC), allow_nan=False))["field"] == study.field


@pytest.mark.parametrize("field", ["optim__lr", "views__flip", "rotation__mode"])
def test_runs_that_differ_in_more_than_the_study_s_field_are_not_compared(field):
    values = {"optim__lr": (0.1, 0.2), "views__flip": (0.5, 0.4), "rotation__mode": ("extra", "in_place")}
    runs = [oracle(0.6, share, weight=1, **{field: values[field][share]}) for share in (0, 1)]
    with pytest.raises(
        ConfigError, match=rf"differ in {field.replace('__', '.')}, not in oracle.false_negatives alone"
    ):
        found_in(runs, STUDIES["table1"], METRIC)


def test_another_task_is_not_rotation():
    with pytest.raises(ConfigError, match=r"has the task jigsaw: the paper's lines are of rotation"):
        found_in([oracle(0.6, share, jigsaw__weight=1) for share in (0, 1)], STUDIES["table1"], METRIC)
