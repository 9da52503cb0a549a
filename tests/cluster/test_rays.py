"""Ray on two hosts and jobs from a third: what they train and show, links that are cut, and a host that goes."""

import contextlib
import json
import re
import sqlite3
import time

import pytest

from rotssl.runs import journal
from tests.cluster.hosts import address
from tests.cluster.rays import Rays
from tests.programs import SMALL, flags

pytestmark = [pytest.mark.cluster, pytest.mark.system]
AFTER_A_MEND_S = 60
ASK = """
import sys
from mlflow.tracking import MlflowClient
client = MlflowClient()
experiment = client.get_experiment_by_name("rotssl").experiment_id
(run,) = client.search_runs([experiment], "attributes.run_name = 'first'")
steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss/total")]
machines = sorted({name.split("/")[1] for name in run.data.metrics if name.startswith("system/")})
print(run.info.run_name, run.info.status, run.data.tags["world_size"], *steps, *machines)
"""


@pytest.fixture(scope="module")
def rays(hosts):
    """Ray on two of the hosts; a test that ends a node starts it again."""
    with Rays(hosts) as up:
        yield up


def test_a_job_of_a_third_host_trains_on_two_others(rays):
    fields = {**SMALL, "tracking.uri": rays.mlflow, "tracking.system_seconds": 0.2}
    job = rays.submit("first", *flags(fields, rays.shared / "results", "first"))
    assert rays.wait(job) == "SUCCEEDED", rays.logs(job)
    told = rays.hosts.run("client", ["python", "-c", ASK], {"MLFLOW_TRACKING_URI": rays.mlflow}).stdout.split()
    assert told == ["first", "FINISHED", "2", "1", "2", "node_0", "node_1"]
    rays.token.rename(rays.token.with_suffix(".away"))
    try:
        assert "first" not in rays.job("list", check=False)  # not without the token
    finally:
        rays.token.with_suffix(".away").rename(rays.token)
    assert "first" in rays.job("list")


def test_hosts_whose_names_lead_to_themselves_find_each_other(rays):
    """Debian writes a host's own name at 127.0.1.1 into /etc/hosts; gloo would listen there."""
    files = {host: rays.hosts.folder / host / "hosts" for host in ("head", "worker")}
    before = {host: file.read_text() for host, file in files.items()}
    try:
        for host, file in files.items():  # in place: the host sees this very file
            file.write_text(before[host].replace(f"{address(host)} {host}", f"127.0.1.1 {host}"))
            assert "127.0.1.1" in rays.hosts.run(host, ["getent", "hosts", host]).stdout
        fields = {**SMALL, "scaling.num_workers": 2, "tracking.uri": "off"}
        job = rays.submit("loopback", *flags(fields, rays.shared / "results", "loopback"))
        assert rays.wait(job) == "SUCCEEDED", rays.logs(job)
    finally:
        for host, file in files.items():
            file.write_text(before[host])


class Job:
    """A run as a job, which trains until it is stopped."""

    def __init__(self, rays, name, **fields):
        given = {**SMALL, "data.limit": 512, "train.epochs": 100_000, "evaluation.knn_every": 0, **fields}
        self.rays, self.folder = rays, rays.shared / "results" / "rotssl" / name
        arguments = [*flags(given, rays.shared / "results", name), "--tracking.uri", rays.mlflow]
        self.name, self.supervised = rays.submit(name, *arguments), True

    def epochs(self):
        return max(journal.read(self.folder), default=0)

    def told(self):
        """What the job has printed, from its file on the head: asking the job server would take seconds."""
        logs = (self.rays.hosts.folder / "head").rglob(f"job-driver-{self.name}.log")
        return next(logs).read_text()

    def mlflow(self):
        """Status in the server's database, and the last epoch there."""
        with contextlib.closing(sqlite3.connect(f"file:{self.rays.shared}/server.db?mode=ro", uri=True)) as database:
            (row,) = database.execute("select status, run_uuid from runs where name = ?", [self.name])
            query = "select max(step) from metrics where run_uuid = ? and key = 'loss/total'"
            ((step,),) = database.execute(query, [row[1]])
        return row[0], step or 0

    def wait(self, holds, seconds):
        """Seconds until a condition holds. Meanwhile Ray is started again on the second host if it ends, as systemd would."""
        began = time.monotonic()
        while not holds():
            assert time.monotonic() - began < seconds, self.told()[-4000:]
            if self.supervised and self.rays.nodes["worker"].poll() is not None:
                self.rays.start_node("worker")
            time.sleep(0.2)
        return time.monotonic() - began

    def goes_on(self, after, began):
        """That an epoch after this one is in the journal, on the terminal and in MLflow a minute after a mend, at most."""
        self.wait(lambda: self.epochs() > after, AFTER_A_MEND_S)
        self.wait(lambda: max(map(int, re.findall(r"epoch +(\d+)/", self.told()))) > after, AFTER_A_MEND_S)
        self.wait(lambda: self.mlflow()[1] > after, AFTER_A_MEND_S)
        assert time.monotonic() - began < AFTER_A_MEND_S, self.told()[-4000:]
        return time.monotonic() - began


@pytest.fixture
def worker(rays):
    """The second host, whose cable is in and whose Ray runs again when a test is over."""
    yield rays.nodes["worker"]
    rays.hosts.mend("worker")
    if rays.nodes["worker"].poll() is not None:
        rays.start_node("worker")


@pytest.mark.timeout(1200)
def test_a_run_goes_on_after_cuts_and_without_a_host(rays, worker, capsys):
    job = Job(rays, "cuts", **{"scaling.num_workers": 2, "scaling.elastic": True, "scaling.wait_minutes": 5})
    try:
        job.wait(lambda: job.epochs() >= 3, 180)
        seen = {}
        for seconds in (20, 120):
            rays.hosts.cut("worker")
            time.sleep(seconds)  # what is tested is a cut of this length
            rays.hosts.mend("worker")
            mended, before = time.monotonic(), job.epochs()
            seen[seconds] = job.goes_on(before, mended)
        fewer, all_again = "going on with 1 of 2 workers (scaling.elastic)", "room for 2 workers again"
        job.wait(lambda: job.told().count(fewer) == job.told().count(all_again), 120)
        job.supervised = False
        rays.nodes["worker"].end()
        began, before = time.monotonic(), job.epochs()
        said = job.told().count(fewer)
        job.wait(lambda: job.told().count(fewer) > said, 240)
        job.wait(lambda: job.epochs() > before, 60)
        seen["gone"] = time.monotonic() - began
        rays.start_node("worker")
        job.wait(lambda: job.told().count(fewer) == job.told().count(all_again), 120)
        with capsys.disabled():
            print("\n", seen, job.told())
    finally:
        rays.stop(job.name)
        rays.wait(job.name)
    assert json.loads((job.folder / "run.json").read_text())["status"] == "interrupted"
    assert job.mlflow()[0] == "KILLED"
