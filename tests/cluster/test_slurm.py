"""The page about Slurm, typed by a stranger: its commands on a real Slurm of two nodes, and what it says about ends."""

import re
from pathlib import Path

import psutil
import pytest
import torch

from rotssl.config import cli, sweep
from rotssl.runs import checkpoint, journal
from tests.cluster.stranger import PAGE, blocks
from tests.runtimes.test_ray_train import uninterrupted

pytestmark = [pytest.mark.cluster, pytest.mark.slurm, pytest.mark.system]
LONG = """sbatch --nodes=2 --cpus-per-task=1 cluster/slurm/pretrain.sbatch --data.name synthetic --data.limit 256
    --data.image_size 16 --method.hidden_dim 32 --method.out_dim 16 --train.batch_size 32 --train.epochs 24
    --evaluation.linear false --evaluation.knn_every 0 --scaling.num_workers 2 --tracking.uri off
    --tracking.run_name long""".replace("\n", " ")
SWEEP = """
sweep: {seeds: 1}
grid: {rotation.weight: [0, 1.0], train.epochs: [1]}
data: {name: fashion-mnist-sample, limit: 256}
method: {hidden_dim: 32, out_dim: 16}
train: {batch_size: 64}
"""


@pytest.fixture(autouse=True)
def nothing_stays(slurm):
    """After each test there is no process of a job, no token, no folder of Ray and no shared memory of it."""

    def there():
        # Another test's Ray may run on these hosts.
        processes = {process for host in ("head", "worker") for process in slurm.hosts.processes(host, "ray")}
        memory = {
            (host, name)
            for host in ("head", "worker")
            for name in slurm.hosts.run(host, ["ls", "/dev/shm"]).stdout.split()
            if "plasma" in name
        }
        return processes, memory, {*Path("/tmp").glob("ray.??????")}

    before = there()
    yield
    psutil.wait_procs(there()[0] - before[0], timeout=30)
    for now, then in zip(there(), before, strict=True):
        assert now <= then
    assert not [*slurm.hosts.home("head").glob(".rotssl-*")]


def test_the_pages_first_job_and_a_sweep_share_a_node(stranger):
    first, look, expected, files = blocks()["Try it"]
    (ablate,) = blocks()["Sweep"]
    (stranger.checkout / "small.yaml").write_text(SWEEP)
    sweeping = stranger.submits(ablate.replace("jobs/sweeps/weight_budget_demo.yaml", "small.yaml"))
    job = stranger.submits(first)
    assert job in stranger.types(look.splitlines()[0], job)
    assert stranger.slurm.ended(job) == "COMPLETED", stranger.log(job)
    log = stranger.types(look, job)
    for line in expected.replace("JOB", job).splitlines():
        # As the page has it, but for addresses and the names of nodes.
        words = [r"\S+" if re.search(r"\d\.\d|node\d|node\[", word) else re.escape(word) for word in line.split()]
        assert re.search(" ".join(words), log), f"{line}\n{log}"
    told = stranger.types(files)
    assert '"status": "finished"' in told and len(journal.read(stranger.run("try"))) == 2
    assert stranger.slurm.ended(sweeping) == "COMPLETED", stranger.log(sweeping)
    assert (stranger.checkout / "results" / "small" / "small" / "report" / "report.html").exists()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("cancelled", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_a_run_that_is_preempted_and_cancelled_ends_with_the_weights_of_a_quiet_one(
    stranger, pool, tmp_path, cancelled
):
    slurm, folder = stranger.slurm, stranger.run("long")
    _, end = blocks()["End, resume, preempt"]

    def done():
        return max(journal.read(folder), default=0)

    job = stranger.submits(LONG)
    slurm.wait(job, lambda facts: done() >= 2)
    urgent = slurm.submit("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    assert slurm.ended(urgent) == "COMPLETED"
    slurm.wait(job, lambda facts: facts["Restarts"] == "1" and facts["JobState"] == "RUNNING")
    assert stranger.log(job).count("the same command resumes") == 1 and "requeued" in stranger.log(job)
    if cancelled:
        preempted = done()
        slurm.wait(job, lambda facts: done() >= preempted + 2)
        stranger.types(end, job)
        assert slurm.ended(job) == "CANCELLED", stranger.log(job)
        assert stranger.status("long") == "interrupted" and done() < 24
        job = stranger.submits(LONG)
    assert slurm.ended(job) == "COMPLETED", stranger.log(job)
    assert stranger.status("long") == "finished" and "resuming after epoch" in stranger.log(job)

    quiet = pool.run(uninterrupted, folder, tmp_path)[0]
    ours = torch.load(checkpoint.found(folder)[0] / checkpoint.FILE, weights_only=True)["model"]
    assert all(torch.equal(ours[name], quiet[name]) for name in quiet) and len(ours) == len(quiet)
    points, others = journal.read(folder), journal.read(tmp_path / "rotssl" / "long")
    for epoch in range(1, 25):
        for key in ("loss/total", "loss/ssl", "optim/grad_norm"):
            assert points[epoch][key] == others[epoch][key], (epoch, key)


def test_a_job_outside_a_checkout_says_so(stranger, tmp_path):
    script = stranger.checkout / "cluster" / "slurm" / "pretrain.sbatch"
    job = stranger.slurm.submit("--nodes=1", script, cwd=tmp_path)
    assert stranger.slurm.ended(job) == "FAILED"
    symptom = re.search(r"^\| `(cluster/slurm/run.sh: .*?)`", PAGE.read_text(), re.M)[1]
    assert symptom in (tmp_path / f"rotssl-{job}.log").read_text()


def test_what_the_page_submits_for_gpus_parses():
    (train,) = blocks()["Train"]
    _, _, flags = train.replace("\\\n", " ").partition("pretrain.sbatch")
    command = cli.parse(flags.split(), "jobs/pretrain.py", "")
    assert command.config.data.root == "/datasets/imagenet100" and command.config.tracking.uri.startswith("http")
    (ablate,) = blocks()["Sweep"]
    assert (
        sweep.parse(ablate.partition("ablate.sbatch")[2].split(), "jobs/ablate.py", "").sweep.name
        == "weight_budget_demo"
    )
