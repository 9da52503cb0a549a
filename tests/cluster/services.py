"""PostgreSQL, and MLflow's server on it as the manifests start it: the same arguments, variables and file, on this machine."""

import base64
import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.cluster.files import output, without_login
from tests.cluster.kubernetes import built, one
from tests.conftest import free_port
from tests.programs import started, wait_for

SECRETS = {
    ("rotssl-postgres", "password"): "of-postgres-1",
    ("rotssl-mlflow", "username"): "somebody",
    ("rotssl-mlflow", "password"): "of-mlflow-123456",
    ("rotssl-mlflow", "session-key"): "of-sessions-1",
}
LOGIN = (SECRETS["rotssl-mlflow", "username"], SECRETS["rotssl-mlflow", "password"])
EXPERIMENT = "/api/2.0/mlflow/experiments/get?experiment_id=0"


def missing():
    """Why there can be no such servers here; empty if there can."""
    for module, package in (("psycopg", "psycopg"), ("flask_wtf", "mlflow[auth]")):
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed: pip install '.[server]'"
    return "" if programs() else "PostgreSQL is not installed"


def programs():
    """The folder of PostgreSQL's programs, of the newest version; None without them."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    beside = shutil.which("initdb")
    return found[-1] if found else Path(beside).parent if beside else None


@dataclass
class Postgres:
    """A running PostgreSQL.

    Attributes:
        where: the variables that lead libpq to it, without a login.
    """

    where: dict[str, str]

    def connect(self):
        """A connection to MLflow's database."""
        import psycopg

        where = {"host": self.where["PGHOST"], "port": self.where["PGPORT"], "user": "mlflow", "dbname": "mlflow"}
        return psycopg.connect(**where, password=SECRETS["rotssl-postgres", "password"])

    def dump(self):
        """All that is in the database, as text."""
        login = {"PGUSER": "mlflow", "PGPASSWORD": SECRETS["rotssl-postgres", "password"]}
        return output(programs() / "pg_dump", "mlflow", env=without_login() | self.where | login)


@contextlib.contextmanager
def postgres():
    """A PostgreSQL as its image makes one."""
    with tempfile.TemporaryDirectory(prefix="rotssl-postgres-") as folder:  # pytest's own are for nobody else
        yield from _postgres(Path(folder))


def _postgres(place):
    as_owner = []
    if os.geteuid() == 0:  # as which PostgreSQL refuses to run
        as_owner = ["runuser", "-u", "postgres", "--"]
        shutil.chown(place, "postgres")
    (place / "pw").write_text(SECRETS["rotssl-postgres", "password"])
    port, data = free_port(), place / "data"
    env = without_login()
    initdb = ["--auth=scram-sha-256", "--username=mlflow", f"--pwfile={place}/pw"]
    output(*as_owner, programs() / "initdb", "-D", data, *initdb, env=env, cwd=place)
    control = [*as_owner, programs() / "pg_ctl", "-D", data, "-w"]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={place}"
    quiet = {"env": env, "cwd": place, "check": True, "stdout": subprocess.DEVNULL}
    subprocess.run([*control, "-o", options, "-l", place / "log", "start"], **quiet)
    try:
        where = {"PGHOST": "127.0.0.1", "PGPORT": port}
        login = {"PGUSER": "mlflow", "PGPASSWORD": SECRETS["rotssl-postgres", "password"]}
        output(programs() / "createdb", "mlflow", env=env | where | login)
        yield Postgres(where)
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], **quiet)


@dataclass
class Server:
    """A running server of MLflow.

    Attributes:
        port: on 127.0.0.1.
        folder: of its log and its artifacts.
        process: its first process.
    """

    port: str
    folder: Path
    process: subprocess.Popen
    uri: str = field(init=False)

    def __post_init__(self):
        self.uri = f"http://127.0.0.1:{self.port}"

    @property
    def login(self):
        """The variables with the login of its only user."""
        return {"MLFLOW_TRACKING_USERNAME": LOGIN[0], "MLFLOW_TRACKING_PASSWORD": LOGIN[1]}

    def ask(self, path, login, host=None):
        """Status and body of a request; kubelet's have the pod's address as host."""
        headers = {"Host": host or f"10.1.2.3:{self.port}"}
        if login:
            headers["Authorization"] = "Basic " + base64.b64encode(":".join(login).encode()).decode()
        request = urllib.request.Request(f"{self.uri}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@contextlib.contextmanager
def mlflow_server(database, place):
    """A server of MLflow on a Postgres, in a folder of its own."""
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
    env = without_login() | env | database.where | {"MLFLOW_AUTH_CONFIG_PATH": str(place / "auth.ini")}
    changed = {
        "--port=5000": f"--port={port}",
        "--artifacts-destination=/artifacts": f"--artifacts-destination={folder}",
    }
    assert changed.keys() <= set(container["args"])
    words = [changed.get(word, word).replace("--host=0.0.0.0", "--host=127.0.0.1") for word in container["args"]]
    # The port is not that of the service behind which the server stands in a cluster.
    words = [word.replace("127.0.0.1:5000", f"127.0.0.1:{port}") for word in words]
    probe = container["readinessProbe"]["httpGet"]["path"]
    command = [str(Path(sys.executable).with_name("mlflow")), *container["command"][1:], *words]
    if not Path(command[0]).exists():
        command[:1] = [sys.executable, "-m", "mlflow"]
    with started(command, place / "log", env | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}) as process:
        server = Server(port, place, process)

        def healthy():
            with contextlib.suppress(OSError):
                return server.ask(probe, login=None)[0] == 200

        wait_for(healthy, process)
        try:
            yield server
        finally:
            # mlflow starts uvicorn, which starts workers: none ends with the one above it.
            below = psutil.Process(process.pid).children(recursive=True)
            for each in (process, *below):
                with contextlib.suppress(psutil.NoSuchProcess):  # it has ended with the others
                    each.terminate()
            for each in psutil.wait_procs(below, timeout=30)[1]:
                each.kill()
            process.wait()
