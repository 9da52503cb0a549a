"""Contenders in processes of their own, timed in turn, and an environment for those that are other people's packages.

A contender is a process that answers on its standard output: once, when it has warmed up, with a line of JSON about itself; then,
to each line with a number n on its standard input, with the seconds that n units of its work took. While one is at work all
others are stopped (SIGSTOP, with their data loaders' workers): nobody fills queues in another one's time. The order turns from
round to round.
"""

import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from common import import_path

ANSWER_S = 900  # in which a contender must answer
PEERS = Path.home() / ".cache" / "rotssl-peers"
PACKAGES = ("lightly", "kornia")


@dataclass
class Sample:
    """One answer.

    Attributes:
        seconds: on the clock.
        cpu: seconds of processor time of the whole group.
        foreign: share of the cores that others used.
        waited: seconds without input, where the work tells.
    """

    seconds: float
    cpu: float
    foreign: float
    waited: float = 0.0


def serve(make: Callable[[], tuple[Callable[[int], float | None], dict[str, Any]]], warm_up: int) -> None:
    """The contender's side: build, warm up, answer until the input ends.

    Args:
        make: gives a function that does n units of work and waits for the device, and facts to be told. It may return the seconds
            in which it waited for input.
        warm_up: units of work before the first answer.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to the log
    started = time.perf_counter()
    work, facts = make()
    built = time.perf_counter()
    work(warm_up)
    facts |= {"built": built - started, "warmed_up": time.perf_counter() - built}
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        waited = work(int(line))
        print(json.dumps({"seconds": time.perf_counter() - started, "waited": waited or 0.0}), file=answers, flush=True)


class Contender:
    """The driver's side of a contender.

    Args:
        name: as in the tables.
        command: that starts it.
        threads: of torch.
        log: file that takes what it prints.
    """

    def __init__(self, name: str, command: Sequence[str], threads: int, log: Path) -> None:
        self.name, self.log = name, log
        env = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": import_path(),
            "LIGHTLY_DID_VERSION_CHECK": "True",  # lightly would ask a server for its newest version
        }
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=env,
            start_new_session=True,
        )
        self.facts = self._answer()
        self._signal(signal.SIGSTOP)

    def _pipe(self, pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe

    def _signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def _answer(self) -> dict[str, Any]:
        pipe = self._pipe(self.process.stdout)
        if not select.select([pipe], [], [], ANSWER_S)[0]:
            self.close()
            raise SystemExit(f"{self.name} said nothing for {ANSWER_S} s:\n{self.log.read_text()[-3000:]}")
        line = pipe.readline()
        if not line:
            raise SystemExit(f"{self.name} ended:\n{self.log.read_text()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _cpu(self) -> float:
        import psutil

        process = psutil.Process(self.process.pid)
        times = [each.cpu_times() for each in [process, *process.children(recursive=True)]]
        return sum(each.user + each.system for each in times)

    def ask(self, units: int) -> Sample:
        """Let it do some work, alone."""
        import psutil

        cpu, whole, started = self._cpu(), psutil.cpu_times(), time.perf_counter()
        self._signal(signal.SIGCONT)
        pipe = self._pipe(self.process.stdin)
        pipe.write(f"{units}\n")
        pipe.flush()
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        own, after, wall = self._cpu() - cpu, psutil.cpu_times(), time.perf_counter() - started
        busy = sum(getattr(after, kind) - getattr(whole, kind) for kind in ("user", "nice", "system"))
        foreign = max(0.0, busy - own) / wall / (os.cpu_count() or 1)
        return Sample(answer["seconds"], own, foreign, answer["waited"])

    def close(self) -> None:
        """End it, with its workers."""
        self._signal(signal.SIGCONT)
        with suppress(BrokenPipeError):  # it ended while it was asked
            self._pipe(self.process.stdin).close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self.process.wait()


@contextmanager
def started(commands: dict[str, list[str]], threads: int, folder: Path) -> Iterator[list[Contender]]:
    """The contenders, one command each, ended when the body does, or when this process is told to end."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    contenders: list[Contender] = []
    with ExitStack() as stack:  # which closes all, whatever goes wrong with one: the others would stay stopped for ever
        for name, command in commands.items():
            contenders.append(Contender(name, command, threads, folder / f"{name}.log"))
            stack.callback(contenders[-1].close)
            print(f"{name}: {contenders[-1].facts}", flush=True)
        yield contenders


def take_turns(contenders: Sequence[Contender], units: dict[str, int], rounds: int) -> dict[str, list[Sample]]:
    """Samples of each contender, one a round; the order turns."""
    samples: dict[str, list[Sample]] = {each.name: [] for each in contenders}
    for i in range(rounds):
        for j in range(len(contenders)):
            each = contenders[(i + j) % len(contenders)]
            sample = each.ask(units[each.name])
            samples[each.name].append(sample)
            print(f"round {i + 1}, {each.name}: {sample.seconds:.2f} s, others {sample.foreign:.0%}", flush=True)
    return samples


def peers(folder: Path, packages: Sequence[str] = PACKAGES) -> Path | None:
    """Python of the environment with the peers' packages and the versions of torch and torchvision that run here.

    Made by uv where it is missing. Where it can't be made the reason goes to the error output, and the answer is this Python if
    it has the packages, else None.
    """
    import torch
    import torchvision

    python = folder / "bin" / "python"
    same = [f"{each.__name__}=={each.__version__.split('+')[0]}" for each in (torch, torchvision)]
    uv = Path(sys.executable).parent / "uv"
    tool = str(uv) if uv.exists() else shutil.which("uv") or "uv"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    install = [tool, "pip", "install", "--quiet", "--python", str(python), *same, *packages]
    try:
        if not python.exists():
            subprocess.run([tool, "venv", "--quiet", "--python", version, str(folder)], check=True)
        subprocess.run(install, check=True)  # nothing to do where all is there
    except (OSError, subprocess.CalledProcessError) as error:
        here = all(importlib.util.find_spec(name) for name in packages)
        print(f"{'peers as they are here' if here else 'without peers'}: {error}", file=sys.stderr)
        return Path(sys.executable) if here else None
    return python


def versions(python: Path) -> str:
    """Of the peers' packages that are there, and whether they have an environment of their own."""
    code = (
        "import importlib.metadata as m, sys; found = {d.name.lower(): d.version for d in m.distributions()}; "
        "print(', '.join(f'{p} {found[p]}' for p in sys.argv[1:] if p in found))"
    )
    command = [str(python), "-c", code, "torch", "torchvision", "pillow", *PACKAGES]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return f"{found}, {'this environment' if python == Path(sys.executable) else 'an environment of their own'}"
