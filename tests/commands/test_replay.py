"""jobs/replay.py: one step of a run, taken apart."""

import re
import shutil

import pytest

from rotssl.commands.replay import PICTURE, replay
from rotssl.config.fields import ConfigError
from rotssl.config.recipes import dump
from rotssl.engine import breakdown
from rotssl.engine.runtime import RunFailed
from rotssl.runs import checkpoint
from tests.small_runs import make_config, trainer

pytestmark = pytest.mark.contract
SHORT = {"data.limit": 64, "train.epochs": 3, "evaluation.knn_every": 0, "evaluation.linear": False}


def run(folder, **fields):
    """A run, as far as it goes; returns its folder, and the losses of each step."""
    config = make_config(folder, "mocov2", **SHORT, **fields)
    made = trainer(config)
    step, losses = made.step, []

    def noted(*batch):
        logs = step(*batch)
        losses.append(float(logs["loss/ssl"]))
        return logs

    made.step = noted
    try:
        made.run()
    except RunFailed:
        assert breakdown.recorded(config.run_dir)
    (config.run_dir / "config.yaml").write_text(dump(config))
    return config.run_dir, losses


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after the second of its three epochs, and the losses of all steps of the same run to its end."""
    folder, losses = run(tmp_path_factory.mktemp("stopped"), **{"train.stop_after": 2})
    whole = run(tmp_path_factory.mktemp("whole"))[1]
    assert whole[: len(losses)] == losses
    return folder, whole


@pytest.mark.parametrize(("lost", "step", "first"), [(0, 9, 8), (0, 7, 4), (2, 7, 0)])
def test_a_step_is_that_of_the_run_from_whatever_state(tmp_path, capsys, stopped, lost, step, first):
    folder, losses = shutil.copytree(stopped[0], tmp_path / "run"), stopped[1]
    for place in checkpoint.found(folder)[:lost]:
        (place / checkpoint.FILE).unlink()
    assert replay(str(folder), step, None) == 0
    out = capsys.readouterr()
    assert f"training from step {first} to step {step}" in out.err
    assert re.search(r"loss/ssl +(\S+)", out.out).group(1) == f"{losses[step]:.6g}"
    assert f"step {step} (epoch {step // 4 + 1})" in out.out and "all numbers of this step are finite here" in out.out
    assert (folder / PICTURE).exists()


def test_the_step_that_broke_a_run_breaks_again(tmp_path, capsys):
    folder, losses = run(tmp_path, **{"optim.lr": 1e12, "optim.warmup_epochs": 0})
    bad = breakdown.recorded(folder)
    assert 0 < bad["step"] < len(losses)
    assert replay(str(folder), None, None) == 0
    out = capsys.readouterr()
    assert f"step {bad['step']}: {bad['reason']}" in out.err and "the breakdown is reproduced" in out.out
    assert re.search(r"first output not finite +method\.projector\.\S+ \(\w+\), whose input is finite", out.out)


@pytest.mark.parametrize(
    ("step", "words"),
    [(None, r"^--step: got nothing, .* no bad step is noted in"), (12, r"^--step: got 12, .* from 0 to 11$")],
)
def test_what_cannot_be_replayed_is_refused(tmp_path, stopped, step, words):
    with pytest.raises(ConfigError, match=words):
        replay(str(stopped[0]), step, None)
    with pytest.raises(ConfigError, match="expected the folder of a run"):
        replay(str(tmp_path), step, None)
