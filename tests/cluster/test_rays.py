"""A job from a third host trains on two others, and is seen in MLflow's server."""

import pytest

from tests.cluster.hosts import address
from tests.programs import SMALL, flags

pytestmark = [pytest.mark.cluster, pytest.mark.system]
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
