"""Jobs on a real Ray cluster of two nodes with token authentication, as a user starts them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from rotssl import config as cfg
from rotssl.config import recipes
from rotssl.config.resolved import narrowed
from rotssl.runs import checkpoint, journal
from tests.conftest import two_nodes
from tests.programs import ROOT, SMALL, command, flags, job, mlflow_client, started, wait_for
from tests.small_runs import trainer

pytestmark = pytest.mark.system
LOSES_A_NODE = {**SMALL, "data.limit": 512, "train.epochs": 6, "tracking.uri": "off"}
METRICS = {
    *(
        "loss/total",
        "loss/ssl",
        "loss/rotation",
        "rotation/accuracy",
        "rotation/grad_share",
        "knn/top1",
        "linear/top1",
        "feature/std",
        "feature/effective_rank",
    ),
    *("cost/epochs", "cost/samples", "cost/train_seconds", "cost/device_seconds", "cost/flops", "cost/lost_seconds"),
    *("throughput/images_per_second", "throughput/input_wait", "memory/host_bytes", "optim/lr", "optim/grad_norm"),
}


def submit(env, *command, options=()):
    ray = str(Path(sys.executable).with_name("ray"))
    env = env | {
        "RAY_ADDRESS": f"http://127.0.0.1:{env['DASHBOARD_PORT']}",
        "PATH": f"{Path(ray).parent}:{env['PATH']}",
    }
    return subprocess.run(
        [ray, "job", "submit", "--working-dir", str(ROOT), *options, "--", *command],
        env=env,
        capture_output=True,
        text=True,
    )


def cached(folder):
    """When the files of a cache were changed, by kind; without an empty lock, which may stay, and the stamp of the last check."""
    return {path.suffix: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix not in (".lock", ".ok")}


def logged(folder, name, experiment="rotssl"):
    """The run of that name, and metric -> its steps, as MLflow's own client reads them."""
    client = mlflow_client(f"sqlite:///{folder}/mlflow.db")
    experiment_id = client.get_experiment_by_name(experiment).experiment_id
    (run,) = client.search_runs([experiment_id], f"attributes.run_name = '{name}'")
    steps = {key: [point.step for point in client.get_metric_history(run.info.run_id, key)] for key in run.data.metrics}
    return client, run, steps


def each_epoch_once(steps, epochs):
    """Every metric has one point an epoch; the linear probe is trained on the last one's features. Samples of nodes rise."""
    assert {key for key in steps if not key.startswith("system/")} == METRICS
    for key, points in steps.items():
        if key.startswith("system/"):
            assert points == sorted(set(points)), key
            continue
        assert points == ([epochs] if key == "linear/top1" else list(range(1, epochs + 1))), key


def test_submitted_job_trains_across_two_nodes(cluster, tmp_path):
    done = submit(
        cluster, "python", "jobs/pretrain.py", *flags({**SMALL, "tracking.system_seconds": 0.2}, tmp_path, "submitted")
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    client, run, steps = logged(tmp_path, "submitted")
    assert run.info.status == "FINISHED"
    each_epoch_once(steps, 2)
    # By the driver: workers have no store. Two nodes of one address are one machine to Ray Train.
    assert steps["system/cpu_utilization_percentage"]
    assert run.data.params["rotation.weight"] == "1.0" and run.data.params["train.epochs"] == "2"
    # Each node has one CPU and each worker takes one: two workers are on two nodes.
    tags = run.data.tags
    assert tags["world_size"] == "2" and tags["rotation"] == "on" and tags["status_reason"] == "completed"
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"config.yaml", "convergence.png", "views.png", "encoder.safetensors", "encoder.json"}
    assert "mlflow ui --backend-store-uri" in done.stdout and "kNN top-1" in done.stdout


@pytest.mark.exhaustive  # the signal and the end are those of test_ray_ends.py
def test_a_job_that_is_stopped_leaves_its_status_and_the_same_command_goes_on(cluster, tmp_path):
    stopped = ["python", "jobs/pretrain.py", *flags({**SMALL, "data.limit": 1024, "train.epochs": 6}, tmp_path)]
    env = cluster | {"RAY_ADDRESS": f"http://127.0.0.1:{cluster['DASHBOARD_PORT']}"}
    assert submit(cluster, *stopped, options=("--no-wait", "--submission-id", "to-be-stopped")).returncode == 0
    ray = str(Path(sys.executable).with_name("ray"))
    while 1 not in journal.read(tmp_path / "rotssl" / "run"):  # ends with the test's timeout
        time.sleep(0.1)
    workers = {p for p in psutil.process_iter() if "RayTrainWorker" in p.name()}
    subprocess.run([ray, "job", "stop", "to-be-stopped"], env=env, check=True)
    state = json.loads((tmp_path / "rotssl" / "run" / "run.json").read_text())
    assert state["status"] == "interrupted"
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    assert logged(tmp_path, "run")[1].info.status == "KILLED"
    done = submit(cluster, *stopped)
    assert done.returncode == 0 and "resuming after epoch" in done.stdout, done.stdout[-3000:]
    _, run, steps = logged(tmp_path, "run")
    assert run.info.status == "FINISHED"
    each_epoch_once(steps, 6)


def test_upload_leaves_out_what_is_not_code(cluster):
    # And all of the code, which an installed copy would hide: nothing is imported from anywhere else.
    code = (
        "import os, rotssl.data.datasets as d, rotssl.data.sample as s\n"
        "print('here:', *os.listdir(), sep='|'), print('from:', d.__file__, *s.__path__, sep='|')"
    )
    told = submit(cluster, "python", "-c", code).stdout
    (names,), (found,) = (
        [line.split("|")[1:] for line in told.splitlines() if line.startswith(word)] for word in ("here", "from")
    )
    assert {"jobs", "rotssl", "pyproject.toml"} <= {*names}
    assert not {*names} & {".venv", ".git", "results", "data", "tests"}
    assert len(found) == 2 and all("working_dir_files" in path for path in found), found


@pytest.mark.exhaustive  # Ray tries for 20 s
def test_wrong_token_is_one_line(cluster, tmp_path):
    token = tmp_path / "token"
    token.write_text("0" * 64)
    done = job(*flags(SMALL, tmp_path), env=cluster | {"RAY_AUTH_TOKEN_PATH": str(token)})
    assert done.returncode == 2 and "RAY_ADDRESS" in done.stderr.splitlines()[-1], done.stderr[-2000:]


def test_more_workers_than_the_cluster_has(cluster, tmp_path):
    done = job(*flags(SMALL, tmp_path), "--scaling.num_workers", "4", env=cluster)
    assert done.returncode == 2
    assert "scaling.num_workers: got 4" in done.stderr.splitlines()[-1] and "2 CPUs" in done.stderr.splitlines()[-1]


def uninterrupted(folder, elsewhere):
    """Final weights of the run in a folder, trained anew by two processes without Ray, with the images in memory."""
    fields = recipes.load_recipe(Path(folder) / "config.yaml") | {
        "storage.path": str(elsewhere),
        "data.store": "memory",
    }
    run = trainer(narrowed(cfg.build(fields)))
    run.run()
    return run.model.state_dict()


def noise_images(folder):
    """Images of four classes, 48 each."""
    for label in range(4):
        (folder / str(label)).mkdir(parents=True)
        for i in range(48):
            noise = np.random.default_rng([label, i]).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(noise).save(folder / str(label) / f"{i}.png")
    return folder


def state_of(cluster, kind):
    """The entries of Ray's state API."""
    url = f"http://127.0.0.1:{cluster['DASHBOARD_PORT']}/api/v0/{kind}?limit=1000"
    token = Path(cluster["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["data"]["result"]["result"]


def in_the_cluster(cluster):
    """Actors and placement groups that Ray's state API lists as there or to come."""
    found = [
        entry[name]
        for kind, name in (("actors", "class_name"), ("placement_groups", "placement_group_id"))
        for entry in state_of(cluster, kind)
        if entry["state"] not in ("DEAD", "REMOVED")
    ]
    return [
        name for name in found if name != "_AutoscalingCoordinatorActor"
    ]  # Ray's own, one for all jobs of a cluster


def nothing_stays(cluster, before):
    """Wait up to three minutes until no actor, placement group or process of a worker is left of what came after ``before``."""
    limit = time.monotonic() + 180
    while (left := in_the_cluster(cluster)) or new_workers(before):
        assert time.monotonic() < limit, left
        time.sleep(0.1)


def new_workers(before):
    """The Ray Train workers among the processes that were not there before."""
    return [
        p
        for p in psutil.process_iter(["name", "cmdline"])
        if p.pid not in before and "RayTrainWorker" in " ".join(p.info["cmdline"] or [])
    ]


@pytest.mark.timeout(900)  # four minutes on a slow machine with nothing beside it
def test_a_run_that_is_interrupted_and_whose_workers_hang_and_die_equals_an_uninterrupted_one(cluster, pool, tmp_path):
    # With the images mapped from disk, which two workers on two nodes of one machine decode once.
    root = noise_images(tmp_path / "images")
    fields = {**SMALL, "train.epochs": 12, "data.name": "imagefolder", "data.root": root, "scaling.hang_minutes": 0.8}
    given = flags({**fields, "data.store": "disk", "data.cache": tmp_path / "cache"}, tmp_path)
    folder, argv = tmp_path / "rotssl" / "run", command("pretrain.py", *given)
    before = set(psutil.pids())
    with started(argv, tmp_path / "log", cluster) as process:
        wait_for(lambda: 2 in journal.read(folder), process)
        assert {"RayTrainWorker", "TrainController", "_QueueActor"} <= set(in_the_cluster(cluster))
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130, process.told()[-3000:]
    assert logged(tmp_path, "run")[1].info.status == "KILLED"
    reached = max(journal.read(folder))
    made = cached(tmp_path / "cache")
    assert reached < 12 and set(made) == {".npy", ".json", ".sums"}

    nothing_stays(cluster, before)
    (folder / "checkpoint_manager_snapshot.json").write_text(
        "{}"
    )  # Ray Train's own list, which may not be that of the folder
    with started(argv, tmp_path / "log", cluster) as process:
        wait_for(lambda: max(journal.read(folder)) > reached, process)
        hanging = new_workers(before)
        assert len(hanging) == 2
        hanging[0].suspend()
        wait_for(lambda: not any(worker.is_running() for worker in hanging), process)
        assert "no progress for 0.8 minutes (scaling.hang_minutes)" in process.told()
        held = max(journal.read(folder))
        wait_for(lambda: max(journal.read(folder)) > held, process)
        new_workers(before)[0].kill()
        assert process.wait() == 0, process.told()[-3000:]
    nothing_stays(cluster, before)
    assert made == cached(tmp_path / "cache")
    _, run, steps = logged(tmp_path, "run")
    assert run.info.status == "FINISHED"
    each_epoch_once(steps, 12)
    assert journal.read(folder)[12]["cost/samples"] == 12 * 128
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 24  # of training and of evaluation, each once
    found = checkpoint.load(checkpoint.found(folder)[0])["model"]
    for key, value in pool.run(uninterrupted, folder, tmp_path / "elsewhere")[0].items():
        assert torch.equal(found[key], value), key
    # Finished: the same command prints the table, another configuration is refused; both without any cluster.
    nowhere = os.environ | {"RAY_ADDRESS": "127.0.0.1:1"}
    again = job(*given, env=nowhere)
    assert again.returncode == 0 and "already finished" in again.stdout and "kNN top-1" in again.stdout
    other = job(*given, "--rotation.weight", "2", env=nowhere)
    assert other.returncode == 2 and "rotation.weight: got 2.0" in other.stderr and len(other.stderr.splitlines()) == 1


def give_notice(env, seconds):
    """Announce to the cluster that its second node will be gone, as a cloud does of a spot machine."""
    (node,) = (entry["node_id"] for entry in state_of(env, "nodes") if not entry["is_head_node"])
    ray = str(Path(sys.executable).with_name("ray"))
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    left = ["--deadline-remaining-seconds", str(seconds)]
    subprocess.run(
        [ray, "drain-node", "--address", env["RAY_ADDRESS"], "--node-id", node, *why, *left], env=env, check=True
    )


@pytest.mark.exhaustive  # a cluster of its own, three minutes
@pytest.mark.parametrize("notice", [0, 8], ids=["without notice", "with notice"])
def test_a_run_that_loses_a_node_goes_on_with_a_new_one(notice, pool, tmp_path):
    fields = {**LOSES_A_NODE, "train.epochs": 40 if notice else 6}
    with two_nodes(tmp_path / "nodes") as env:
        folder, argv = tmp_path / "rotssl" / "run", command("pretrain.py", *flags(fields, tmp_path))
        with started(argv, tmp_path / "log", env) as process:
            wait_for(lambda: 1 in journal.read(folder), process)
            node = psutil.Process(int((tmp_path / "nodes" / "worker.pid").read_text()))
            (raylet,) = (p for p in node.children(recursive=True) if p.name() == "raylet")
            same = node.cmdline()
            if notice:
                gone_at = time.monotonic() + notice
                give_notice(env, notice)
                told = max(journal.read(folder))
                wait_for(lambda: time.monotonic() > gone_at, process)  # Ray leaves the kill to who gave notice
                assert max(journal.read(folder)) > told, "training goes on meanwhile"
            with contextlib.suppress(psutil.NoSuchProcess):
                raylet.kill()
            psutil.wait_procs([node], timeout=60)
            with started(same, tmp_path / "node.log", env):
                assert process.wait() == 0, process.told()[-3000:]
    assert "resuming after epoch" in process.told()
    found = checkpoint.load(checkpoint.found(folder)[0])["model"]
    for key, value in pool.run(uninterrupted, folder, tmp_path / "elsewhere")[0].items():
        assert torch.equal(found[key], value), key


def test_corrupt_image_ends_the_run_and_is_named(tmp_path):
    # On a cluster that the job starts itself. 64 files are decoded before the start; this one is not among them.
    from rotssl.data.datasets import choose

    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(200):
        Image.fromarray(np.full((16, 16, 3), i, np.uint8)).save(folder / f"{i:03d}.png")
    bad = folder / f"{min(set(range(200)) - set(choose(None, 200, 64))):03d}.png"
    bad.write_bytes(b"no image")
    fields = {
        "data.name": "imagefolder",
        "data.root": folder,
        "train.epochs": 1,
        "train.batch_size": 16,
        "scaling.num_workers": 1,
    }
    done = job(*flags(fields, tmp_path), env=os.environ | {"RAY_ADDRESS": "local"})
    assert done.returncode == 1, done.stderr[-3000:]
    assert str(bad) in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert logged(tmp_path, "run")[1].info.status == "FAILED"
