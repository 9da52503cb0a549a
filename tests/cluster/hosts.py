"""Three hosts on one machine, joined by a switch: each has its own network, name, processes, shared memory, Ray folder and home.

They share the file system, which stands for NFS, but not the folder ``scratch``. Nothing of them has a name outside: when their
first processes end, also because pytest was killed, the kernel ends all others and removes networks and mounts.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

from tests.programs import ROOT

NET = "10.77.0"
NUMBERS = {"head": 1, "worker": 2, "client": 3}
TOOLS = ("ip", "mount", "nsenter", "unshare")
NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid")
RAY = Path("/tmp/ray")  # where Ray keeps sockets and logs unless told otherwise
# What a host mounts before its first process begins. It has no name server: with this machine's, which it does not reach, Ray
# would give up on a head that is given by name.
SET_UP = """
set -e
hostname "$1"
mount -t tmpfs -o size=2g shm /dev/shm
mount --bind "$2/ray" /tmp/ray
mount --bind "$2/hosts" /etc/hosts
mount --bind /dev/null /etc/resolv.conf
mount --bind "$2/scratch" "$3"
exec "$4" -c "$5"
"""
# The first process reaps what others leave behind, and ends with the one that holds its input.
FIRST = """
import signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
sys.stdin.read()
"""


def missing():
    """Why there can be no hosts here; empty if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if absent := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"not installed: {', '.join(absent)} (iproute2, util-linux)"
    tried = subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


def address(host):
    """The address of a host in the network of the hosts."""
    return f"{NET}.{NUMBERS[host]}"


class Program(subprocess.Popen):
    """A program that runs on a host meanwhile, with what it prints in a file; as ``tests.programs.wait_for`` wants it."""

    def __init__(self, argv, log, env):
        self.log = log
        with log.open("w") as out:
            super().__init__(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )

    def told(self):
        return self.log.read_text()

    def end(self, patience=30):
        """Ask it to end, and kill it with all that it started if it doesn't."""
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(self.pid).children(recursive=True)  # the first one is the program, this is nsenter
            for process in below[:1]:
                process.terminate()
            for process in psutil.wait_procs(below, timeout=patience)[1]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.wait()


class Hosts:
    """The hosts ``head``, ``worker`` and ``client``, from entering the body to its end.

    Args:
        folder: for their files; each has ``HOST/home`` and ``HOST/ray`` in it, and a log of each program.
        addressing: ``real``, or ``loopback``: /etc/hosts has each host's own name at 127.0.1.1, as on Debian.
    """

    def __init__(self, folder, addressing="real"):
        assert addressing in ("real", "loopback")
        self.folder, self.addressing = Path(folder), addressing
        self.scratch = self.folder / "scratch"
        self._first, self._programs = {}, []

    def __enter__(self):
        self.scratch.mkdir(parents=True)
        with contextlib.ExitStack() as stack:  # undone at once if one of them fails
            if not RAY.exists():
                RAY.mkdir()
                stack.callback(_remove_if_empty, RAY)
            self._begin("switch", stack)
            self._ip("switch", "link", "add", "br0", "type", "bridge")
            self._ip("switch", "link", "set", "br0", "up")
            for host in NUMBERS:
                self._begin(host, stack)
                self._plug_in(host)
            self._up = stack.pop_all()
        return self

    def __exit__(self, *_):
        self._up.close()
        for program in self._programs:
            program.wait()

    def _begin(self, host, stack):
        """Start the first process of a host."""
        place = self.folder / host
        for name in ("ray", "home", "scratch"):
            (place / name).mkdir(parents=True)
        names = [(address(other), other) for other in NUMBERS if other != host or self.addressing == "real"]
        if host in NUMBERS and self.addressing == "loopback":
            names.append(("127.0.1.1", host))
        lines = [f"{where} {name}\n" for where, name in [("127.0.0.1", "localhost"), *names]]
        (place / "hosts").write_text("".join(lines))
        set_up = ["sh", "-c", SET_UP, "sh", host, place, self.scratch, sys.executable, FIRST]
        outer = subprocess.Popen(
            ["unshare", *NAMESPACES, "--fork", "--mount-proc", "--kill-child", *set_up],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for pytest, which then ends the hosts in order
        )
        stack.callback(_end, outer)
        assert outer.stdout.readline() == b"ready\n", f"the host {host} did not start"
        (self._first[host],) = psutil.Process(outer.pid).children()

    def _plug_in(self, host):
        port, pid = f"port{NUMBERS[host]}", str(self._first[host].pid)
        self._ip("switch", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", pid)
        self._ip("switch", "link", "set", port, "master", "br0", "up")
        self._ip(host, "link", "set", "lo", "up")
        self._ip(host, "address", "add", f"{address(host)}/24", "dev", "eth0")
        self._ip(host, "link", "set", "eth0", "up")

    def _ip(self, host, *arguments):
        enter = ["nsenter", "--target", str(self._first[host].pid), "--net"]
        subprocess.run([*enter, "ip", *arguments], check=True)

    def cut(self, host):
        """Pull a host's cable out."""
        self._ip("switch", "link", "set", f"port{NUMBERS[host]}", "down")

    def mend(self, host):
        """Put a host's cable back."""
        self._ip("switch", "link", "set", f"port{NUMBERS[host]}", "up")

    def home(self, host):
        return self.folder / host / "home"

    def environment(self, host, more=None):
        """The environment of a host: that of the tests without what leads to other clusters, with the host's home."""
        foreign = ("RAY_", "MLFLOW_", "SLURM_", "PYTHONDONTWRITEBYTECODE")
        env = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
        return env | {"HOME": str(self.home(host)), "PATH": path, "MLFLOW_DISABLE_TELEMETRY": "true"} | (more or {})

    def _entering(self, host, command, folder):
        # Not `ip netns exec`, which hides /sys/fs/cgroup, which slurmd wants.
        enter = ["nsenter", "--target", str(self._first[host].pid), *NAMESPACES, f"--wd={folder}", "--"]
        return [*enter, *map(str, command)]

    def run(self, host, command, env=None, check=True, timeout=None, cwd=ROOT):
        """Run a command on a host to its end, with its output as text; ``env`` is added to the host's environment."""
        done = subprocess.run(
            self._entering(host, command, cwd),
            env=self.environment(host, env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, host, name, command, env=None, cwd=ROOT):
        """Start a command on a host; its log is ``HOST/NAME.log``. It ends with the host, or by ``Program.end``."""
        log = self.folder / host / f"{name}.log"
        program = Program(self._entering(host, command, cwd), log, self.environment(host, env))
        self._programs.append(program)
        return program

    def processes(self, host, word=""):
        """The processes of a host, as this machine sees them, that have a word in their command; without its first one."""
        own, found = os.readlink(f"/proc/{self._first[host].pid}/ns/pid"), []
        for process in psutil.process_iter():
            place = Path(f"/proc/{process.pid}")
            with contextlib.suppress(OSError):  # it has ended meanwhile
                theirs = os.readlink(place / "ns" / "pid") == own and process.pid != self._first[host].pid
                if theirs and word.encode() in (place / "cmdline").read_bytes():
                    found.append(process)
        return found


def _remove_if_empty(folder):
    with contextlib.suppress(OSError):
        folder.rmdir()


def _end(outer):
    outer.stdin.close()
    outer.wait()
    outer.stdout.close()
