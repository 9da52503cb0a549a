"""jobs/pretrain.py as a program: what it refuses, and the run without Ray."""

import fcntl
import json
import os
import signal

import pytest
import torch
from PIL import Image

from rotssl import config as cfg
from rotssl import lifecycle
from rotssl.commands import pretrain
from rotssl.config.fields import ConfigError
from rotssl.models import sides
from rotssl.models.encoders import read_encoder
from rotssl.runs import checkpoint, journal
from tests.programs import SMALL, command, flags, job, mlflow_client, started, wait_for, with_store

trains = pytest.mark.system
HERE = ("--scaling.num_workers", "0")


@pytest.fixture
def folders(tmp_path):
    """Places to point at: good and bad image folders, a file, recipes."""
    for name in ("empty/cat", "good/cat", "good/dog", "corrupt/cat", "corrupt/dog"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("good/cat", "good/dog", "corrupt/cat", "corrupt/dog"):
        for i in range(4):
            Image.new("RGB", (16, 16)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "corrupt" / "dog" / "2.png").write_bytes(b"not an image")
    (tmp_path / "file").write_text("x")
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "broken.yaml").write_text("train: {epochs: 3\n")
    (tmp_path / "unknown.yaml").write_text("train:\n  epoch: 3\n")
    return tmp_path


BAD = """
--tran.epochs 3 | tran.epochs
--train.epochs 0 | train.epochs
--train.epochs=-1 | train.epochs
--optim.lr nan | optim.lr
--rotation.weight inf | rotation.weight
--method.name bjol | 'byol'
--data.name imagefolder | data.root
--data.name imagefolder --data.root {}/nowhere | nowhere
--data.name imagefolder --data.root {}/empty | empty/cat
--data.name cifar10 --data.root {} | cifar-10-batches-py
--train.batch_size 255 --scaling.num_workers 2 | train.batch_size
--train.batch_size 100000 | train.batch_size
--data.name synthetic --encoder.name timm/convnext_atto --rotation.mode extra --rotation.resolution 0.5 | resolution
--storage.path {}/file | storage.path
--storage.path ftp://bucket/x | storage.path
--tracking.uri ftp://x | tracking.uri
--tracking.uri sqlite:///{}/no/such/folder/x.db | tracking.uri
--tracking.experiment a/b | tracking.experiment
--config {}/nowhere.yaml | nowhere.yaml
--config {}/binary.yaml | binary.yaml
--config {}/unknown.yaml | train.epoch
"""
# As a program each once: a flag, a recipe, data, and a cluster that is not there.
PROGRAM = """
--train.epochs three | train.epochs
--config {}/broken.yaml | broken.yaml
--data.name imagefolder --data.root {}/corrupt | corrupt/dog/2.png
--data.name synthetic | RAY_ADDRESS
"""


def split(line, folder):
    """Flags with a place to write to, and the word that the error names."""
    given, named = line.split(" | ")
    words = given.format(folder).split()
    return words if "--storage.path" in words else [*words, "--storage.path", str(folder / "results")], named


@pytest.mark.parametrize("line", BAD.strip().splitlines())
def test_bad_input_is_one_line_and_code_2(folders, main, line):
    words, named = split(line, folders)
    code, out, err = main("pretrain.py", *HERE, *words)
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and named in err, err
    assert not list(folders.glob("results/rotssl/*/run.json"))


@pytest.mark.contract
@pytest.mark.parametrize("line", PROGRAM.strip().splitlines())
def test_the_program_refuses_in_one_line_and_with_code_2(folders, line):
    words, named = split(line, folders)
    done = job(*words, env=os.environ | {"RAY_ADDRESS": "127.0.0.1:1"})
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and named in done.stderr and done.stdout == ""
    assert not list(folders.glob("results/rotssl/*/run.json"))


@trains
def test_dry_run_prints_configuration_and_cost_and_writes_nothing(tmp_path):
    done = job(*flags(SMALL, tmp_path / "out"), "--dry-run")
    assert done.returncode == 0 and "FLOPs" in done.stdout and "learned" not in done.stdout
    assert not (tmp_path / "out").exists()
    # What it prints is a recipe of the same run.
    (tmp_path / "again.yaml").write_text(done.stdout)
    assert job("--config", tmp_path / "again.yaml", "--print_config").stdout.strip() in done.stdout


def start(storage, **fields):
    """A start of a small run, in this process."""
    fields = {**SMALL, "scaling.num_workers": 0, "tracking.run_name": "run", **fields}
    fields["storage.path"] = str(with_store(storage))
    config, _ = lifecycle.prepare(cfg.build(fields))
    return pretrain.pretrain(config)


def test_a_second_start_of_the_same_run_is_refused(tmp_path):
    folder = tmp_path / "rotssl" / "run"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process"):
            start(tmp_path)


@pytest.mark.parametrize(
    ("encoder", "fields", "words"),
    [
        (
            "vit_tiny_patch16_224",
            {"data.image_size": 32, "views.size_start": 15},
            "encoder.patch_size: got 16.*views .15.",
        ),
        (
            "mixer_s32_224",
            {"data.image_size": 224, "views.size_start": 96},
            "views.size_start: got 96, .* of 96 pixels",
        ),
    ],
)
def test_an_encoder_that_does_not_take_the_first_views_is_refused_at_the_start(tmp_path, encoder, fields, words):
    with pytest.raises(ConfigError, match=f"^{words}"):
        start(tmp_path, **{"encoder.name": f"timm/{encoder}", **fields})


def test_an_encoder_is_asked_about_all_sides_of_views_that_a_run_has(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sides, "_objection", lambda encoder, whole, side: asked.append(side) or "")
    tasks = {"rotation.mode": "four_way", "rotation.crop_size": 20, "jigsaw.weight": 1, "views.local_count": 1}
    fields = {"encoder.name": "timm/resnet18", "data.image_size": 48, "views.local_size": 16, "views.size_start": 24}
    fields |= {"views.split": 2}
    lifecycle.prepare(cfg.build({**SMALL, **tasks, **fields}))
    # Global and local views, halves, the crop, and tiles of 0.85 of a third; each at the end and at the start.
    assert asked == [48, 16, 24, 20, 14, 24, 24, 8, 12, 10, 7]


def test_dead_tracking_server_is_refused_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match=r"^tracking\.uri: "):
        start(tmp_path, **{"tracking.uri": "http://127.0.0.1:9"})


@pytest.mark.contract
def test_a_run_whose_store_need_not_be_there_goes_on_and_is_sent_later(tmp_path, caplog, capsys):
    fields = {"tracking.required": False}
    assert start(tmp_path, **fields, **{"tracking.uri": "http://127.0.0.1:9"}) == 0
    (line,) = [record.getMessage() for record in caplog.records if "goes on without it" in record.getMessage()]
    assert line.startswith("tracking.uri: ")
    assert "metrics.jsonl" in capsys.readouterr().out
    assert start(tmp_path) == 0 and "already finished" in capsys.readouterr().out
    content = json.loads((tmp_path / "rotssl" / "run" / "run.json").read_text())
    assert content["synced"] and content["uri"].endswith("mlflow.db")
    history = mlflow_client(content["uri"]).get_metric_history(content["run_id"], "loss/total")
    assert [point.step for point in history] == [1, 2]


@pytest.mark.contract
def test_small_fraction_trains(tmp_path):
    # Fewer rotated images than the picture of the views has rows.
    assert start(tmp_path, **{"rotation.fraction": 0.1, "tracking.uri": "off"}) == 0
    assert (tmp_path / "rotssl" / "run" / "views.png").exists()


@pytest.mark.contract
@pytest.mark.parametrize("stopped", [False, True])
def test_the_status_is_saved_before_what_may_take_long(tmp_path, monkeypatch, stopped):
    seen = []

    def look(*_):
        seen.append(json.loads((tmp_path / "rotssl" / "run" / "run.json").read_text())["status"])

    def interrupted(*_):
        raise KeyboardInterrupt

    if stopped:
        monkeypatch.setattr(lifecycle, "_train", interrupted)
    monkeypatch.setattr(lifecycle.Follower, "__exit__", look)  # waits for the store
    monkeypatch.setattr(lifecycle, "save_convergence", look)
    code = start(tmp_path, **{"tracking.uri": "off"})
    assert (code, seen) == ((130, ["interrupted"]) if stopped else (0, ["running", "finished"]))


@pytest.mark.contract
def test_a_run_that_is_to_stop_says_so(tmp_path, capsys):
    assert start(tmp_path, **{"tracking.uri": "off", "train.stop_after": 1}) == 0
    assert "stopped after epoch 1 of 2" in capsys.readouterr().out


@pytest.mark.contract
def test_mlflow_catches_up_with_a_run_that_ended_without_it(tmp_path):
    assert start(tmp_path) == 0
    record = tmp_path / "rotssl" / "run" / "run.json"
    content = json.loads(record.read_text())
    assert content["synced"]
    # As if the server had gone away after the first epoch: the run is open, and has one point.
    client = mlflow_client(content["uri"])
    experiment = client.get_experiment_by_name("rotssl").experiment_id
    run_id = client.create_run(experiment).info.run_id
    for key, value in journal.read(record.parent)[1].items():
        client.log_metric(run_id, key, value, step=1)
    record.write_text(json.dumps(content | {"run_id": run_id, "synced": False}))
    assert start(tmp_path) == 0
    assert [point.step for point in client.get_metric_history(run_id, "knn/top1")] == [1, 2]
    assert client.get_run(run_id).info.status == "FINISHED" and json.loads(record.read_text())["synced"]
    assert "encoder.safetensors" in {item.path for item in client.list_artifacts(run_id)}


@trains
def test_without_ray_a_run_that_is_killed_in_mid_epoch_goes_on_and_exports(tmp_path):
    fields, folder = {**SMALL, "data.limit": 1024}, tmp_path / "rotssl" / "run"
    arguments = [*flags(fields, tmp_path), *HERE]

    def under_way():
        trained, note = journal.read(folder).get(1), folder / "trained_seconds"
        return trained is not None and float(note.read_text()) > trained["cost/train_seconds"]

    with started(command("pretrain.py", *arguments), tmp_path / "log") as process:
        wait_for(under_way, process)
        process.kill()
    assert 2 not in journal.read(folder)
    done = job(*arguments)
    assert done.returncode == 0 and "kNN top-1 on validation" in done.stdout, done.stderr
    assert "epoch 2/2" in done.stderr and "epoch 1/2" not in done.stderr
    assert journal.read(folder)[2]["cost/lost_seconds"] > 0
    encoder, dim = read_encoder(folder)
    assert encoder(torch.zeros(2, 3, 16, 16)).shape == (2, dim)


@trains
def test_a_run_whose_time_is_up_saves_its_state_within_the_epoch(tmp_path):
    # 460 steps an epoch, and a look at the file every 50.
    fields = {**SMALL, "data.limit": 2048, "train.batch_size": 4, "train.epochs": 1, "evaluation.linear": False}
    argv = [*flags(fields, tmp_path), *HERE, "--tracking.uri", "off"]
    folder = tmp_path / "rotssl" / "run"
    with started(command("pretrain.py", *argv), tmp_path / "log") as process:
        wait_for((folder / "trained_seconds").exists, process)
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGUSR1)
        assert process.wait() == 130, process.told()[-3000:]
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert 0 < checkpoint.within(folder)["within"]["step"] < 460  # test_midway.py shows that a run goes on from there
    assert not (folder / checkpoint.ASKED).exists()
