"""jobs/pretrain.py as a program: what it refuses, and the run without Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from rotssl import journal

ROOT = Path(__file__).parent.parent
trains = pytest.mark.jobs
SMALL = {
    "data.name": "synthetic",
    "data.limit": 128,
    "data.image_size": 16,
    "method.hidden_dim": 32,
    "method.out_dim": 16,
    "train.batch_size": 32,
    "train.epochs": 2,
}


def flags(fields, storage, run_name="run"):
    fields = {**fields, "storage.path": storage, "tracking.run_name": run_name}
    return [part for key, value in fields.items() for part in (f"--{key}", str(value))]


def job(*arguments, env=None, timeout=300):
    command = [sys.executable, str(ROOT / "jobs" / "pretrain.py"), *map(str, arguments)]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


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


BAD = [
    ("--tran.epochs 3", "tran.epochs"),
    ("--train.epochs three", "train.epochs"),
    ("--train.epochs 0", "train.epochs"),
    ("--train.epochs=-1", "train.epochs"),
    ("--optim.lr nan", "optim.lr"),
    ("--rotation.weight inf", "rotation.weight"),
    ("--method.name bjol", "'byol'"),
    ("--data.name imagefolder", "data.root"),
    ("--data.name imagefolder --data.root {}/nowhere", "nowhere"),
    ("--data.name imagefolder --data.root {}/empty", "empty/cat"),
    ("--data.name imagefolder --data.root {}/corrupt", "corrupt/dog/2.png"),
    ("--data.name cifar10 --data.root {}", "cifar-10-batches-py"),
    ("--train.batch_size 255 --scaling.num_workers 2", "train.batch_size"),
    ("--train.batch_size 100000", "train.batch_size"),
    ("--scaling.num_workers 500 --train.batch_size 4000 --rotation.weight 0", "scaling.num_workers"),
    (
        "--data.name synthetic --encoder.name timm/convnext_atto --rotation.mode extra --rotation.resolution 0.5",
        "resolution",
    ),
    ("--storage.path {}/file", "storage.path"),
    ("--storage.path s3://bucket/x", "storage.path"),
    ("--tracking.uri ftp://x", "tracking.uri"),
    ("--tracking.uri sqlite:///{}/no/such/folder/x.db", "tracking.uri"),
    ("--tracking.experiment a/b", "tracking.experiment"),
    ("--config {}/nowhere.yaml", "nowhere.yaml"),
    ("--config {}/binary.yaml", "binary.yaml"),
    ("--config {}/broken.yaml", "broken.yaml"),
    ("--config {}/unknown.yaml", "train.epoch"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD, ids=[arguments for arguments, _ in BAD])
def test_bad_input_is_one_line_and_code_2(folders, arguments, named):
    words = arguments.format(folders).split()
    if "--storage.path" not in words:
        words += ["--storage.path", str(folders / "results")]
    done = job(*words, env=os.environ | {"RAY_ADDRESS": "local"})
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


@trains
def test_without_ray_trains_exports_and_continues(tmp_path):
    import torch

    from rotssl.models.encoders import load_encoder

    command = [*flags(SMALL, tmp_path), "--scaling.num_workers", "0"]
    assert job(*command, "--train.stop_after", "1").returncode == 0
    done = job(*command)
    assert done.returncode == 0 and "kNN top-1 on validation" in done.stdout, done.stderr
    assert "epoch 2/2" in done.stderr and "epoch 1/2" not in done.stderr
    encoder, dim = load_encoder(tmp_path / "rotssl" / "run")
    assert encoder(torch.zeros(2, 3, 16, 16)).shape == (2, dim)


@trains
def test_a_second_start_of_the_same_run_is_refused(tmp_path):
    import fcntl

    folder = tmp_path / "rotssl" / "run"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = job(*flags(SMALL, tmp_path), "--scaling.num_workers", "0")
    assert done.returncode == 2 and "another process" in done.stderr


@trains
def test_dead_tracking_server_is_refused_at_the_start(tmp_path):
    done = job(*flags(SMALL, tmp_path), "--scaling.num_workers", "0", "--tracking.uri", "http://127.0.0.1:9")
    assert done.returncode == 2 and "tracking.uri" in done.stderr.splitlines()[-1]


def test_address_of_a_dead_cluster_is_refused_at_once(tmp_path):
    done = job(*flags(SMALL, tmp_path), env=os.environ | {"RAY_ADDRESS": "127.0.0.1:1"}, timeout=60)
    assert done.returncode == 2 and "RAY_ADDRESS" in done.stderr and len(done.stderr.splitlines()) == 1


@trains
def test_small_fraction_trains(tmp_path):
    # Fewer rotated images than the picture of the views has rows.
    done = job(*flags(SMALL, tmp_path), "--scaling.num_workers", "0", "--rotation.fraction", "0.1")
    assert done.returncode == 0 and (tmp_path / "rotssl" / "run" / "views.png").exists(), done.stderr


@trains
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_skipped_steps_leave_the_model_sound(tmp_path, precision):
    # Every gradient overflows: all steps are skipped, which is said in one line, and nothing else breaks.
    hard = ["--train.on_nan", "skip", "--optim.lr", "1e30", "--train.precision", precision, "--train.batch_size", "16"]
    done = job(*flags(SMALL, tmp_path), "--scaling.num_workers", "0", *hard)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr


@trains
def test_run_without_its_record_is_refused(tmp_path):
    command = [*flags(SMALL, tmp_path), "--scaling.num_workers", "0"]
    assert job(*command, "--train.stop_after", "1").returncode == 0
    (tmp_path / "rotssl" / "run" / "run.json").unlink()
    done = job(*command)
    assert done.returncode == 2 and "run.json" in done.stderr


@trains
def test_mlflow_catches_up_with_a_run_that_ended_without_it(tmp_path):
    from mlflow.tracking import MlflowClient

    command = [*flags(SMALL, tmp_path), "--scaling.num_workers", "0"]
    assert job(*command).returncode == 0
    record = tmp_path / "rotssl" / "run" / "run.json"
    content = json.loads(record.read_text())
    assert content["synced"]
    # As if the server had gone away after the first epoch: the run is open, and has one point.
    client = MlflowClient(content["uri"])
    experiment = client.get_experiment_by_name("rotssl").experiment_id
    run_id = client.create_run(experiment).info.run_id
    for key, value in journal.read(record.parent)[1].items():
        client.log_metric(run_id, key, value, step=1)
    record.write_text(json.dumps(content | {"run_id": run_id, "synced": False}))
    assert job(*command).returncode == 0
    assert [point.step for point in client.get_metric_history(run_id, "knn/top1")] == [1, 2]
    assert client.get_run(run_id).info.status == "FINISHED" and json.loads(record.read_text())["synced"]
    assert "encoder.safetensors" in {item.path for item in client.list_artifacts(run_id)}


@trains
def test_killed_in_mid_epoch_counts_the_lost_time(tmp_path):
    fields = {**SMALL, "data.limit": 1024, "train.epochs": 2}
    command = [
        sys.executable,
        str(ROOT / "jobs" / "pretrain.py"),
        *flags(fields, tmp_path),
        "--scaling.num_workers",
        "0",
    ]
    folder = tmp_path / "rotssl" / "run"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (folder / "unfinished").exists() or (folder / "unfinished").read_text().split()[1:2] in ([], ["0.0"]):
        assert process.poll() is None
    process.kill()
    process.wait()
    assert job(*command[2:]).returncode == 0
    assert journal.read(folder)[1]["cost/lost_seconds"] > 0
    assert not (folder / "unfinished").exists()
