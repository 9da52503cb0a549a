"""What is counted as a run's FLOPs, and how it changes over the run."""

import pytest

from rotssl import config as cfg
from rotssl.base.schedules import cosine
from rotssl.engine import flops as counting
from rotssl.engine.flops import CostCurve, Sample, count_mean, count_step, samples
from tests.engine.forms import TASKS
from tests.small_runs import PAPER, make_config, trainer

PLAIN = {"rotation.weight": 0, "train.epochs": 2}


COMPARES = ["cosine, fewer, extra", "contrastive, fewer, extra", "contrastive, four way"]


@pytest.mark.parametrize("form", [*COMPARES, "augment", "eight angles"])
def test_a_step_of_a_form_has_a_cost_before_it_is_taken(tmp_path, form):
    plain = count_step(make_config(tmp_path, "byol", **TASKS["off"]))
    assert count_step(make_config(tmp_path, "byol", **TASKS[form])) > plain


@pytest.mark.contract
def test_the_flops_of_a_run_follow_the_share_of_rotated_images(tmp_path):
    def flops(**fields):
        given = {"data.limit": 32, "train.epochs": 2, "evaluation.knn_every": 0, **PAPER, **fields}
        run = trainer(make_config(tmp_path / str(len(list(tmp_path.iterdir()))), "byol", **given))
        run.run()
        return [run.journal.point(epoch)["cost/flops"] for epoch in (1, 2)]

    whole, quarter = flops(), flops(**{"rotation.fraction": 0.25})
    falling = flops(**{"rotation.fraction_end": 0.25})
    assert whole[0] > falling[0] > falling[1] - falling[0] > quarter[0]
    # Along a cosine the mean over a run is that of its ends.
    assert falling[1] == pytest.approx((whole[1] + quarter[1]) / 2)


@pytest.mark.contract
@pytest.mark.parametrize("fields", [{}, {"views.local_count": 2, "rotation.weight": 1, "rotation.mode": "four_way"}])
def test_the_flops_of_small_views_are_those_of_a_run_on_them(tmp_path, fields):
    shrinks = {"views.local_size": 8, "rotation.crop_size": 8}
    grows = make_config(
        tmp_path, "byol", **{**PLAIN, **shrinks, "views.size_start": 8, "views.size_until": 0.7, **fields}
    )
    small = make_config(tmp_path, "byol", **{**PLAIN, "data.image_size": 8, "views.local_size": 4, **fields})
    small = cfg.replace(small, {"rotation.crop_size": 4})
    large = cfg.replace(grows, {"views.size_start": None})
    low, high = count_step(small), count_step(large)
    assert low < high / 2 and [CostCurve(grows).flops_at(at) for at in (0, 0.69, 0.7, 1)] == [low, low, high, high]
    # Of ten steps the first seven are small.
    assert CostCurve(grows).epochs(5) == [5 * low, 2 * low + 3 * high]
    assert CostCurve(large).epochs(5) == [5 * high] * 2
    assert count_mean(grows) == pytest.approx(0.7 * low + 0.3 * high)


@pytest.mark.contract
@pytest.mark.parametrize(("place", "channels"), [("stem", 24), ("stage", 48)])
def test_an_earlier_head_costs_less_by_its_narrower_input(tmp_path, place, channels):
    late = make_config(tmp_path, "byol", **PAPER, **{"rotation.fraction_end": "none"})
    early = cfg.replace(late, {"rotation.head_on": place})
    rows, width = 2 * 16, late.rotation.hidden_dim  # forward, and backward to input and weights
    assert count_step(late) - count_step(early) == 3 * 2 * rows * width * (96 - channels)


@pytest.mark.contract
def test_a_run_books_the_flops_of_its_small_and_of_its_full_views(tmp_path):
    fields = {**PLAIN, "data.limit": 64, "evaluation.knn_every": 0, "views.size_start": 8, "views.size_until": 0.6}
    run = trainer(make_config(tmp_path, "byol", **fields))
    sides = []
    run.model.encoder.register_forward_pre_hook(lambda _, inputs: sides.append(inputs[0].shape[-1]))
    run.run()
    low, high = count_step(run.config, 0.0), count_step(run.config, 1.0)
    first, second = (run.journal.point(epoch)["cost/flops"] for epoch in (1, 2))
    assert run.total_steps == 8 and sides == [8] * 5 + [16] * 3  # of the student
    assert (first, second) == (4 * low, 5 * low + 3 * high)


def test_the_flops_of_tiles_are_those_of_whole_views_in_the_encoder_and_six_times_those_in_the_heads(tmp_path):
    def count(split, hidden):
        return count_step(make_config(tmp_path, "byol", **PLAIN, **{"views.split": split, "method.hidden_dim": hidden}))

    # Projector and predictor are linear in the width of their hidden layer.
    whole, cut = ({width: count(split, width) for width in (32, 64)} for split in (1, 2))
    assert 2 * whole[32] - whole[64] == 2 * cut[32] - cut[64] > whole[64] - whole[32]
    rows, projector, predictor = 2 * 16, 96 + 16, 16 + 16  # of two views; weights per hidden unit, of 2 FLOPs each
    student, teacher = 3 * 2 * rows * (projector + predictor), 2 * rows * projector  # 3: forward, and backward twice
    assert whole[64] - whole[32] == 32 * (student + teacher)
    assert cut[64] - cut[32] == 32 * (6 * student + teacher)


@pytest.mark.parametrize("until", [0.07, 0.29, 0.57, 0.75, 0.999, 1.0])
def test_a_step_is_counted_with_the_side_that_it_has(tmp_path, monkeypatch, until):
    config = make_config(tmp_path, "byol", **{**PLAIN, "views.size_start": 8, "views.size_until": until})
    side = config.views.side_at
    monkeypatch.setattr(counting, "count_step", lambda config, progress, step: float(side(progress, 16, 16)))
    for steps in (1, 3, 50):
        expected = [side(step / (2 * steps), 16, 16) for step in range(2 * steps)]
        assert CostCurve(config).epochs(steps) == [sum(expected[:steps]), sum(expected[steps:])]


def test_a_task_may_end_before_the_run_and_work_every_few_steps(tmp_path, monkeypatch):
    def count(config, progress, step=0):
        return 1000.0 + 100 * config.rotation.share_at(progress) * config.rotation.active(step, progress)

    monkeypatch.setattr(counting, "count_step", count)
    fields = {"rotation.until": 0.3, "rotation.every": 4, "rotation.fraction_end": 0.5, "train.epochs": 2}
    config = make_config(tmp_path, "byol", **PAPER, **fields)
    curve = CostCurve(config)
    for progress in (0, 0.1, 0.2, 0.299, 0.3, 1):
        share = cosine(1.0, 0.5, progress / 0.3) if progress < 0.3 else 0.0
        assert curve.flops_at(progress) == pytest.approx(1000 + 25 * share)
    # The break is in the middle of the first epoch; a part of an epoch costs what its middle does.
    assert curve.epochs(10) == pytest.approx([10_000 + 6 * 25 * 0.75, 10_000])
    assert curve.epochs(5) == pytest.approx([5000 + 3 * 25 * 0.75, 5000])
    each = [
        Sample(0.3 / 4, 0.15, 0),
        Sample(0.3 * 3 / 4, 0.15, 1),
        Sample(0.7 / 4, 0.65, 0),
        Sample(0.7 * 3 / 4, 0.65, 1),
    ]
    for found, expected in zip(samples(config), each, strict=True):
        assert vars(found) == pytest.approx(vars(expected))
    assert count_mean(config) == pytest.approx(1000 + 0.3 * 25 * 0.75)


@pytest.mark.parametrize("until", [0.2, 0.5, 0.8])
def test_a_share_that_changes_while_views_grow_has_its_own_mean_in_each_phase(tmp_path, monkeypatch, until):
    fields = {"views.size_start": 8, "views.size_until": until, "rotation.fraction_end": 0.25, "train.epochs": 400}

    def count(config, progress, step=0):
        return config.views.side_at(progress, 16, 16) * (1 + config.rotation.share_at(progress))

    monkeypatch.setattr(counting, "count_step", count)
    config = make_config(tmp_path, "byol", **fields)
    expected = sum(count(config, (step + 0.5) / 4000) for step in range(4000))
    assert sum(CostCurve(config).epochs(10)) == pytest.approx(expected, rel=1e-5)
    assert count_mean(config) == pytest.approx(expected / 4000, rel=2e-3)
