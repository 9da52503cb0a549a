"""Tasks that cannot help are switched off."""

import json

import numpy as np
import pytest
import torch

from rotssl.base.step import StepContext
from rotssl.engine.guard import Guard, wilson
from rotssl.engine.pretrainer import build_pretrainer
from tests.small_runs import CPU, PAPER, arithmetic, make_config, trainer


def test_wilson_s_interval():
    low, high = wilson(0.25, 10_000)
    assert (low, high) == pytest.approx((0.25 - 3.29 * 0.00433, 0.25 + 3.29 * 0.00433), abs=3e-4)
    assert wilson(0.0, 100)[0] == pytest.approx(0.0, abs=1e-12) and 0.05 < wilson(0.0, 100)[1] < 0.12


def judged(tmp_path, accuracy, fields=None, images=512):
    """What a guard says after ten steps of so many images, of which the last eight had an accuracy."""
    config = make_config(tmp_path, "byol", **(fields or {}))
    guard = Guard(dict(build_pretrainer(config, CPU).named_tasks()), 10, 8)
    said = []
    for step in range(12):
        ctx = StepContext(0, 0, step, 0.0, np.arange(16), 0, images)
        before = 0.25 if step < 2 else accuracy
        said += guard.see(ctx, {"rotation/accuracy": torch.tensor(before)})
    assert said == list(guard.off.values())
    return guard.off.get("rotation", "")


@pytest.mark.parametrize(
    ("accuracy", "told"), [(0.25, "chance is 25.0%"), (0.265, "chance is 25.0%"), (1.0, "solved from the start")]
)
def test_a_task_at_chance_or_solved_is_switched_off(tmp_path, accuracy, told):
    reason = judged(tmp_path, accuracy)
    assert reason.startswith(f"rotation switched off after step 10: accuracy {accuracy:.1%} (") and reason.endswith(
        told
    )


def test_a_little_above_chance_is_chance_however_many_images_say_so(tmp_path):
    assert "(25.8% to 26.6%), chance is 25.0%" in judged(tmp_path, 0.262, images=16_384)


@pytest.mark.parametrize("accuracy", [0.3, 0.6, 0.99])
def test_a_task_that_is_learned_goes_on(tmp_path, accuracy):
    assert judged(tmp_path, accuracy) == ""


def test_chance_is_that_of_the_angles(tmp_path):
    assert "chance is 50.0%" in judged(tmp_path, 0.5, {"rotation.degrees": (0, 180)})
    assert judged(tmp_path, 0.6, {"rotation.degrees": (0, 180)}) == ""


# Three epochs of four steps, judged after the sixth; no angle can be seen in so few steps. Slow enough that the rounding of
# views, which are in single precision, turns no prediction.
FIELDS = {"data.limit": 64, "tasks.guard": 2, "train.epochs": 3, "optim.lr": 0.24}
FIELDS |= {"method.momentum": 0.99, "method.momentum_end": 1.0}


def told(folder):
    lines = (folder / "rotssl" / "run" / "metrics.jsonl").read_text().splitlines()
    points = [json.loads(line) for line in lines]
    return [point.get("rotation/off") for point in points if "loss/ssl" in point]


def verdict(overrides):
    """Why tasks were switched off, and the last weights, of a run in double precision."""
    with arithmetic(torch.float64):
        run = trainer(make_config(**overrides))
        run.run()
        return dict(run.guard.off), {name: value.numpy().copy() for name, value in run.model.state_dict().items()}


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_a_resumed_run_repeats_the_verdict(tmp_path, request, workers):
    # Judged after the tenth step by the last three, of which the first is in the second epoch.
    late = {"method": "byol", "evaluation.knn_every": 0, **FIELDS, "tasks.guard": 6}

    def execute(folder, **fields):
        overrides = {"folder": tmp_path / folder, **late, **fields}
        if workers == 1:
            return verdict(overrides)
        first, second = request.getfixturevalue("pool").run(verdict, overrides)
        assert first[0] == second[0]
        return first

    reason, whole = execute("whole")
    assert reason == verdict({"folder": tmp_path / "alone", **late})[0] and list(reason) == ["rotation"]
    execute("halves", **{"train.stop_after": 2})
    again, resumed = execute("halves")
    assert again == reason
    for name, value in whole.items():
        np.testing.assert_array_equal(value, resumed[name], err_msg=name)
    for folder in ("whole", "halves"):
        assert told(tmp_path / folder) == [None, None, 1.0]
    never = execute("never", **{"tasks.guard": 0})[1]
    assert any(not np.array_equal(value, never[name]) for name, value in whole.items())
    execute("judged", **{"train.stop_after": 3, "train.epochs": 4})
    assert execute("judged", **{"train.epochs": 4})[0] != {}  # known to a start after it


def test_after_the_verdict_the_method_is_alone(tmp_path):
    run = trainer(make_config(tmp_path, "byol", **FIELDS))
    batches = [item for epoch in range(3) for item in run.batches(epoch)]
    for images, ctx in batches[:6]:
        run.step(images, ctx)
    assert list(run.guard.off) == ["rotation"] and "rotation" in run.facts()["switched_off"]
    plain = trainer(make_config(tmp_path, "byol", **FIELDS, **{"rotation.weight": 0}))
    plain.model.load_state_dict({k: v for k, v in run.model.state_dict().items() if not k.startswith("tasks.")})
    images, ctx = batches[6]
    views = run.augment(images, ctx)
    ours, theirs = run.model(views, ctx), plain.model(views, ctx)
    assert torch.equal(ours.loss, theirs.loss) and "loss/rotation" not in ours.logs


def test_the_flops_of_a_task_end_with_it(tmp_path):
    flops = {}
    for name, fields in {"judged": FIELDS, "on": {"tasks.guard": 0}, "off": {"rotation.weight": 0}}.items():
        given = {**FIELDS, **PAPER, "evaluation.knn_every": 0, **fields}
        run = trainer(make_config(tmp_path / name, "byol", **given))
        run.run()
        flops[name] = [run.journal.point(epoch)["cost/flops"] for epoch in (1, 2, 3)]
    on, off = flops["on"][0], flops["off"][0]
    # Judged after the sixth step, in the middle of the second epoch of four.
    assert flops["judged"] == pytest.approx([on, 1.5 * on + 0.5 * off, 1.5 * on + 1.5 * off]) and off < 0.7 * on
