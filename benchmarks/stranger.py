"""How long does somebody take who knows only the documentation, from a clone to the first epoch, on two hosts and on Slurm?

    python benchmarks/stranger.py [--output FOLDER]

Types what docs/clusters/ray.md and docs/clusters/slurm.md say, in a fresh clone of this checkout's last commit, with names and
folders put in. The hosts are those of tests/cluster/hosts.py, so it needs root; for Ray sshd, for Slurm slurm-wlm and munge. What
an administrator does is not counted: Slurm, the way into a host by ssh. Reading is not counted either. Packages come from uv's
cache where it has them. Writes benchmarks/results/stranger_DATE.md.
"""

import argparse
import contextlib
import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import RESULTS, commit, machine

ROOT = RESULTS.parent.parent
Steps = list[tuple[str, float]]


class Stranger:
    """Somebody who types, and the seconds that each thing takes."""

    def __init__(self, hosts: Any, folder: Path, page: str) -> None:
        self.hosts, self.folder, self.page, self.steps = hosts, folder, page, Steps()
        self.checkout = folder / "rotssl"
        # Not this script's own environment.
        self.env = {"PATH": f"{folder}/bin:{os.environ['PATH']}:/usr/sbin", "PYTHONPATH": ""}

    def block(self, title: str, starts: str, **names: str) -> str:
        """A block of the page by its section and how it starts, with these names replaced."""
        text = (ROOT / "docs" / "clusters" / self.page).read_text()
        (section,) = [part for part in re.split(r"^## ", text, flags=re.M) if part.split("\n")[0].endswith(title)]
        fenced = re.findall(r"^```bash\n(.*?)^```$", section, re.M | re.S)
        indented = [re.sub("^    ", "", b, flags=re.M) for b in re.findall(r"(?:^    [^\n]*\n)+", section, re.M)]
        (found,) = [block for block in fenced + indented if block.startswith(starts)]
        for name, value in names.items():
            found = found.replace(name, value)
        return found

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Take the time of a step."""
        began = time.monotonic()
        yield
        self.steps.append((what, time.monotonic() - began))
        print(f"{self.page}: {what}: {self.steps[-1][1]:.1f} s", flush=True)

    def install(self, title: str) -> None:
        """Clone and set up, on this machine: the hosts have no internet."""
        clone, setup = self.block(title, "git clone").splitlines()
        clone = clone.replace("https://github.com/OWNER/rotssl.git", f"file://{ROOT} rotssl")
        for what, line in (("`git clone`", clone), ("`make setup`", setup)):
            with self.timed(what):
                subprocess.run(["/bin/bash", "-euc", line], cwd=self.folder, env=os.environ | self.env, check=True)

    def types(self, host: str, name: str, text: str, until: Callable[[str], Any], env: dict[str, str]) -> Any:
        """Type lines on a host; returns its program once what it has printed meets a condition."""
        from tests.programs import wait_for

        program = self.hosts.start(host, name, ["bash", "-euc", text], self.env | env, cwd=self.checkout)
        try:
            wait_for(lambda: until(program.told()), program)
        except AssertionError:
            if program.returncode or not until(program.told()):  # what goes on in the background has ended well
                raise
        return program


def first_epoch(told: str) -> bool:
    """Whether a log has the line of the first epoch."""
    return re.search(r"^epoch +1/", told, re.M) is not None


def open_ssh(hosts: Any, folder: Path) -> None:
    """Let the client log in to the head, as somebody who has an account there."""
    from tests.cluster.hosts import address

    place = folder / "ssh"
    for part in (place, folder / "bin"):
        part.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["/usr/bin/ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", place / name], check=True)
    keys = f"HostKey {place}/host\nAuthorizedKeysFile {place}/user.pub\nPidFile none\nUsePAM no\nStrictModes no\n"
    (place / "sshd").write_text(f"ListenAddress {address('head')}\nPermitRootLogin yes\n{keys}")
    (place / "config").write_text(
        f"IdentityFile {place}/user\nUserKnownHostsFile {place}/known\nStrictHostKeyChecking accept-new\n"
    )
    way = folder / "bin" / "ssh"
    way.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {place}/config "$@"\n')
    way.chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)
    hosts.start("head", "sshd", ["/usr/sbin/sshd", "-D", "-f", place / "sshd"])


def on_ray(hosts: Any, folder: Path) -> Steps:
    """docs/clusters/ray.md."""
    one = Stranger(hosts, folder, "ray.md")
    open_ssh(hosts, folder)
    for host in ("head", "worker", "client"):  # as hosts have it: Ray finds its own address by it
        hosts.run(host, ["ip", "route", "add", "default", "dev", "eth0"])
    one.install("Install")
    activate = one.block("Install", "source")
    token = one.block("Start the nodes", "export")
    mode, _ = token.splitlines()
    head, other = one.block("Start the nodes", "ray start", HEAD="head").splitlines()

    def up(told: str) -> bool:
        return "Ray runtime started" in told

    with one.timed("token, copied to two hosts; `ray start` on the first"):
        one.types("head", "ray", f"{activate}{token}{head}", up, {})
        for host in ("worker", "client"):
            shutil.copytree(hosts.home("head") / ".ray", hosts.home(host) / ".ray")
    with one.timed("`ray start` on the second"):
        one.types("worker", "ray", f"{activate}{mode}\n{other}", up, {})
    with one.timed("`mlflow server`"):
        (folder / "mlflow").mkdir()
        serve = one.block("Start a tracking server", "mlflow", HEAD="head", DIR=str(folder / "mlflow"))
        one.types("head", "mlflow", activate + serve, lambda told: "startup complete" in told, {})
    with one.timed("`ssh`, `ray job submit`, to the first epoch's line"):
        way = one.block("Submit", "ssh", HEAD="head")
        submit = one.block("Submit", "export", HEAD="head", SHARED=str(folder / "shared"))
        one.types("client", "job", activate + way + submit, first_epoch, {})
    return one.steps


def on_slurm(hosts: Any, folder: Path) -> Steps:
    """docs/clusters/slurm.md."""
    from tests.cluster.slurm import Slurm

    one = Stranger(hosts, folder, "slurm.md")
    with Slurm(hosts) as slurm:
        one.install("Set up")
        with one.timed("`sbatch`, to the first epoch's line"):
            text = one.block("Try it", "sbatch")
            told = one.types("head", "sbatch", text, lambda told: "Submitted" in told, slurm.env).told()
            job = re.search(r"batch job (\d+)", told)[1]
            log = one.checkout / f"rotssl-{job}.log"
            slurm.wait(
                job, lambda facts: (log.exists() and first_epoch(log.read_text())) or facts["JobState"] == "FAILED"
            )
            assert first_epoch(log.read_text()), log.read_text()
        slurm("scancel", job)
        slurm.ended(job)
    return one.steps


def main() -> None:
    """Walk both ways and write the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    sys.path.append(str(ROOT))
    from tests.cluster.hosts import Hosts

    lines = [
        f"# From a clone to the first epoch, {datetime.date.today()}",
        "",
        f"Command: `python benchmarks/stranger.py`, commit {commit()}. Once.",
        f"Machine: {machine()}; the hosts are network namespaces on it.",
        "Packages from a warm cache. Each line is what the page says to type, without reading and typing.",
    ]
    for title, walk in (
        ("Two hosts, docs/clusters/ray.md", on_ray),
        ("Two nodes of Slurm, docs/clusters/slurm.md", on_slurm),
    ):
        with tempfile.TemporaryDirectory(prefix="stranger") as scratch:
            folder = Path(scratch)
            for name in ("hosts", "user", "user/shared"):
                (folder / name).mkdir()
            with Hosts(folder / "hosts") as hosts:
                steps = walk(hosts, folder / "user")
        steps.append(("all of it", sum(seconds for _, seconds in steps)))
        lines += ["", f"## {title}", "", "| step | s |", "|---|---|", *(f"| {what} | {s:.1f} |" for what, s in steps)]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"stranger_{datetime.date.today()}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
