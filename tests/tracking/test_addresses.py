"""Where runs are tracked: which address counts, logins that are shown nowhere, stores that were moved or are made by several."""

import base64
import http.server
import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rotssl import config as cfg
from rotssl import lifecycle
from rotssl.base.address import without_login
from rotssl.commands import pretrain, run_command, say
from rotssl.commands.evaluate import evaluate
from rotssl.config.fields import ConfigError
from rotssl.runs import journal
from rotssl.tracking import store, writer
from tests.programs import SMALL, flags, job, mlflow_client, with_store

pytestmark = pytest.mark.contract
HERE = ["--scaling.num_workers", "0", "--evaluation.linear", "false"]


def prepared(storage, **fields):
    fields = {**SMALL, "scaling.num_workers": 0, "tracking.run_name": "run", **fields}
    return lifecycle.prepare(cfg.build({**fields, "storage.path": str(storage)}))[0]


def start(storage, **fields):
    return pretrain.pretrain(prepared(with_store(storage), **fields))


def logged(uri, experiment="rotssl"):
    client = mlflow_client(uri)
    return client, client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


# --- logins --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_login(monkeypatch):
    """What a test puts into the environment is gone after it."""
    for key in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(key, "")


def test_an_address_without_its_login(capsys):
    for given, shown in (
        ("http://alice:s3cret@host:5000/x", "http://host:5000/x"),
        ("error at https://a:p@ss@host, twice http://b@c", "error at https://host, twice http://c"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        ("http://host/a@b", "http://host/a@b"),
    ):
        assert without_login(given) == shown
    text = "at http://alice:s3cret@host"
    say(text)
    with pytest.raises(SystemExit):
        run_command(lambda: logging.getLogger("rotssl").warning(text) or 0)
    assert capsys.readouterr().err == "at http://host\nwarning: at http://host\n"
    assert store.short(OSError(text)) == "OSError: at http://host"


@pytest.fixture
def server():
    """A server that refuses everything, and the headers of its requests."""
    seen = []

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers["Authorization"])
            self.send_response(401)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_):
            """Print nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made.server_port, seen
        made.shutdown()
        thread.join()


def test_a_login_is_used_and_not_shown_in_an_error(tmp_path, main, server, monkeypatch, no_login):
    port, seen = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://alice:s%23cret@127.0.0.1:{port}")
    code, out, err = main("pretrain.py", *flags(SMALL, tmp_path), *HERE)
    assert code == 2 and "tracking.uri: http://127.0.0.1" in err and "cret" not in out + err
    assert seen and set(seen) == {f"Basic {base64.b64encode(b'alice:s#cret').decode()}"}


def test_a_login_in_an_address_that_is_given_is_refused_and_not_shown(tmp_path, main, no_login):
    for uri in ("http://alice:s3cret@host", "ftp://alice:s3cret@host", "postgresql://alice:s3cret@host/db"):
        code, out, err = main("pretrain.py", *flags(SMALL, tmp_path), *HERE, "--tracking.uri", uri)
        assert code == 2 and err.startswith("error: tracking.uri: got ") and "s3cret" not in out + err
        assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in err
    code, out, err = main("pretrain.py", "http://alice:s3cret@host")
    assert code == 2 and "s3cret" not in out + err
    code, out, err = main("compare.py", "--experiment", "x", "--uri", "http://alice:s3cret@host")
    assert code == 2 and "--uri" in err and "s3cret" not in out + err
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("tracking: {uri: 'http://alice:s3cret@host'}\ngrid: {rotation.weight: [0, 1]}\n")
    code, out, err = main("ablate.py", "--config", str(sweep))
    assert code == 2 and "tracking.uri" in err and "s3cret" not in out + err


def test_a_login_is_in_no_file_of_a_run_and_in_no_store(tmp_path, monkeypatch, no_login, capsys):
    behind, client_of = f"sqlite:///{with_store(tmp_path)}/mlflow.db", store.client_of

    def server(uri, create=False):
        assert uri == "http://host:5000"
        return client_of(behind, create)

    monkeypatch.setattr(writer, "client_of", server)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://alice:s3cret@host:5000")
    for name in ("AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_KEY", "MLFLOW_TRACKING_TOKEN", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, f"s3cret-{name}")
    config = prepared(tmp_path)
    assert pretrain.pretrain(config) == 0 and pretrain.pretrain(prepared(tmp_path)) == 0
    shown = capsys.readouterr()
    assert "s3cret" not in shown.out + shown.err and "MLflow       http://host:5000" in shown.out
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"run.json", "config.yaml", "checkpoint.pt", "mlflow.db"} <= {path.name for path in files}
    assert [path for path in files if b"s3cret" in path.read_bytes()] == []
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("alice", "s3cret")
    record = config.run_dir / "run.json"  # of an earlier version
    record.write_text(record.read_text().replace("http://", "http://alice:s3cret@"))
    assert lifecycle.Run(config).state.uri == "http://host:5000"


# --- which address -------------------------------------------------------------------------------------------------------------


def test_the_environment_names_the_store_unless_the_configuration_does(tmp_path, monkeypatch, capsys):
    server, other = (f"sqlite:///{with_store(tmp_path / name)}/mlflow.db" for name in ("server", "other"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    assert start(tmp_path / "a") == 0
    _, (run,) = logged(server)
    assert run.info.status == "FINISHED" and "not used" not in capsys.readouterr().err
    said = []
    config, _ = lifecycle.prepare(cfg.build({**SMALL, "tracking.uri": other}), say=said.append)
    assert config.tracking.uri == other and said == [
        f"MLFLOW_TRACKING_URI ({server}) is not used: tracking.uri is {other}"
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///server/mlflow.db")
    assert prepared(tmp_path).tracking.uri == server
    for wrong in ("databricks", "off", "sqlite:///no/such/folder/x.db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", wrong)
        with pytest.raises(ConfigError, match=r"^MLFLOW_TRACKING_URI: "):
            prepared(tmp_path)


# --- one store, several processes ----------------------------------------------------------------------------------------------


@pytest.mark.system
@pytest.mark.parametrize("names", [("rotssl",) * 3, ("a", "b", "c")], ids=["one experiment", "three"])
def test_runs_that_start_at_once_on_a_new_store_all_end(tmp_path, names):
    """Three processes that have imported everything create one store at the same moment."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    code = (
        "import sys, time, pathlib, mlflow.store.tracking.sqlalchemy_store\n"
        "from rotssl.tracking import writer\n"
        "uri, name, seed, gate = sys.argv[1:]\n"
        "pathlib.Path(f'{gate}.{seed}').touch()\n"
        "while not pathlib.Path(gate).exists(): time.sleep(0.001)\n"
        "print(writer.open_run(uri, name, f'run{seed}', None, {'seed': seed}, {}, pathlib.Path(gate).parent / 'art'))\n"
    )
    gate = tmp_path / "gate"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, uri, name, str(seed), str(gate)], stderr=subprocess.PIPE, text=True
        )
        for seed, name in enumerate(names)
    ]
    while not all(Path(f"{gate}.{seed}").exists() for seed in range(3)):
        assert all(process.poll() is None for process in started)
    gate.touch()
    told = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], told
    runs = [run for name in dict.fromkeys(names) for run in logged(uri, name)[1]]
    assert sorted(run.data.params["seed"] for run in runs) == ["0", "1", "2"]


# --- artifacts, moved folders ---------------------------------------------------------------------------------------------------


def test_a_run_whose_artifacts_cannot_be_kept_is_ended_in_mlflow(tmp_path, caplog):
    uri = f"sqlite:///{with_store(tmp_path)}/mlflow.db"
    mlflow_client(uri).create_experiment(
        "rotssl", artifact_location="s3://bucket/x"
    )  # without boto3, or without access
    assert start(tmp_path) == 0
    _, (run,) = logged(uri)
    assert run.info.status == "FINISHED" and run.data.tags["status_reason"] == "completed"
    assert "could not copy" in caplog.text and "it stays in the run's folder" in caplog.text


@pytest.mark.system
def test_results_that_were_moved_are_evaluated_and_resumed_in_their_store(tmp_path):
    """Resumed by programs: in one process, MLflow remembers where the artifacts of a run were."""
    old, new, newest = tmp_path / "old place", tmp_path / "new", tmp_path / "newest"
    assert start(old, **{"train.stop_after": 1, "evaluation.linear": False}) == 0
    old.rename(new)
    done = job(*flags(SMALL, new), *HERE)
    assert (done.returncode, "warning" in done.stderr) == (0, False), done.stderr
    client, (run,) = logged(f"sqlite:///{new}/mlflow.db")
    assert run.info.status == "FINISHED" and run.data.tags["run_dir"] == str(new / "rotssl" / "run")
    assert [point.step for point in client.get_metric_history(run.info.run_id, "loss/total")] == [1, 2]
    assert (new / "mlartifacts" / "rotssl" / run.info.run_id / "artifacts" / "encoder.json").exists()
    new.rename(newest)
    assert evaluate(None, str(newest / "rotssl" / "run"), ("knn",), "") == 0
    assert evaluate(run.info.run_id, None, ("linear",), f"sqlite:///{newest}/mlflow.db") == 0
    done = job(*flags(SMALL, newest), *HERE)  # finished
    assert (done.returncode, str(newest / "mlflow.db") in done.stdout) == (0, True), done.stderr
    assert not old.exists() and not new.exists()
    client, runs = logged(f"sqlite:///{newest}/mlflow.db")
    assert len(runs) == 3  # the run and two evaluations
    assert "encoder.json" in {item.path for item in client.list_artifacts(run.info.run_id)}


@pytest.mark.parametrize("others", [False, True])
def test_a_run_without_its_store_says_so_and_makes_no_empty_one(tmp_path, others):
    old, new = tmp_path / "old", tmp_path / "new"
    assert start(old) == 0
    shutil.copytree(old / "rotssl", new / "rotssl")
    shutil.rmtree(old)
    with pytest.raises(FileNotFoundError, match="the store is not there any more"):
        store.client_of(f"sqlite:///{old}/mlflow.db")
    with pytest.raises(ConfigError, match=r"the store of .* is not there any more"):
        evaluate(None, str(new / "rotssl" / "run"), ("knn",), "")
    if others:
        with_store(new)  # of other runs
        with pytest.raises(
            ConfigError, match=r"does not have the run .*; the command that trained it, started again, sends"
        ):
            evaluate(None, str(new / "rotssl" / "run"), ("knn",), "")
    assert pretrain.pretrain(prepared(new)) == 0  # finished: sent to the store of its new place
    assert not old.exists() and len(journal.read(new / "rotssl" / "run")) == 2
    _, (run,) = logged(f"sqlite:///{new}/mlflow.db")
    assert run.info.status == "FINISHED" and run.data.metrics["cost/epochs"] == 2
    assert evaluate(None, str(new / "rotssl" / "run"), ("knn",), "") == 0


def test_a_store_of_another_storage_keeps_its_artifacts(tmp_path):
    """Two storage.paths share a store: the experiment's artifacts stay with the first, which is not gone."""
    shared = f"sqlite:///{with_store(tmp_path / 'b')}/mlflow.db"
    assert start(tmp_path / "a", **{"tracking.uri": shared}) == 0
    shutil.rmtree(tmp_path / "a" / "mlartifacts")
    assert start(tmp_path / "b", **{"tracking.run_name": "other"}) == 0
    client = mlflow_client(shared)
    place = client.get_experiment_by_name("rotssl").artifact_location
    assert place == (tmp_path / "a" / "mlartifacts" / "rotssl").as_uri()


def test_images_that_were_moved_are_named_and_can_be_given(tmp_path, capsys):
    from PIL import Image

    for split in ("train", "val", "test"):
        for i in range(80):
            file = tmp_path / "images" / split / f"class{i % 2}" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (i, 3 * i, 100)).save(file)
    fields = {"data.name": "imagefolder", "data.limit": None, "train.epochs": 1, "tracking.uri": "off"}
    assert start(tmp_path / "results", **fields, **{"data.root": str(tmp_path / "images")}) == 0
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    folder = str(tmp_path / "results" / "rotssl" / "run")
    with pytest.raises(
        ConfigError, match=r"^data\.root: .* is not there any more; give the images' new place: --data\.root DIR"
    ):
        evaluate(None, folder, ("knn",), "")
    kept = tmp_path / "elsewhere" / "train" / "class1" / "1.png"
    kept.rename(tmp_path / "1.png")
    with pytest.raises(ConfigError, match=r"^data\.root: the run was trained on other images: 1 image was removed$"):
        evaluate(None, folder, ("knn",), "", str(tmp_path / "elsewhere"))
    (tmp_path / "1.png").rename(kept)
    assert evaluate(None, folder, ("knn",), "", str(tmp_path / "elsewhere")) == 0


def test_a_path_that_is_no_text_is_one_line(tmp_path, capsys):
    broken = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    os.makedirs(broken)
    for key in ("data.root", "storage.path", "data.cache"):
        with pytest.raises(SystemExit) as ended:
            run_command(lambda key=key: start(tmp_path, **{key: broken}) if key != "storage.path" else start(broken))
        err = capsys.readouterr().err
        assert ended.value.code == 2 and err.count("\n") == 1 and err.startswith(f"error: {key}: got "), err
    assert not list(Path(tmp_path).glob("rotssl"))
