"""The hosts of these tests are what they claim to be: apart from each other, and gone when they end."""

import sys
from pathlib import Path
from subprocess import PIPE, Popen

import psutil
import pytest

from tests.cluster.hosts import RAY, Hosts, address, missing
from tests.programs import ROOT, started, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.system]
SERVER = "import http.server as h; h.test(h.SimpleHTTPRequestHandler, port=8000, bind='0.0.0.0')"
ASK = "import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=1)"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Hosts of these tests alone: on those of the others Ray may run."""
    if reason := missing():
        pytest.skip(reason)
    with Hosts(tmp_path_factory.mktemp("quiet")) as up:
        yield up


def reaches(hosts, host):
    """Whether the client can fetch a page from a server there."""
    asked = hosts.run("client", ["python", "-c", ASK, f"http://{address(host)}:8000"], check=False, cwd="/")
    return asked.returncode == 0


def test_each_host_has_its_own_name_processes_memory_and_folders(hosts):
    for host in ("head", "worker", "client"):
        told = hosts.run(host, ["sh", "-c", "hostname; echo $HOME; ls /dev/shm /tmp/ray; ls -d /proc/[0-9]* | wc -l"])
        name, home, *listed, processes = told.stdout.split()
        assert name == host and home == str(hosts.home(host)) and int(processes) < 9
        assert listed == ["/dev/shm:", "/tmp/ray:"]
        hosts.run(host, ["sh", "-c", f"echo x > /dev/shm/{host}-was-here; echo x > /tmp/ray/{host}-was-here"])
    for host in ("head", "worker", "client"):
        told = hosts.run(host, ["sh", "-c", "cd /; ls dev/shm tmp/ray; rm dev/shm/*-was-here tmp/ray/*-was-here"])
        assert told.stdout.split().count(f"{host}-was-here") == 2 == told.stdout.count("-was-here")
    assert not [*RAY.glob("*-was-here")]


def test_a_cable_is_cut_and_mended(hosts):
    server = hosts.start("worker", "server", ["python", "-c", SERVER], cwd="/")
    wait_for(lambda: reaches(hosts, "worker"), server)
    hosts.cut("worker")
    assert not reaches(hosts, "worker")
    hosts.mend("worker")
    wait_for(lambda: reaches(hosts, "worker"), server)
    server.end()
    assert hosts.processes("worker") == []


def test_a_hosts_own_name_may_be_on_loopback(tmp_path):
    if reason := missing():
        pytest.skip(reason)
    with Hosts(tmp_path, addressing="loopback") as hosts:
        for host, own in (("head", "127.0.1.1"), ("client", address("head"))):
            assert hosts.run(host, ["getent", "hosts", "head"]).stdout.split()[0] == own


ENDS = """
import sys
from pathlib import Path
from tests.cluster.hosts import Hosts
with Hosts(Path(sys.argv[1])) as hosts:
    hosts.start("head", "asleep", ["sh", "-c", "setsid sleep 600 & wait"])
    print("up", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["in order", "killed"])
def test_nothing_is_left_of_hosts_that_end_and_others_go_on(tmp_path, how):
    if reason := missing():
        pytest.skip(reason)
    argv = [sys.executable, "-c", ENDS, str(tmp_path / "hosts")]
    with (
        started(["sleep", "600"], tmp_path / "bystander") as bystander,
        Popen(argv, stdin=PIPE, stdout=PIPE, cwd=ROOT) as process,
    ):
        process.told = lambda: "no output"
        assert process.stdout.readline() == b"up\n"

        def asleep():
            below = psutil.Process(process.pid).children(recursive=True)
            return below if any(p.name() == "sleep" for p in below) else []

        ours = wait_for(asleep, process)
        assert len(ours) > 8  # of each of four hosts the first process and what holds it, and the program
        if how == "killed":
            process.kill()
        process.stdin.close()
        assert process.wait() == (-9 if how == "killed" else 0)
        assert psutil.wait_procs(ours, timeout=30)[1] == []
        assert str(tmp_path) not in Path("/proc/mounts").read_text() and bystander.poll() is None
