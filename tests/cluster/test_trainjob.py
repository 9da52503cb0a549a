"""TrainJobs of Kubeflow Trainer: what it asks of a runtime, what they run, and torchrun as it starts it."""

import contextlib
import os
import re
import sys

import pytest

from rotssl.runs import journal
from tests.cluster.files import ROOT, parsed
from tests.cluster.kubernetes import TRAINJOBS, amount, built, one
from tests.conftest import free_port
from tests.programs import SMALL, flags, mlflow_client, started

pytestmark = pytest.mark.cluster
kinds = pytest.mark.parametrize("folder", TRAINJOBS)


def parts(folder):
    """The TrainJob, its runtime's one job, and its pods' spec."""
    manifests = built(folder)
    asked, runtime = one(manifests, "TrainJob"), one(manifests, "TrainingRuntime")
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    return asked, runtime, job, job["template"]["spec"]["template"]["spec"]


@kinds
def test_the_runtime_is_what_kubeflow_trainer_asks_for(folder):
    asked, runtime, job, pod = parts(folder)
    reference = asked["spec"]["runtimeRef"]
    assert runtime["apiVersion"] == asked["apiVersion"] == f"{reference['apiGroup']}/v1alpha1"
    assert (reference["kind"], reference["name"]) == (runtime["kind"], runtime["metadata"]["name"])
    # Its webhook and its plugins for torch and JobSet look for these names.
    assert (job["name"], job["replicas"], [c["name"] for c in pod["containers"]]) == ("node", 1, ["node"])
    assert job["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert runtime["spec"]["mlPolicy"] == {"numNodes": asked["spec"]["trainer"]["numNodes"], "torch": {}}
    names = {variable["name"] for variable in pod["containers"][0]["env"]}
    assert not [name for name in names if name.startswith("PET_")], "it sets these, and refuses them"


@kinds
def test_the_command_parses_and_fits_the_pods(folder):
    asked, _, _, pod = parts(folder)
    trainer, (container,) = asked["spec"]["trainer"], pod["containers"]
    program, script, *given = trainer["command"]
    assert program == "torchrun"
    arguments = [part.replace("/opt/rotssl", str(ROOT)) for part in given]
    config = parsed(script.rsplit("/", 1)[1], arguments)
    assert config.scaling.num_workers == "auto", "torchrun says how many"
    limits = container["resources"]["limits"]
    gpu = folder.endswith("gpu")
    # Without GPUs it would start a process for each CPU.
    processes = int(limits["nvidia.com/gpu"]) if gpu else trainer["numProcPerNode"]
    assert config.scaling.use_gpu is gpu and ("numProcPerNode" in trainer) is not gpu
    assert container["image"].endswith(":cuda" if gpu else ":cpu")
    assert processes * config.scaling.cpus_per_worker <= amount(limits["cpu"])
    assert config.train.batch_size % (processes * trainer["numNodes"]) == 0
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    used = {value for value in (config.storage.path, config.data.root, config.data.cache) if value}
    assert used <= {*mounted.values()} and set(mounted) == {volume["name"] for volume in pod["volumes"]}
    sizes = {volume["name"]: volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if "emptyDir" in volume}
    assert amount(sizes["shm"]) <= amount(limits["memory"]) / 2
    assert amount(sizes["cache"]) < amount(limits["ephemeral-storage"])


@kinds
def test_a_pod_that_fails_starts_all_anew_and_the_job_ends_in_any_case(folder):
    asked, runtime, job, pod = parts(folder)
    policy = runtime["spec"]["template"]["spec"]["failurePolicy"]
    assert policy == {"maxRestarts": 10, "restartStrategy": "BlockingRecreate"}
    # Kubernetes itself must not start a pod again beside others that still wait for the old one.
    assert job["template"]["spec"]["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert asked["spec"]["activeDeadlineSeconds"] > 0 and pod["terminationGracePeriodSeconds"] > 30
    policy = one(built(folder), "NetworkPolicy")["spec"]
    labels = job["template"]["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"] == {"matchLabels": labels}
    assert policy["ingress"] == [{"from": [{"podSelector": {"matchLabels": labels}}]}]


def pod_of(rank, folder, port):
    """A pod's command, and the environment that Kubeflow Trainer gives it, on this machine."""
    trainer = parts("trainjob/cpu")[0]["spec"]["trainer"]
    program, script, *_ = trainer["command"]
    given = {"PET_NNODES": trainer["numNodes"], "PET_NPROC_PER_NODE": trainer["numProcPerNode"], "PET_NODE_RANK": rank}
    given |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
    fields = {**SMALL, "data.limit": 1024, "train.epochs": 3, "scaling.use_gpu": False, "tracking.system_seconds": 0.2}
    command = [os.path.join(os.path.dirname(sys.executable), program), script.replace("/opt/rotssl", str(ROOT))]
    env = {**os.environ, **{name: str(value) for name, value in given.items()}}
    return [*command, *flags(fields, folder)], env


def test_two_pods_of_torchrun_are_one_run_with_the_samples_of_both(tmp_path):
    port = free_port()
    with contextlib.ExitStack() as stack:
        pods = [
            stack.enter_context(started(command, tmp_path / f"log{rank}", env))
            for rank in range(2)
            for command, env in [pod_of(rank, tmp_path, port)]
        ]
        for pod in pods:
            assert pod.wait() == 0, pod.told()[-3000:]
    assert set(journal.read(tmp_path / "rotssl" / "run")) == {1, 2, 3}
    assert "training in 2 processes of torchrun" in pods[0].told() and "epoch 3/3" in pods[0].told()
    assert not re.search(r"epoch \d/3", pods[1].told())
    client = mlflow_client(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("rotssl").experiment_id])
    assert run.data.tags["world_size"] == "2" and run.info.status == "FINISHED"
    for node in range(2):
        points = client.get_metric_history(run.info.run_id, f"system/node_{node}/cpu_utilization_percentage")
        assert points and [point.step for point in points] == sorted({point.step for point in points})
