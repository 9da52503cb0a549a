"""A job from a third host trains on two others, and is seen in MLflow's server."""

import pytest

from tests.programs import SMALL, flags

pytestmark = [pytest.mark.cluster, pytest.mark.system]
ASK = """
import sys
from mlflow.tracking import MlflowClient
client = MlflowClient()
experiment = client.get_experiment_by_name("rotssl").experiment_id
(run,) = client.search_runs([experiment])
steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss/total")]
print(run.info.run_name, run.info.status, run.data.tags["world_size"], str(steps).replace(" ", ""))
"""


def test_a_job_of_a_third_host_trains_on_two_others(rays):
    job = rays.submit("first", *flags(SMALL, rays.shared / "results", "first"), "--tracking.uri", rays.mlflow)
    assert rays.wait(job) == "SUCCEEDED", rays.logs(job)
    told = rays.hosts.run("client", ["python", "-c", ASK], {"MLFLOW_TRACKING_URI": rays.mlflow}).stdout.split()
    assert told == ["first", "FINISHED", "2", "[1,2]"]
    rays.token.rename(rays.token.with_suffix(".away"))
    try:
        assert "first" not in rays.job("list", check=False)  # not without the token
    finally:
        rays.token.with_suffix(".away").rename(rays.token)
    assert "first" in rays.job("list")
