"""One trial of a sweep, in this process: what it tells, and what it does about what goes wrong."""

import contextlib
import dataclasses
import fcntl
import json

import pytest
import yaml

from rotssl import config as cfg
from rotssl import lifecycle
from rotssl.commands import ablate, pretrain
from rotssl.config.fields import ConfigError
from rotssl.config.sweep import parse
from rotssl.config.tasks import WEIGHTS
from rotssl.data import datasets
from rotssl.runs import journal
from rotssl.runtimes import preflight, ray_cluster, ray_train, ray_tune
from rotssl.runtimes.ray_cluster import Workers
from rotssl.sweeps import run as sweep_run
from rotssl.sweeps import trial as trials
from rotssl.sweeps.run import SweepRun
from rotssl.tracking import reader, store, writer
from rotssl.tracking.system import of_epochs
from tests.programs import SMALL, mlflow_client, with_store

pytestmark = pytest.mark.contract


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A sweep of two trials, with its own run in MLflow."""
    sections = {}
    small = {key: value for key, value in SMALL.items() if key != "rotation.weight"}  # which is varied
    for key, value in {**small, "storage.path": str(with_store(tmp_path / "results"))}.items():
        section, leaf = key.split(".")
        sections.setdefault(section, {})[leaf] = value
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({"grid": {"rotation.weight": [0, 1.0]}, **sections}))
    command = parse(["--config", str(file)], "ablate.py", "")
    made = SweepRun(command.sweep, trials.trials_of(command.sweep))
    assert made.uri == store.default_uri(str(tmp_path / "results"))
    made.folder.mkdir(parents=True)
    made.open()
    tags = mlflow_client(made.uri).get_run(made.state.run_id).data.tags
    assert json.loads(tags["sweep.axes"]) == list(WEIGHTS)

    def fetch(images):
        assert images is not None
        return images

    monkeypatch.setattr(ray_cluster, "fetch", fetch)  # gets the images themselves
    return made


def run(sweep, index, prunes=False, stop_at=None, on_disk=False):
    """What a trial tells: its epochs, and its outcome. On disk, it finds the images itself."""
    config = sweep.trials[index].config
    spec = {
        "config": cfg.to_dict(config),
        "tags": sweep.tags()[sweep.trials[index].name],
        "uri": sweep.state.uri,
        "credentials": {},
        "methods": {},
        "data": "images",
        "prunes": prunes,
    }
    epochs, outcome = [], {}

    def report(epoch, metrics):
        if "outcome" in metrics:
            outcome.update(metrics)
            return
        epochs.append(epoch)
        if epoch == stop_at:
            raise SystemExit  # as Tune ends what its scheduler stops

    trials.run_trial(spec, {"images": None if on_disk else datasets.load(config.data, 0.1)}, report)
    return epochs, outcome


def runs(sweep):
    client = mlflow_client(sweep.state.uri)
    return {
        run.info.run_name: run
        for run in client.search_runs([client.get_experiment_by_name("study").experiment_id])
        if run.data.tags["kind"] == "trial"
    }


def epochs(sweep):
    """Trial -> its last metrics, without samples of the machine, which are not sent again."""
    found = runs(sweep).items()
    return {name: {key: run.data.metrics[key] for key in of_epochs(run.data.metrics)} for name, run in found}


def test_a_trial_tells_its_epochs_and_its_end_and_tells_them_again(sweep):
    assert run(sweep, 1) == ([1, 2], {"outcome": "finished", "reason": "completed"})
    lines = (sweep.trials[1].config.run_dir / "metrics.jsonl").read_text()
    assert run(sweep, 1) == ([1, 2], {"outcome": "finished", "reason": "completed"})
    assert (sweep.trials[1].config.run_dir / "metrics.jsonl").read_text() == lines
    (logged,) = runs(sweep).values()
    assert logged.data.tags["mlflow.parentRunId"] == sweep.state.run_id and logged.info.status == "FINISHED"
    # A trial that has all of its epochs is evaluated on test if it is asked for later, and told its epochs again.
    trial = dataclasses.replace(
        sweep.trials[1], config=cfg.replace(sweep.trials[1].config, {"evaluation.protocols": ("semi",)})
    )
    sweep.trials[1] = trial
    assert trial.is_trained(prunes=False) and not trial.is_done(prunes=False)
    assert run(sweep, 1) == ([1, 2], {"outcome": "finished", "reason": "completed"})
    assert trial.is_done(prunes=False) and trial.state().tested == ["semi"]
    assert reader.evaluations_of(sweep.uri, logged.info.run_id, "test").keys() == {"semi/1pct/top1", "semi/10pct/top1"}
    assert (sweep.trials[1].config.run_dir / "metrics.jsonl").read_text() == lines


def test_what_a_scheduler_stopped_goes_on_for_a_sweep_without_one(sweep):
    trial = sweep.trials[0]
    with pytest.raises(SystemExit):
        run(sweep, 0, prunes=True, stop_at=1)
    assert trial.state().status == "running" and sorted(journal.read(trial.config.run_dir)) == [1]
    sweep_run.close_trial(trial, "pruned", "stopped by asha after epoch 1", locked=False)
    assert trial.is_done(prunes=True) and not trial.is_done(prunes=False)
    (logged,) = runs(sweep).values()
    assert logged.info.status == "KILLED" and logged.data.tags["status_reason"] == "stopped by asha after epoch 1"
    assert run(sweep, 0, prunes=True) == ([1], {"outcome": "pruned", "reason": "stopped by asha after epoch 1"})
    assert run(sweep, 0) == ([1, 2], {"outcome": "finished", "reason": "completed"})
    assert [run.info.status for run in runs(sweep).values()] == ["FINISHED"]


def test_a_trial_that_another_process_runs_is_left_alone(sweep, monkeypatch):
    trial = sweep.trials[0]
    trial.config.run_dir.mkdir(parents=True)
    trial.state().write("running")
    before = (trial.config.run_dir / "run.json").read_bytes()
    monkeypatch.setattr(trials, "PATIENCE_S", 0)
    monkeypatch.setattr(sweep_run, "CLOSING_S", 0)
    with (trial.config.run_dir / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        epochs, outcome = run(sweep, 0)
        assert epochs == [] and outcome["outcome"] == "busy" and "another process" in outcome["reason"]
        assert "another process" in sweep_run.close_trial(trial, "failed", "it died", locked=True)
    assert (trial.config.run_dir / "run.json").read_bytes() == before


def test_what_goes_wrong_is_told_and_not_raised(sweep, monkeypatch):
    def broken(*_):
        raise RuntimeError("no room")

    monkeypatch.setattr(lifecycle, "_run_here", broken)
    assert run(sweep, 0) == ([], {"outcome": "failed", "reason": "RuntimeError: no room"})
    assert sweep.trials[0].state().status == "failed"
    assert [run.info.status for run in runs(sweep).values()] == ["FAILED"]


def test_a_store_that_is_away_when_a_trial_starts_costs_nothing(sweep, monkeypatch):
    def away(*_, **__):
        raise ConfigError("tracking.uri: nobody answers")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "open_run", away)
        assert run(sweep, 0) == ([1, 2], {"outcome": "finished", "reason": "completed"})
    assert runs(sweep) == {} and not sweep.trials[0].state().synced
    assert sweep.publish()
    ((name, logged),) = runs(sweep).items()
    assert name == sweep.trials[0].name and logged.info.status == "FINISHED" and logged.data.metrics["cost/epochs"] == 2
    assert logged.data.tags["mlflow.parentRunId"] == sweep.state.run_id


def test_a_trial_that_went_on_without_mlflow_is_sent_to_its_run(sweep):
    trial = sweep.trials[0]
    with pytest.raises(SystemExit):
        run(sweep, 0, stop_at=1)
    (before,) = runs(sweep).values()
    assert pretrain.pretrain(cfg.replace(trial.config, {"tracking.uri": "off"})) == 0
    assert trial.state().uri == "off" and sweep.publish()
    (after,) = runs(sweep).values()
    assert after.info.run_id == before.info.run_id and after.info.status == "FINISHED"
    assert (before.data.metrics["cost/epochs"], after.data.metrics["cost/epochs"]) == (1, 2)


def test_runs_that_mlflow_lost_are_sent_again(sweep, capsys):
    for index in range(2):
        assert run(sweep, index, on_disk=index == 1)[0] == [1, 2]
    assert ablate._conclude(sweep) == 0
    points = epochs(sweep)
    listed = json.loads((sweep.folder / "trials.json").read_text())
    assert sorted(listed) == sorted(run.info.run_id for run in runs(sweep).values())
    client = mlflow_client(sweep.state.uri)
    for run_id in listed:
        client.delete_run(run_id)
    client.delete_run(sweep.state.run_id)
    assert ablate._conclude(sweep) == 0
    assert epochs(sweep) == points and len(points) == 2
    assert not set(listed) & {run.info.run_id for run in runs(sweep).values()}
    assert "no report" not in capsys.readouterr().err


def test_a_second_sweep_of_the_same_trials_has_its_own_report(sweep):
    for index in range(2):
        run(sweep, index)
    assert ablate._conclude(sweep) == 0
    other = SweepRun(dataclasses.replace(sweep.sweep, name="other"), sweep.trials)
    other.folder.mkdir()
    assert ablate._conclude(other) == 0
    client, parent, second = mlflow_client(sweep.state.uri), sweep.state, other.state
    assert second.run_id not in (None, parent.run_id) and client.get_run(second.run_id).info.status == "FINISHED"
    assert {item.path for item in client.list_artifacts(second.run_id)} >= {"report", "trials.json"}
    assert {run.data.tags["mlflow.parentRunId"] for run in runs(sweep).values()} == {parent.run_id}


def test_a_run_whose_id_a_killed_start_could_not_note_is_found_again(tmp_path):
    uri, tags = store.default_uri(str(tmp_path)), {"run_dir": "/here", "kind": "trial"}

    def start(**more):
        return writer.open_run(uri, "study", "name", None, {"a": 1}, tags | more, tmp_path / "artifacts")

    first = start()
    assert start() == first  # nothing was written down, nothing was trained: it is the same one
    assert start(run_dir="/elsewhere") != first
    assert start(config_hash="other") != first  # parameters never change
    assert writer.Tracker(uri, first).sync({1: {"cost/epochs": 1.0}})
    assert start() != first  # with points it is somebody's, and a folder that was moved away starts anew


@contextlib.contextmanager
def without_a_cluster(tune, trials=1):
    """A sweep's start with a function in the place of what hands trials to Tune, and no cluster to be looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_tune, "run", tune)
        patch.setattr(ray_train, "load", lambda config: None)
        patch.setattr(ray_cluster, "connected", lambda config: contextlib.nullcontext(Workers(0, False, 1)))
        patch.setattr(ray_cluster, "nodes", lambda: [{"Resources": {"CPU": 2.0}}])
        for name in ("start_estimate", "check_nodes"):
            patch.setattr(preflight, name, lambda *_: None)
        patch.setattr(preflight, "estimated", lambda reference: [1.0] * trials)
        yield


def test_a_part_of_a_sweep_has_the_colours_of_the_whole(sweep):
    plain, rotated = (tags["mlflow.runColor"] for tags in sweep.tags().values())
    assert plain != rotated
    seen = {}
    with without_a_cluster(lambda work, *_: seen.update(work.specs[0]["tags"])):
        ablate._start(sweep, sweep.trials[1:], False)
    assert seen["mlflow.runColor"] == rotated


def test_a_trial_that_trained_on_while_it_was_judged_says_how_far_it_came(sweep):
    settings = dataclasses.replace(sweep.sweep.settings, scheduler="asha")
    asha = SweepRun(dataclasses.replace(sweep.sweep, settings=settings), sweep.trials)
    trials = {trial.name: trial for trial in sweep.trials}
    first = []

    def tune(work, slots, settings, scratch, watcher):
        trial = trials[work.specs[0]["config"]["tracking"]["run_name"]]
        first.append(trial)
        trial.config.run_dir.mkdir(parents=True)
        trial.state().write("running")
        book = journal.Journal(trial.config.run_dir)
        for epoch in (1, 2):
            book.append(epoch, {"cost/epochs": float(epoch)})
        watcher.on_epoch(0, {"epoch": 1})
        watcher.on_end(0, None)

    with without_a_cluster(tune, 2):
        ablate._start(asha, sweep.trials, False)
    record = first[0].state()
    assert (record.status, record.reason) == ("pruned", "stopped by asha after epoch 2")
