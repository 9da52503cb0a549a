"""What cluster/slurm/run.sh does with nodes that fail, with GPUs and in a container: a made-up Ray on a real Slurm."""

import sys

import pytest

from tests.cluster.stranger import blocks

pytestmark = [pytest.mark.cluster, pytest.mark.slurm]
# Notes how it was called, says that it is up, and stays until it is told to end, or for as long as the test lets it.
RAY = """#!/usr/bin/env bash
echo "$(hostname) $*" >>"$NOTES"
case "$*" in *"$FAILS"*) echo "made-up failure"; exit 1 ;; esac
echo "Ray runtime started"
trap 'exit 0' TERM
while :; do
    sleep 1 &
    wait $!
    case "$*" in *--head*) ;; *) [ ! -e "$NOTES.end" ] || exit 1 ;; esac
done
"""
PROGRAM = """
import os, pathlib, signal, sys
notes = pathlib.Path(os.environ["NOTES"])
def end(number, frame):
    with notes.open("a") as file:
        print("told", signal.Signals(number).name, file=file)
    sys.exit(130)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, end)
with notes.open("a") as file:
    print("program", *sys.argv[1:], os.environ.get("INSIDE_OF"), file=file)
if "--wait" in sys.argv:
    signal.pause()
    sys.exit("a signal without an end")
"""
TWO = "sbatch --nodes=2 --cpus-per-task=1 cluster/slurm/pretrain.sbatch"


@pytest.fixture
def notes(stranger, tmp_path):
    """The file in which a made-up Ray and a made-up program note what happens to them."""
    bin_ = tmp_path / "venv" / "bin"
    bin_.mkdir(parents=True)
    (bin_ / "python").symlink_to(sys.executable)
    (bin_ / "ray").write_text(RAY)
    (bin_ / "ray").chmod(0o755)
    (stranger.checkout / "jobs" / "pretrain.py").write_text(PROGRAM)
    file = tmp_path / "notes"
    stranger.env |= {"VENV": str(bin_.parent), "NOTES": str(file), "FAILS": "nothing"}
    return file


def starts(notes, word):
    return [line for line in notes.read_text().splitlines() if " start " in line and word in line]


def test_a_head_that_does_not_start_is_tried_three_times_and_shown(stranger, notes):
    stranger.env["FAILS"] = "--head"
    job = stranger.submits(TWO)
    assert stranger.slurm.ended(job) == "FAILED" and "made-up failure" in stranger.log(job)
    assert len(starts(notes, "--head")) == 3 and "program" not in notes.read_text()


def test_another_node_that_does_not_start_is_tried_three_times_and_shown(stranger, notes):
    stranger.env["FAILS"] = "--address"
    job = stranger.submits(TWO)
    assert stranger.slurm.ended(job) == "FAILED" and "made-up failure" in stranger.log(job)
    assert len(starts(notes, "worker start")) == 3 and "program" not in notes.read_text()


def test_a_node_that_fails_later_starts_again_and_then_ends_the_program(stranger, notes):
    job = stranger.submits(TWO, " --wait")
    stranger.slurm.wait(job, lambda _: notes.exists() and "program --wait" in notes.read_text())
    (notes.parent / "notes.end").touch()
    assert stranger.slurm.ended(job) == "FAILED"
    assert stranger.slurm.facts(job)["ExitCode"] == "130:0"
    assert len(starts(notes, "worker start")) == 3 and "told SIGTERM" in notes.read_text()
    assert "a node of Ray has ended" in stranger.log(job) and "Ray ended on worker with code 1" in stranger.log(job)


def test_the_pages_command_for_gpus_starts_ray_with_them(stranger, notes):
    (train,) = blocks()["Train"]
    for there, here in (("--nodes=4", "--nodes=2"), ("per-node=8", "per-node=2"), ("per-task=64", "per-task=8")):
        assert there in train
        train = train.replace(there, here)
    job = stranger.submits(train)
    assert stranger.slurm.ended(job) == "COMPLETED", stranger.log(job)
    for host in ("head", "worker"):
        (line,) = starts(notes, f"{host} start")
        assert "--num-gpus 2" in line and "--num-cpus 8" in line
    assert "program --config jobs/recipes/byol_imagenet100.yaml --data.root /datasets" in notes.read_text()


def test_all_commands_go_into_the_container(stranger, notes):
    stranger.env |= {"INSIDE": f"env INSIDE_OF=it PATH={stranger.env['VENV']}/bin:/usr/bin:/bin", "VENV": "/nowhere"}
    job = stranger.submits(TWO)
    assert stranger.slurm.ended(job) == "COMPLETED", stranger.log(job)
    assert len(starts(notes, "")) == 2 and "program it" in notes.read_text()


def test_memory_of_the_job_is_shared_with_rays_objects(stranger, notes):
    job = stranger.submits(TWO.replace("sbatch", "sbatch --mem=1000"))
    assert stranger.slurm.ended(job) == "COMPLETED", stranger.log(job)
    assert all(f"--object-store-memory {300 * 1024 * 1024}" in line for line in starts(notes, ""))
    assert len(starts(notes, "")) == 2


def test_a_job_that_is_cancelled_in_its_start_leaves_nothing(stranger, notes):
    job = stranger.submits(TWO)
    stranger.slurm.wait(job, lambda facts: facts["JobState"] == "RUNNING")
    stranger.slurm("scancel", job)
    assert stranger.slurm.ended(job) == "CANCELLED"
    assert not [*stranger.slurm.hosts.home("head").glob(".rotssl-*")]


def test_a_job_whose_time_is_up_is_queued_again(stranger, notes):
    job = stranger.submits(TWO, " --wait")
    stranger.slurm.wait(job, lambda _: notes.exists() and "program --wait" in notes.read_text())
    save_and_requeue = blocks()["End, resume, preempt"][0]
    stranger.types(save_and_requeue, job)
    stranger.slurm.wait(job, lambda facts: facts["Restarts"] == "1")
    assert "told SIGUSR1" in notes.read_text() and "told SIGTERM" not in notes.read_text()
    stranger.slurm("scancel", job)
    assert stranger.slurm.ended(job) == "CANCELLED"


def test_a_preempted_job_is_told_and_starts_again(stranger, notes):
    job = stranger.submits(TWO, " --wait")
    stranger.slurm.wait(job, lambda _: notes.exists() and "program --wait" in notes.read_text())
    urgent = stranger.slurm.submit(
        "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"
    )
    assert stranger.slurm.ended(urgent) == "COMPLETED" and "told SIGUSR1" in notes.read_text()
    stranger.slurm.wait(job, lambda _: notes.read_text().count("program --wait") == 2)
    assert "start 2" in stranger.log(job)
    stranger.slurm("scancel", job)
    assert stranger.slurm.ended(job) == "CANCELLED"


def test_the_token_is_private_and_removed(stranger, notes):
    job = stranger.submits(TWO, " --wait")
    stranger.slurm.wait(job, lambda _: notes.exists() and "program --wait" in notes.read_text())
    home = stranger.slurm.hosts.home("head")
    (token,) = home.glob(f".rotssl-{job}.*/token")
    assert token.stat().st_mode & 0o777 == 0o600 and token.parent.stat().st_mode & 0o777 == 0o700
    assert len(token.read_text()) == 64
    stranger.slurm("scancel", "--batch", "--signal=TERM", job)
    assert stranger.slurm.ended(job) == "FAILED" and not [*home.glob(".rotssl-*")]
    assert stranger.slurm.facts(job)["ExitCode"] == "130:0" and "told SIGTERM" in notes.read_text()
