"""Steps that are repetitions of one recording: a CUDA graph on a GPU; here a tape that reads and writes the same places."""

from itertools import islice

import pytest
import torch

from rotssl.config.methods import METHODS
from rotssl.data.augment import masked_cut, masked_view
from rotssl.engine.captured import WARM, Captured
from rotssl.engine.runtime import RunFailed
from tests.devices import Tape
from tests.small_runs import PAPER, arithmetic, make_config, trainer

pytestmark = pytest.mark.contract
JIGSAW = {"rotation.weight": 0, "jigsaw.weight": 1.0, "jigsaw.grid": 2, "jigsaw.permutations": 10}
FORMS = {
    "plain": {"rotation.weight": 0},
    "in place": {"rotation.share": 0.5, "rotation.conditioned": True},
    "extra": PAPER,
    "jigsaw": JIGSAW,
}
# Each method with the default form; all forms with one method; optimizers and what is left out.
CASES = [(method, "in place", {}) for method in METHODS]
CASES += [("byol", form, {}) for form in FORMS if form != "in place"]
CASES += [("byol", "plain", {"optim.name": name, "optim.lr": 0.01}) for name in ("adamw", "lars")]
CASES += [("mocov2", "plain", {"train.on_nan": "skip", "optim.clip_norm": 0.5, "model.norm": "batch"})]
CHEAP = (("byol", "in place"), ("dino", "in place"), ("mocov2", "plain"))
STEPS = 8


def taken(config, captured, steps=STEPS):
    """Losses and norms of the first steps, the state after them, and how many of them were repetitions."""
    run = trainer(config)
    run.augment.masked = tuple(
        lambda *given, f=f: f(*given).to(torch.get_default_dtype()) for f in (masked_view, masked_cut)
    )
    if captured:
        run.update = Captured(run, Tape.record)
    run.parallel.train()
    told = []
    for images, ctx in islice((item for epoch in range(4) for item in run.batches(epoch)), steps):
        told.append({key: float(value) for key, value in run.step(images, ctx).items()})
    return told, run.model.state_dict() | run.model.balance.state(), captured and run.update.replayed


@pytest.mark.parametrize(
    ("method", "form", "more"),
    [
        pytest.param(*case, id="-".join([*case[:2], *map(str, case[2].values())]), marks=marks)
        for case in CASES
        for marks in [() if case[:2] in CHEAP and not (case[0] == "byol" and case[2]) else pytest.mark.exhaustive]
    ],
)
def test_a_recording_repeated_takes_the_steps_of_the_engine(tmp_path, method, form, more):
    # Rates and the teacher's momentum change from step to step; swav's prototypes and dino's last layer move from the fourth on.
    fields = {"data.limit": 64, "optim.warmup_epochs": 1, **FORMS[form], **more}
    fields |= {"method.momentum": 0.8, "method.momentum_end": 1.0} if method == "byol" else {}
    fields |= {"method.queue_after": 0} if method == "swav" else {}  # its queue is used from the fourth step on, too
    with arithmetic(torch.float64):
        (plain, state, _), (captured, same, repeated) = (
            taken(make_config(tmp_path / str(how), method, **fields), how) for how in (False, True)
        )
    late = 3 if method in ("swav", "dino") else 0  # what is frozen at first makes steps of another kind
    assert repeated == STEPS - WARM - 1 - late
    for ours, theirs in zip(captured, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    assert len({step["loss/ssl"] for step in captured}) == STEPS
    for name, value in state.items():
        torch.testing.assert_close(same[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_steps_of_another_kind_are_taken_without_the_recording(tmp_path):
    config = make_config(
        tmp_path, "byol", **{"data.limit": 128, "views.size_start": 12, "views.size_until": 0.25, **PAPER}
    )
    run = trainer(config)
    run.update = captured = Captured(run, Tape.record)
    sizes, work = [], captured.update
    captured.update = lambda images, ctx: sizes.append(ctx.step) or work(images, ctx)
    for images, ctx in (item for epoch in range(2) for item in run.batches(epoch)):
        run.step(images, ctx)
    first, *_ = [step for step in sizes if step > WARM]
    assert first == 8 and len(sizes) == 2 * (WARM + 1) and captured.replayed == 16 - len(sizes)


def test_a_step_that_breaks_down_is_noted_from_a_recording(tmp_path):
    run = trainer(make_config(tmp_path, "byol", **{"data.limit": 128, **FORMS["plain"]}))
    run.update = Captured(run, Tape.record)
    for images, ctx in islice(run.batches(0), 7):
        if ctx.step == 5:
            with torch.no_grad():
                next(run.model.encoder.parameters()).fill_(torch.nan)
        run.step(images, ctx)
    assert run.update.replayed == 3 and run.breakdown.step == 5  # the first one that did


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"train.precision": "fp16"}, "train.precision fp16"),
        ({"tasks.log_gradients_every": 5}, "tasks.log_gradients_every"),
        ({"train.accumulate": 2}, "train.accumulate"),
        ({"rotation.mode": "extra", "rotation.degrees": (0, 45)}, "rotation.degrees that are no quarter turns"),
    ],
)
def test_what_cannot_be_recorded_is_refused(tmp_path, fields, words):
    run = trainer(make_config(tmp_path, "byol", **fields))
    with pytest.raises(RunFailed, match=rf"^steps cannot be one CUDA graph with {words}$"):
        Captured(run, Tape.record)
