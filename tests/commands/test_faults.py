"""Faults of a run's folder: its record lost or changed by hand, its disk failing."""

import json

import pytest

from rotssl import config as cfg
from rotssl import lifecycle
from rotssl.commands import pretrain, run_command
from rotssl.commands.evaluate import evaluate
from rotssl.config.fields import ConfigError
from rotssl.engine.events import EpochDone
from rotssl.runs import checkpoint, journal
from rotssl.runs.state import RunState
from tests.finished import copied
from tests.programs import SMALL, mlflow_client, with_store

pytestmark = pytest.mark.contract


def prepared(storage, **fields):
    fields = {**SMALL, "scaling.num_workers": 0, "tracking.run_name": "run", **fields}
    fields["storage.path"] = str(with_store(storage))
    return lifecycle.prepare(cfg.build(fields))[0]


def start(storage, **fields):
    return pretrain.pretrain(prepared(storage, **fields))


def weights(folder):
    return (folder / "encoder.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(trained):
    return weights(trained.run_dir)


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    """A run with a store that was stopped after the first of its two epochs."""
    config = prepared(tmp_path_factory.mktemp("halfway"), **{"train.stop_after": 1})
    assert pretrain.pretrain(config) == 0
    return config


@pytest.mark.parametrize("how", ["removed", "empty", "zeros"])
def test_a_lost_record_is_rebuilt_from_the_newest_checkpoint(tmp_path, capsys, undisturbed, halfway, how):
    copied(halfway, tmp_path)
    folder = tmp_path / "rotssl" / "run"
    record = folder / "run.json"
    run_id = json.loads(record.read_text())["run_id"]
    record.unlink() if how == "removed" else record.write_text("" if how == "empty" else "\0" * 512)
    with pytest.raises(ConfigError, match=r"epoch_00001 is of another configuration: optim\.lr .* in place of 0\.7"):
        start(tmp_path, **{"optim.lr": 0.7})
    changed = prepared(tmp_path, **{"evaluation.knn_every": 0})
    assert RunState.of(changed).changes == ["evaluation.knn_every: 0 in place of 1"]
    capsys.readouterr()
    assert start(tmp_path) == 0
    assert "run.json of 'run' was lost: rebuilt from epoch_00001" in capsys.readouterr().err
    assert weights(folder) == undisturbed and json.loads(record.read_text())["status"] == "finished"
    client = mlflow_client(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("rotssl").experiment_id])
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")
    assert [point.step for point in client.get_metric_history(run_id, "loss/total")] == [1, 2]


def test_a_record_is_not_rebuilt_from_a_checkpoint_that_cannot_be_read(tmp_path, halfway):
    copied(halfway, tmp_path, off=True)
    folder = tmp_path / "rotssl" / "run"
    (folder / "run.json").unlink()
    (folder / checkpoint.name(1) / checkpoint.FILE).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no run\.json and no checkpoint that can be read; move the folder away"):
        start(tmp_path)


def test_a_run_is_finished_only_if_its_journal_says_so_too(tmp_path, capsys, undisturbed, halfway):
    off = {"tracking.uri": "off"}
    copied(halfway, tmp_path, off=True)
    folder = tmp_path / "rotssl" / "run"
    record = folder / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"status": "finished", "reason": "completed"}))
    with pytest.raises(ConfigError, match=r"the journal in .* has 1 of 2 epochs; run it again first"):
        evaluate(None, str(folder), ("knn",), "")
    assert start(tmp_path, **off) == 0
    shown = capsys.readouterr()
    assert "the journal has 1 of 2 epochs" in shown.err.replace("its", "the") and "already finished" not in shown.out
    assert weights(folder) == undisturbed and max(journal.read(folder)) == 2


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json"])
def test_a_disk_that_fails_in_mid_run_is_one_line(tmp_path, capsys, undisturbed, name):
    config, kept = prepared(tmp_path, **{"tracking.uri": "off"}), []

    def broken(event):
        if isinstance(event, EpochDone) and event.epoch == 1:
            file = config.run_dir / name
            kept.append(file.read_bytes())
            file.unlink()
            file.symlink_to("/proc/self/mem")  # reads of it fail with EIO, as those of a broken disk

    with lifecycle.Run.held(config) as run:
        run.track(None)
        status = run.train(None, broken)
    assert status == ("failed" if name == "metrics.jsonl" else "finished")
    if name == "metrics.jsonl":
        assert run.state.reason.startswith("OSError: [Errno ") and "\n" not in run.state.reason
        assert json.loads((config.run_dir / "run.json").read_text())["status"] == "failed"
        with pytest.raises(SystemExit) as ended:
            run_command(lambda: pretrain.pretrain(config))
        assert ended.value.code == 1
        assert capsys.readouterr().err.count("\n") == 1
        (config.run_dir / name).unlink()
        (config.run_dir / name).write_bytes(kept[0])  # the disk is whole again
        assert pretrain.pretrain(config) == 0 and list(journal.read(config.run_dir)) == [1, 2]
        assert weights(config.run_dir) == undisturbed


@pytest.mark.parametrize("number", [5, 28, 30])
def test_a_disk_that_fails_at_the_start_is_one_line(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(
        journal, "read", lambda folder: (_ for _ in ()).throw(OSError(number, "it fails", "metrics.jsonl"))
    )
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: start(tmp_path, **{"tracking.uri": "off"}))
    assert (ended.value.code, capsys.readouterr().err) == (1, "error: it fails: metrics.jsonl\n")


def test_a_run_that_diverged_says_so(tmp_path, capsys):
    # Without evaluations, which also find that such a run collapses or not, as rounding has it.
    rates = {
        "optim.lr": 0.5,
        "optim.weight_decay": 10.0,
        "train.epochs": 3,
        "data.limit": 512,
        "evaluation.knn_every": 0,
    }
    assert start(tmp_path, **rates) == 0
    assert "warning: run: diverged: loss/" in capsys.readouterr().err
    record = json.loads((tmp_path / "rotssl" / "run" / "run.json").read_text())
    assert record["status"] == "finished" and record["reason"].startswith("diverged: loss/")
    client = mlflow_client(f"sqlite:///{tmp_path}/mlflow.db")
    tags = client.get_run(record["run_id"]).data.tags
    assert tags["status_reason"] == record["reason"]
    assert start(tmp_path, **rates) == 0 and "diverged" in capsys.readouterr().err  # whenever its table is printed


def test_skipped_steps_are_counted_where_a_run_fails_by_them(tmp_path, capsys):
    assert start(tmp_path, **{"tracking.uri": "off", "optim.lr": 1e9, "train.on_nan": "skip", "data.limit": 512}) == 1
    err = capsys.readouterr().err
    assert "of epoch 1 skipped for non-finite gradients, and the encoder's features are no longer finite" in err


@pytest.mark.parametrize("action", ["flag", "stop"])
def test_a_run_that_collapses_is_flagged_or_ended(tmp_path, capsys, action):
    # A teacher so sharp that one output wins for all images.
    fields = {"method.name": "dino", "method.center_momentum": 0.999, "optim.lr": 0.02, "data.limit": 512}
    fields |= dict.fromkeys(("method.teacher_temperature", "method.teacher_temperature_start"), 0.005)
    fields |= {"train.epochs": 4, "train.on_collapse": action, "rotation.weight": 0}
    assert start(tmp_path, **fields) == (0 if action == "flag" else 1)
    err, folder = capsys.readouterr().err, tmp_path / "rotssl" / "run"
    record, done = json.loads((folder / "run.json").read_text()), max(journal.read(folder))
    tags = mlflow_client(f"sqlite:///{tmp_path}/mlflow.db").get_run(record["run_id"]).data.tags
    assert record["reason"].startswith("collapsed: feature/std") and tags["status_reason"] == record["reason"]
    if action == "flag":
        assert (record["status"], done) == ("finished", 4)
        assert err.count("the run goes on (train.on_collapse flag)") == 1 and tags["collapsed"].startswith(
            "collapsed: "
        )
    else:
        assert record["status"] == "failed" and done < 4 and "error: the run failed: collapsed: " in err
        assert checkpoint.found(folder)  # of the epoch in which it was seen
