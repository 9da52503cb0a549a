"""Ray on two hosts, with a token, a job server and a server of MLflow on the first; jobs are submitted from the third."""

import secrets

from tests.cluster.hosts import address
from tests.programs import ROOT, wait_for

GCS, JOBS, MLFLOW = 6379, 8265, 5000
COMMON = ("--object-store-memory=300000000", "--disable-usage-stats", "--block")


class Rays:
    """A Ray cluster on ``head`` and ``worker``, from entering the body to its end.

    Args:
        hosts: ``Hosts``, which are up.
        cpus: of each node.
    """

    def __init__(self, hosts, cpus=1):
        self.hosts, self.cpus = hosts, cpus
        self.shared = hosts.folder / "shared"  # the folder that all nodes see
        self.token = hosts.folder / "token"
        self.env = {
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # a node that is told to end would wait half a minute
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "TMPDIR": str(hosts.scratch),  # no node sees what another writes there
            "RAY_TMPDIR": "/tmp",  # or sockets would have names that are too long
        }
        self.nodes = {}
        self.mlflow = f"http://{address('head')}:{MLFLOW}"
        self.jobs = f"http://{address('head')}:{JOBS}"

    def __enter__(self):
        self.shared.mkdir(exist_ok=True)
        self.token.touch(mode=0o600)
        self.token.write_text(secrets.token_hex(32))
        self.start_node("head")
        self.start_node("worker")
        self.start_mlflow()
        return self

    def __exit__(self, *_):
        for program in (*self.nodes.values(), self.server):
            program.end(patience=5)  # nothing of theirs is needed any more

    def start_node(self, host):
        """Start Ray on ``head`` or ``worker``, also after it ended there."""
        where = f"{address('head')}:{GCS}"
        role = ["--head", f"--port={GCS}", f"--dashboard-host={address('head')}"]
        role = role if host == "head" else [f"--address={where}"]
        command = ["ray", "start", *role, f"--node-ip-address={address(host)}", f"--num-cpus={self.cpus}", *COMMON]
        for attempt in (1, 2, 3):  # Ray gives a node 30 seconds to start, which a busy machine may exceed
            node = self.nodes[host] = self.hosts.start(host, "ray", command, self.env)
            try:
                wait_for(lambda node=node: "Ray runtime started" in node.told(), node)
                return
            except AssertionError:
                if attempt == 3:
                    raise

    def start_mlflow(self):
        """Start MLflow's server on the head, also after it ended; it keeps its runs in ``shared``."""
        store = ["--backend-store-uri", f"sqlite:///{self.shared}/server.db"]
        files = ["--artifacts-destination", self.shared / "artifacts"]
        command = ["mlflow", "server", "--host", address("head"), "--port", MLFLOW, "--workers", 1, *store, *files]
        self.server = self.hosts.start("head", "mlflow", command, {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})
        wait_for(lambda: "startup complete" in self.server.told(), self.server)

    def job(self, *arguments, check=True):
        """Run ``ray job`` on the client; returns its output."""
        done = self.hosts.run("client", ["ray", "job", *arguments], self.env | {"RAY_ADDRESS": self.jobs}, check=check)
        return done.stdout + done.stderr

    def submit(self, name, *arguments, script="pretrain.py", options=()):
        """Submit a job of this checkout without waiting for it; returns its id, which is the name."""
        command = ["python", f"jobs/{script}", *arguments]
        self.job("submit", "--no-wait", "--submission-id", name, "--working-dir", ROOT, *options, "--", *command)
        return name

    def logs(self, name):
        """What a job has printed so far."""
        return self.job("logs", name)

    def status(self, name):
        """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
        told = self.job("status", name, check=False)
        return next(word for word in ("PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED") if word in told.upper())

    def wait(self, name):
        """Wait until a job ends; returns its status."""
        self.job("logs", "--follow", name, check=False)
        return self.status(name)

    def stop(self, name):
        self.job("stop", name)
