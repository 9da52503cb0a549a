"""The MLflow server as the manifests start it, on a real PostgreSQL: the same arguments, variables and file."""

import base64
import contextlib
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.cluster.files import output, without_login
from tests.cluster.kubernetes import built, one
from tests.conftest import free_port
from tests.programs import started, wait_for

pytestmark = pytest.mark.cluster
SECRETS = {
    ("rotssl-postgres", "password"): "of-postgres-1",
    ("rotssl-mlflow", "username"): "somebody",
    ("rotssl-mlflow", "password"): "of-mlflow-123456",
    ("rotssl-mlflow", "session-key"): "of-sessions-1",
}


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    """A PostgreSQL as its image makes one, and the variables that lead libpq to it."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install '.[server]'")
    pytest.importorskip("flask_wtf", reason="mlflow[auth] is not installed: pip install '.[server]'")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    programs = found[-1] if found else Path(shutil.which("initdb") or pytest.skip("PostgreSQL is not installed")).parent
    place = tmp_path_factory.mktemp("postgres")
    as_owner = []
    if os.geteuid() == 0:  # as which PostgreSQL refuses to run
        as_owner = ["runuser", "-u", "postgres", "--"]
        for folder in (place, *place.parents[:2]):
            folder.chmod(0o755)
        shutil.chown(place, "postgres")
    (place / "pw").write_text(SECRETS["rotssl-postgres", "password"])
    port, data = free_port(), place / "data"
    env = without_login()
    initdb = ["--auth=scram-sha-256", "--username=mlflow", f"--pwfile={place}/pw"]
    output(*as_owner, programs / "initdb", "-D", data, *initdb, env=env, cwd=place)
    control = [*as_owner, programs / "pg_ctl", "-D", data, "-w"]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={place}"
    subprocess.run([*control, "-o", options, "-l", place / "log", "start"], env=env, cwd=place, check=True)
    try:
        where = {"PGHOST": "127.0.0.1", "PGPORT": port}
        login = {"PGUSER": "mlflow", "PGPASSWORD": SECRETS["rotssl-postgres", "password"]}
        output(programs / "createdb", "mlflow", env=env | where | login)
        yield where
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], env=env, cwd=place, check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def server(postgres, tmp_path_factory):
    """Port of the server, and the hosts that it is told to allow."""
    place = tmp_path_factory.mktemp("mlflow")
    services = built("services")
    (container,) = one(services, "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    port, folder = free_port(), place / "artifacts"
    folder.mkdir()
    config = one(services, "ConfigMap", next(o["metadata"]["name"] for o in services if o["kind"] == "ConfigMap"))
    (place / "auth.ini").write_text(config["data"]["auth.ini"])
    env = {}
    for variable in container["env"]:
        secret = variable.get("valueFrom", {}).get("secretKeyRef")
        env[variable["name"]] = SECRETS[secret["name"], secret["key"]] if secret else variable["value"]
    env = without_login() | env | postgres | {"MLFLOW_AUTH_CONFIG_PATH": str(place / "auth.ini")}
    changed = {
        "--port=5000": f"--port={port}",
        "--artifacts-destination=/artifacts": f"--artifacts-destination={folder}",
    }
    assert changed.keys() <= set(container["args"])
    words = [changed.get(word, word).replace("--host=0.0.0.0", "--host=127.0.0.1") for word in container["args"]]
    probe = container["readinessProbe"]["httpGet"]["path"]
    command = [str(Path(sys.executable).with_name("mlflow")), *container["command"][1:], *words]
    if not Path(command[0]).exists():
        command[:1] = [sys.executable, "-m", "mlflow"]
    with started(command, place / "log", env | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}) as process:

        def healthy():
            with contextlib.suppress(OSError):
                return ask(port, probe, login=None)[0] == 200

        wait_for(healthy, process)
        yield port
        process.terminate()


def ask(port, path, login, host=None):
    """Status and body of a request; kubelet's have the pod's address as host."""
    headers = {"Host": host or f"10.1.2.3:{port}"}
    if login:
        headers["Authorization"] = "Basic " + base64.b64encode(":".join(login).encode()).decode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


EXPERIMENT = "/api/2.0/mlflow/experiments/get?experiment_id=0"
LOGIN = (SECRETS["rotssl-mlflow", "username"], SECRETS["rotssl-mlflow", "password"])


def test_the_server_knows_its_users_and_its_names(server):
    assert ask(server, EXPERIMENT, LOGIN, host="mlflow:5000")[0] == 200
    assert ask(server, EXPERIMENT, LOGIN, host="localhost:5000")[0] == 200
    assert ask(server, EXPERIMENT, None, host="mlflow:5000")[0] == 401
    assert ask(server, EXPERIMENT, (LOGIN[0], "another"), host="mlflow:5000")[0] == 401
    assert ask(server, EXPERIMENT, LOGIN, host="evil.example.com")[0] == 403


def test_runs_are_in_postgresql_and_their_files_behind_the_server(server, postgres, monkeypatch, tmp_path):
    import psycopg

    from tests.programs import mlflow_client

    for name, value in zip(("USERNAME", "PASSWORD"), LOGIN, strict=True):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    # By a name that the manifests allow; the port is that of the service, behind which this one stands.
    monkeypatch.setattr("requests.sessions.Session.request", _as_host("mlflow:5000"))
    client = mlflow_client(f"http://127.0.0.1:{server}")
    run = client.create_run(client.create_experiment("of a test")).info
    client.log_metric(run.run_id, "knn/top1", 0.5)
    (tmp_path / "views.txt").write_text("seen")
    client.log_artifact(run.run_id, str(tmp_path / "views.txt"))
    assert [file.path for file in client.list_artifacts(run.run_id)] == ["views.txt"]
    where = {"host": postgres["PGHOST"], "port": postgres["PGPORT"], "user": "mlflow", "dbname": "mlflow"}
    with psycopg.connect(**where, password=SECRETS["rotssl-postgres", "password"]) as database:
        assert database.execute("select value from metrics where run_uuid = %s", [run.run_id]).fetchall() == [(0.5,)]
        assert database.execute("select username from users").fetchall() == [(LOGIN[0],)]


def _as_host(host):
    import requests

    plain = requests.sessions.Session.request

    def request(self, method, url, **options):
        options["headers"] = {**(options.get("headers") or {}), "Host": host}
        return plain(self, method, url, **options)

    return request
