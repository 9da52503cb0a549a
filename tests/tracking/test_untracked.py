"""tracking.uri off: runs without MLflow, and what a store gets that comes later."""

import json
import os
import shutil
import signal

import pytest
import yaml

from rotssl import config as cfg
from rotssl import lifecycle
from rotssl.commands import pretrain
from rotssl.commands.evaluate import evaluate
from rotssl.config import recipes
from rotssl.config.fields import ConfigError
from rotssl.data import datasets
from rotssl.runs import journal
from rotssl.tracking import store, untracked, writer
from tests.programs import SMALL, command, flags, job, mlflow_client, started, wait_for, with_store

trains = pytest.mark.contract
OFF = ["--scaling.num_workers", "0", "--tracking.uri", "off"]


def start(storage, uri, **fields):
    """A start of the run as jobs/pretrain.py does it; returns its configuration and the exit code."""
    folder = with_store(storage) if uri is None else storage
    fields = {**SMALL, "scaling.num_workers": 0, "storage.path": str(folder), "tracking.run_name": "run", **fields}
    config, _ = lifecycle.prepare(cfg.build({**fields, "tracking.uri": uri}))
    return config, pretrain.pretrain(config)


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


def runs(storage):
    """What the sqlite file below a storage path holds: for each run, its status, its epochs, and itself."""
    client = mlflow_client(f"sqlite:///{storage}/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("rotssl").experiment_id])
    steps = [[m.step for m in client.get_metric_history(run.info.run_id, "cost/epochs")] for run in found]
    return [(run.info.status, steps, run) for run, steps in zip(found, steps, strict=True)]


@pytest.fixture
def asked(monkeypatch):
    """The stores that anyone asked for."""
    seen = []

    def client_of(uri):
        seen.append(uri)
        raise RuntimeError("nobody answers")

    monkeypatch.setattr(writer, "client_of", client_of)
    return seen


@pytest.mark.system
def test_a_machine_without_mlflow_trains_stops_and_goes_on(tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    text = "from pathlib import Path\nPath(__file__).with_name('asked').touch()\nraise ImportError('no mlflow here')\n"
    (bare / "mlflow.py").write_text(text)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(bare), os.environ.get("PYTHONPATH", "")])}
    given = flags({**SMALL, "train.epochs": 20}, tmp_path)
    done = job(*given, "--scaling.num_workers", "0", env=env)  # with a store, it is missed
    assert done.returncode == 2 and "no mlflow here" in done.stderr.splitlines()[-1], done.stderr
    (bare / "asked").unlink()

    folder = tmp_path / "rotssl" / "run"
    with started(command("pretrain.py", *given, *OFF), tmp_path / "log", env) as process:
        wait_for(lambda: 1 in journal.read(folder), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 130, process.told()
    assert record_of(folder)["status"] == "interrupted"

    first, second = (job(*given, *OFF, env=env) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert second.stdout.splitlines()[0].endswith("is already finished:")
    for done in (first, second):
        assert "kNN top-1 on validation" in done.stdout and "MLflow" not in done.stdout
        assert done.stdout.splitlines()[-1] == f"metrics      {folder / 'metrics.jsonl'}"
    kept = record_of(folder)
    assert (kept["status"], kept["reason"], kept["uri"], kept["synced"]) == ("finished", "completed", "off", True)
    assert sorted(journal.read(folder)) == list(range(1, 21))
    for name in lifecycle.ARTIFACTS:
        assert (folder / name).exists(), name
    assert json.loads((folder / "tags.json").read_text()).keys() >= {"method", "git_commit", "world_size", "device"}
    assert (
        cfg.build(recipes.load_recipe(folder / "config.yaml")).tracking.uri == "off"
    )  # though YAML takes a bare off for false
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "log", "rotssl"]
    assert not (bare / "asked").exists()


def fails():
    return "no room"


def breaks():
    raise RuntimeError("no room")


def interrupted():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("body", "code", "status", "reason"),
    [
        (fails, 1, "failed", "no room"),
        (breaks, RuntimeError, "failed", "RuntimeError: no room"),
        (interrupted, 130, "interrupted", "interrupted"),
    ],
)
def test_how_a_run_ends_is_on_record_without_a_store(tmp_path, monkeypatch, asked, body, code, status, reason):
    monkeypatch.setattr(lifecycle, "_run_here", lambda *_: body())
    if isinstance(code, int):
        assert start(tmp_path, "off")[1] == code
    else:
        with pytest.raises(code, match="no room"):
            start(tmp_path, "off")
    kept = record_of(tmp_path / "rotssl" / "run")
    assert (kept["status"], kept["reason"], kept["run_id"]) == (status, reason, None) and asked == []


@trains
@pytest.mark.parametrize("finished", [False, True], ids=["cut short", "finished"])
def test_a_store_that_comes_later_gets_the_whole_run(tmp_path, finished):
    config, code = start(tmp_path / "there", "off", **{"train.stop_after": None if finished else 1})
    assert code == 0 and sorted(journal.read(config.run_dir)) == ([1, 2] if finished else [1])
    kept = untracked.kept_tags(config.run_dir)
    # What a machine without MLflow has trained is taken to one with it, in another folder.
    (config.run_dir / "tags.json").write_text(json.dumps(kept | {"world_size": "8"}))
    shutil.copytree(tmp_path / "there", tmp_path / "here")
    for _ in range(2):
        config, code = start(tmp_path / "here", None)
        ((status, steps, run),) = runs(tmp_path / "here")
        assert code == 0 and status == "FINISHED" and steps == [1, 2]
    tags = run.data.tags
    assert tags["run_dir"] == str(config.run_dir) and tags["status_reason"] == "completed"
    assert tags["device"] == kept["device"]
    assert tags["world_size"] == ("8" if finished else "1")  # as it was trained, in its last start
    client = mlflow_client(f"sqlite:///{tmp_path}/here/mlflow.db")
    assert {item.path for item in client.list_artifacts(run.info.run_id)} >= {"config.yaml", "encoder.safetensors"}
    assert record_of(config.run_dir)["run_id"] == run.info.run_id


@trains
@pytest.mark.parametrize("more", [{"train.stop_after": 2}, {}], ids=["cut short", "finished"])
def test_a_store_that_was_off_meanwhile_goes_on_with_its_run(tmp_path, more, capsys):
    three = {"train.epochs": 3}
    config, _ = start(tmp_path, None, **three, **{"train.stop_after": 1})
    run_id = record_of(config.run_dir)["run_id"]
    assert start(tmp_path, "off", **three, **more)[1] == 0
    kept = record_of(config.run_dir)
    assert (kept["uri"], kept["run_id"]) == ("off", run_id)
    assert runs(tmp_path)[0][1] == [1]
    capsys.readouterr()
    assert start(tmp_path, None, **three)[1] == 0
    assert "mlflow" in capsys.readouterr().out.splitlines()[-1]
    ((status, steps, run),) = runs(tmp_path)
    assert (status, steps, run.info.run_id) == ("FINISHED", [1, 2, 3], run_id)


@trains
def test_a_store_that_is_switched_off_is_not_asked_for_what_it_missed(tmp_path, asked):
    config, code = start(tmp_path, "off")
    missed = record_of(config.run_dir) | {"uri": "http://127.0.0.1:9", "run_id": "some", "synced": False}
    (config.run_dir / "run.json").write_text(json.dumps(missed))
    assert code == start(tmp_path, "off")[1] == 0 and asked == []
    assert start(tmp_path, "http://127.0.0.1:9")[1] == 0 and set(asked) == {"http://127.0.0.1:9"}


@trains
def test_the_test_split_is_measured_once_without_a_store_and_goes_to_one_that_comes_later(
    tmp_path, capsys, monkeypatch
):
    config, _ = start(tmp_path, "off")
    folder, file = str(config.run_dir), config.run_dir / "test.json"
    with monkeypatch.context() as patch:
        patch.setattr(writer, "client_of", None)  # nobody calls it
        capsys.readouterr()
        assert evaluate(None, folder, ("knn",), "") == 0
        first = capsys.readouterr().out
        assert "kNN top-1 on test" in first and "linear" not in first
        assert f"not recorded in MLflow, because the run is not; saved in {file}" in first
        assert evaluate(None, folder, ("linear", "knn"), "") == 0
        both = capsys.readouterr().out
        assert "already measured:" not in both and "linear probe top-1 on test" in both
    entries = json.loads(file.read_text())
    texts = [[key for key in entry["facts"] if key.endswith("_protocol")] for entry in entries]
    assert texts == [["knn_protocol"], ["linear_protocol"]]
    assert [entry["card"]["numbers"].keys() for entry in entries] == [{"knn/top1"}, {"linear/top1"}]
    for entry in entries:
        assert {path.name for path in (config.run_dir / "evaluation" / entry["folder"]).iterdir()} == {*entry["files"]}

    def measured_again(*_):
        raise AssertionError("the test split was read again")

    monkeypatch.setattr(datasets, "load_test", measured_again)
    assert evaluate(None, folder, ("linear", "knn"), "") == 0
    assert capsys.readouterr().out == "already measured:\n" + both
    assert start(tmp_path, None)[1] == 0
    for _ in range(2):
        capsys.readouterr()
        assert evaluate(None, folder, ("linear", "knn"), "") == 0
        shown = capsys.readouterr().out
        assert shown.startswith("already measured:\n") and "not recorded" not in shown
        children = [run for _, _, run in runs(tmp_path) if run.data.tags.get("kind") == "evaluation"]
        logged = sorted((sorted(run.data.params.items()), sorted(run.data.metrics.items())) for run in children)
        assert logged == sorted((sorted(e["facts"].items()), sorted(e["metrics"].items())) for e in entries)
        client = mlflow_client(f"sqlite:///{tmp_path}/mlflow.db")
        for run in children:
            assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"card.json", "hits.npz"}
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"test\.json cannot be read"):
        evaluate(None, folder, ("knn",), "")


def test_off_is_a_word_of_its_own():
    assert cfg.build({"tracking.uri": "off"}).tracking.uri == "off"
    assert cfg.build({"tracking.uri": "none"}).tracking.uri is None  # the default, as for all fields
    with pytest.raises(ConfigError, match=r"tracking\.uri: got False, expected 'off' or text"):
        cfg.build(cfg.flat_dict(yaml.safe_load("tracking: {uri: off}")))
    store.check_store("off", 3)  # a cluster of any size
    with pytest.raises(ConfigError, match="sqlite works on one machine only"):
        store.check_store("sqlite:///off", 3)
