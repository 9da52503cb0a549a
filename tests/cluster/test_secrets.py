"""Secrets in the environment of a cluster's nodes: a run, a sweep and a comparison with logins leave none of them anywhere."""

import base64
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.cluster.services import LOGIN
from tests.conftest import two_nodes
from tests.programs import SMALL, flags, job
from tests.runtimes.test_ray_train import submit

pytestmark = [pytest.mark.cluster, pytest.mark.system, pytest.mark.timeout(600)]
# None is used by anything here but the login, which is the server's own and in the address, as users write it.
PLANTED = (
    *("MLFLOW_TRACKING_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_KEY"),
    *("AZURE_STORAGE_CONNECTION_STRING", "PGPASSWORD", "WANDB_API_KEY", "HF_TOKEN", "RCLONE_CONFIG_PASS"),
)
SWEEP = {
    "sweep": {"seeds": 1},
    "grid": {"rotation.weight": [0, 1.0]},
    "data": {"name": "fashion-mnist-sample", "limit": 256},
    "method": {"name": "byol", "hidden_dim": 32, "out_dim": 16},
    "train": {"batch_size": 64, "epochs": 1},
}


def contents(name, data):
    """A file's bytes, and those of all files in it: checkpoints are zip files, so are NumPy's, logs may be compressed."""
    yield name, data
    if data[:2] == b"\x1f\x8b":
        yield from contents(f"{name}:unpacked", gzip.decompress(data))
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as files:
            for member in files.namelist():
                yield from contents(f"{name}:{member}", files.read(member))


def files_in(folder):
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield from contents(str(path), path.read_bytes())


def finds(secrets, places):
    """Which secret is where."""
    words = {(name, form.encode()) for name, value in secrets.items() for form in {value, json.dumps(value)[1:-1]}}
    # As it is sent.
    words.add(("the login", base64.b64encode(":".join(LOGIN).encode())))
    return sorted({(name, where) for where, data in places for name, word in words if word in data})


@pytest.fixture(scope="module")
def planted(server, tmp_path_factory):
    """What there is to find, by name: all of it is in the environment of this process, from which the nodes have theirs."""
    secrets = {name: f"planted-{name.lower()}-{os.urandom(8).hex()}" for name in PLANTED}
    account = tmp_path_factory.mktemp("account") / "key.json"
    secrets["GOOGLE_APPLICATION_CREDENTIALS"] = f"planted-private-key-{os.urandom(8).hex()}"
    account.write_text(
        json.dumps({"type": "service_account", "private_key": secrets["GOOGLE_APPLICATION_CREDENTIALS"]})
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in secrets.items():
            patch.setenv(name, value)
        patch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(account))
        login = ":".join(urllib.parse.quote(word, safe="") for word in LOGIN)
        patch.setenv("MLFLOW_TRACKING_URI", server.uri.replace("://", f"://{login}@"))
        yield secrets | {"the password": LOGIN[1]}


@pytest.fixture(scope="module")
def nodes(planted, tmp_path_factory):
    """Ray of two nodes that have the secrets; all that it writes is in these folders."""
    state = tmp_path_factory.mktemp("state") / "rays"
    # The paths of Ray's sockets have to be short.
    scratch = Path(tempfile.mkdtemp(prefix="s"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(scratch))
        try:
            with two_nodes(state) as env:
                token = Path(env["RAY_AUTH_TOKEN_PATH"])
                planted["ray's token"] = token.read_text()
                yield env, lambda: [place for place in (*files_in(scratch), *files_in(state)) if place[0] != str(token)]
        finally:
            shutil.rmtree(scratch)


def test_no_secret_is_in_a_file_a_table_or_a_line_but_what_a_job_is_given_is_in_rays_record(
    nodes, planted, server, database, tmp_path
):
    """The last as SECURITY.md says: what is in the runtime environment of a job is in Ray's own record of it."""
    env, of_ray = nodes
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    storage = tmp_path / "storage"
    run = [*flags(SMALL, storage, "submitted")]
    given = {"the given key": f"planted-given-{os.urandom(8).hex()}"}
    options = ("--runtime-env-json", json.dumps({"env_vars": {"AWS_SECRET_ACCESS_KEY": given["the given key"]}}))
    told = {}
    for name, more, words in (
        ("run", options, ["python", "jobs/pretrain.py", *run]),
        ("sweep", (), ["python", "jobs/ablate.py", "--config", tmp_path / "sweep.yaml", "--storage.path", storage]),
    ):
        done = submit(env, *map(str, words), options=more)
        told[name] = done.stdout + done.stderr
        assert done.returncode == 0, told[name][-3000:]
    for name, *words in (
        ("evaluate", "--checkpoint", storage / "rotssl" / "submitted"),
        ("compare", "--experiment", "sweep", "--output", tmp_path / "report"),
    ):
        done = job(*words, script=f"{name}.py")
        told[name] = done.stdout + done.stderr
        assert done.returncode == 0, told[name][-3000:]
    dump = database.dump()
    # All of it was at work, and all of it is looked through.
    assert f"MLflow       {server.uri}" in told["run"] and "2 finished" in told["sweep"]
    assert "submitted" in dump and "rotation.weight=" in dump and (tmp_path / "report" / "report.html").exists()
    rays = of_ray()
    ours = [
        *files_in(tmp_path),
        *files_in(server.folder),
        *((f"what {name} printed", text.encode()) for name, text in told.items()),
        ("PostgreSQL", dump.encode()),
    ]
    names = " ".join(name for name, _ in (*ours, *rays))
    for part in ("checkpoint.pt:", "hits.npz:", "run.json", "encoder.json", "job-driver-", "raylet.out", "head.log"):
        assert part in names, part
    assert finds(planted, [*ours, *rays]) == [] == finds(given, ours)
    assert {Path(where).name for _, where in finds(given, rays)} == {"runtime_env_agent.log"}
    listed = subprocess.run(
        [Path(sys.executable).with_name("ray"), "job", "list"],
        env=env | {"RAY_ADDRESS": f"http://127.0.0.1:{env['DASHBOARD_PORT']}"},
        capture_output=True,
        text=True,
    )
    assert given["the given key"] in listed.stdout
