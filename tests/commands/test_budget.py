"""train.budget: minutes become epochs once, and every later start keeps them."""

import json
import re

import pytest

from rotssl import config as cfg
from rotssl import lifecycle
from rotssl.commands import budget, pretrain
from rotssl.config.cli import parse
from rotssl.config.fields import ConfigError
from rotssl.runs import checkpoint, journal
from tests.programs import SMALL, flags, job

EPOCH = 12.9  # seconds of an epoch, where a test does not measure them


@pytest.fixture
def measured(monkeypatch):
    """How often the time of an epoch was asked for; the list may be given another time."""
    asked = []
    monkeypatch.setattr(budget, "_epoch_seconds", lambda *_: asked.append(1) or EPOCH)
    return asked


def plan(folder, **fields):
    """The planned configuration of a small run with a budget of one minute."""
    values = {**SMALL, "storage.path": str(folder), "scaling.num_workers": 0, "train.budget": 1, **fields}
    asked = cfg.build(values)
    resolved, info = lifecycle.prepare(asked)
    return budget.planned(asked, resolved, info, None)


def test_a_budget_holds_whole_epochs_and_what_follows_from_their_number(tmp_path, measured, capsys):
    config = plan(tmp_path, **{"train.budget": 10})
    assert (config.train.epochs, config.train.budget) == (46, None)  # 600 s / 12.9 s
    assert config.optim.warmup_epochs == 4.6
    assert "train.epochs 46: an epoch takes 12.9 s" in capsys.readouterr().err
    assert "-10min-" in config.tracking.run_name
    assert plan(tmp_path, **{"tracking.run_name": "mine"}).tracking.run_name == "mine"


def test_the_name_of_a_run_with_a_budget_does_not_depend_on_what_was_measured(tmp_path, measured, monkeypatch):
    name = plan(tmp_path).tracking.run_name
    monkeypatch.setattr(budget, "_epoch_seconds", lambda *_: 2.0)
    assert plan(tmp_path).tracking.run_name == name
    assert plan(tmp_path, **{"train.epochs": 7}).tracking.run_name == name  # which the budget replaces
    names = {plan(tmp_path, **fields).tracking.run_name for fields in ({"train.budget": 2}, {"train.seed": 1})}
    assert len(names | {name}) == 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"train.budget": 0.2}, r"train\.budget: got 0\.2, expected at least 0\.22 minutes"),
        ({"optim.warmup_epochs": 5}, r"optim\.warmup_epochs: got 5.*train\.epochs \(4\)"),
    ],
)
def test_a_budget_that_is_too_small_is_refused(tmp_path, measured, fields, words):
    with pytest.raises(ConfigError, match=words):
        plan(tmp_path, **fields)


def test_a_budget_that_nobody_planned_is_refused(tmp_path):
    config, _ = lifecycle.prepare(cfg.build({**SMALL, "storage.path": str(tmp_path), "train.budget": 5}))
    with pytest.raises(ConfigError, match=r"^train\.budget: got 5\.0, expected none here"):
        pretrain.pretrain(config)


@pytest.mark.contract
def test_later_starts_keep_the_epochs_of_the_first_one(tmp_path, measured, monkeypatch, capsys):
    fields = {**SMALL, "scaling.num_workers": 0, "tracking.uri": "off", "train.budget": 0.5, "evaluation.linear": False}

    def start(*more):
        return pretrain.run(parse([*flags(fields, tmp_path), *more]))

    assert start("--train.stop_after", "1") == 0
    (folder,) = (tmp_path / "rotssl").iterdir()
    record = json.loads((folder / "run.json").read_text())
    assert record["config"]["train.epochs"] == 2 and max(journal.read(folder)) == 1
    monkeypatch.setattr(budget, "_epoch_seconds", lambda *_: pytest.fail("measured again"))
    (folder / "run.json").unlink()  # the checkpoint knows it too
    assert checkpoint.found(folder) and start() == 0
    assert max(journal.read(folder)) == 2
    assert start() == 0 and "already finished" in capsys.readouterr().out
    assert len(measured) == 1


@pytest.mark.contract
def test_the_time_of_an_epoch_is_measured_here_without_ray(tmp_path, capsys):
    command = parse([*flags({**SMALL, "train.budget": 1}, tmp_path), "--scaling.num_workers", "0", "--print_config"])
    assert pretrain.run(command) == 0
    done = capsys.readouterr()
    epochs, seconds = re.search(r"train\.epochs (\d+): an epoch takes ([\d.e-]+) s", done.err).groups()
    assert int(epochs) == pytest.approx(60 / float(seconds), rel=0.02, abs=1)
    assert f"epochs: {epochs}\n" in done.out and "budget: null" in done.out


@pytest.mark.exhaustive
@pytest.mark.system
def test_the_time_of_an_epoch_is_measured_on_a_worker(tmp_path):
    fields = {**SMALL, "tracking.uri": "off", "scaling.num_workers": 2, "train.budget": 0.02}
    first, second = (job(*flags(fields, tmp_path)) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    epochs = re.search(r"train\.epochs (\d+): an epoch takes", first.stderr).group(1)
    assert f"train.epochs {epochs}, as at the first start" in second.stderr and "already finished" in second.stdout
