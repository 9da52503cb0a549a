"""storage.path in an object store: runs, their evaluation and their report are those of a folder."""

import json
import math

import pytest

from rotssl import load_encoder
from rotssl.base import claims, paths
from rotssl.base.objects import ObjectPath
from rotssl.runs import checkpoint, journal
from tests.memory_store import Memory
from tests.programs import SMALL, flags

ADDRESS = "s3://bucket/prefix?endpoint_override=host:1"
LOCAL = {**SMALL, "train.epochs": 3, "scaling.num_workers": 0, "tracking.uri": "off"}


@pytest.fixture
def store(monkeypatch):
    """What the address leads to."""
    found, real = Memory("bucket/prefix"), paths.place

    def place(address):
        bucket, _, rest = address.partition("s3://bucket/")
        return real(address) if bucket else Memory(f"bucket/{rest.partition('?')[0]}", found.keys)

    monkeypatch.setattr(paths, "place", place)
    monkeypatch.setattr(claims, "EVERY_S", 0.05)
    monkeypatch.setattr(claims, "LOOK_S", 0.05)
    return found


@pytest.fixture
def top(store):
    return ObjectPath(store, "s3://bucket/prefix", "?endpoint_override=host:1")


def timeless(points):
    timed = ("seconds", "throughput", "memory")
    return {e: {k: v for k, v in p.items() if not any(word in k for word in timed)} for e, p in points.items()}


def test_a_run_in_an_object_store_is_that_in_a_folder(main, store, top, tmp_path):
    folder = top / "rotssl" / "run"
    assert main("pretrain.py", *flags(LOCAL, ADDRESS), "--train.stop_after", "1")[0] == 0
    assert sorted(journal.read(folder)) == [1]
    code, out, err = main("pretrain.py", *flags(LOCAL, ADDRESS))
    assert (code, "resuming after epoch 1" in err) == (0, True)
    assert f"checkpoint   {folder / 'epoch_00003'}\n" in out
    assert main("pretrain.py", *flags(LOCAL, tmp_path))[0] == 0
    local = tmp_path / "rotssl" / "run"
    assert timeless(journal.read(folder)) == timeless(journal.read(local))
    for name in ("encoder.safetensors", "encoder.json", "views.png", "hits.npz"):
        assert (folder / name).read_bytes() == (local / name).read_bytes(), name
    assert [path.name for path in checkpoint.found(folder)] == ["epoch_00003", "epoch_00002"]
    left = {path.name for path in local.iterdir()} - {".lock"}
    assert {entry.name for entry in folder.entries()} == left
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    assert load_encoder(str(folder)).dim == 96


def test_a_damaged_checkpoint_in_an_object_store_is_passed_over(main, store, top):
    folder, fields = top / "rotssl" / "run", {**LOCAL, "evaluation.linear": False}
    assert main("pretrain.py", *flags(fields, ADDRESS), "--train.stop_after", "2")[0] == 0
    key = "bucket/prefix/rotssl/run/epoch_00002/checkpoint.pt"
    content, changed = store.keys[key]
    store.keys[key] = content[: len(content) // 2], changed  # what an upload that was cut short may leave
    code, _, err = main("pretrain.py", *flags(fields, ADDRESS))
    assert (code, "resuming after epoch 1" in err, "epoch_00002" in err) == (0, True, True)
    assert sorted(journal.read(folder)) == [1, 2, 3]


def test_runs_in_an_object_store_are_listed_measured_taken_apart_and_compared(main, store, top, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    fields = {**LOCAL, "train.epochs": 2, "evaluation.linear": False, "tracking.uri": uri}
    assert main("pretrain.py", *flags(fields, ADDRESS))[0] == 0
    assert main("pretrain.py", *flags({**fields, "rotation.weight": 0.0}, ADDRESS, "plain"))[0] == 0
    code, out, _ = main("status.py", ADDRESS, "--json")
    assert code == 0
    assert [(each["run"], each["state"], each["epoch"]) for each in map(json.loads, out.splitlines())] == [
        ("plain", "finished", 2),
        ("run", "finished", 2),
    ]
    code, out, err = main("evaluate.py", "--checkpoint", str(top / "rotssl" / "run"))
    assert (code, "kNN top-1" in out) == (0, True), err
    assert main("evaluate.py", "--checkpoint", str(top / "rotssl" / "run"))[1].startswith("already measured")
    code, out, _ = main("replay.py", str(top / "rotssl" / "run"), "--step", "5")
    assert (code, "all numbers of this step are finite here" in out) == (0, True)
    report = top / "reports" / "first"
    code, out, err = main("compare.py", "--experiment", "rotssl", "--uri", uri, "--output", str(report))
    assert (code, f"page         {report / 'report.html'}\n" in out) == (0, True), err
    assert (report / "report.html").read_text().startswith("<!doctype html>")
    numbers = json.loads((report / "report.json").read_text())
    assert len(numbers["runs"]) == 2 and all(math.isfinite(run["final"]) for run in numbers["runs"])


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"tracking.uri": None}, "tracking.uri: no default with storage.path in an object store"),
        ({"storage.path": "s3://key:secret@bucket/prefix"}, "storage.path: got s3://bucket/prefix, expected no login"),
        ({"storage.path": "s3://"}, "storage.path: s3://: "),
        ({"storage.path": "hdfs://host/x"}, "storage.path: got 'hdfs://host/x', expected a folder shared by all nodes"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(main, store, monkeypatch, fields, words):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    given = {**LOCAL, "storage.path": ADDRESS, **fields}
    given = [part for key, value in given.items() if value is not None for part in (f"--{key}", str(value))]
    code, _, err = main("pretrain.py", *given)
    assert (code, words in err, "secret" in err, err.count("\n")) == (2, True, False, 1), err


def test_a_store_that_refuses_is_one_line(main, store, monkeypatch):
    def refuse(self):
        raise OSError("AWS Error ACCESS_DENIED during PutObject operation")

    monkeypatch.setattr(Memory, "_asked", refuse)
    code, _, err = main("pretrain.py", *flags(LOCAL, ADDRESS))
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("error: AWS Error ACCESS_DENIED during PutObject operation: s3://bucket/prefix/rotssl/run")
