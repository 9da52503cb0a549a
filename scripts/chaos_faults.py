"""The faults of chaos.py, and the programs that they hit."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
NAME, MARK = "chaos", "ROTSSL_CHAOS"
SHARED_MEMORY = Path("/dev/shm")
PAUSE_S = 3.0  # that a stopped process stays stopped, and a killed server away
RETRY_S = 1.0  # between starts while workers of the last one still hold the run


class Unsound(Exception):
    """What is not as it must be."""


class Chaos:
    """The run, the server and the faults.

    Args:
        folder: of everything that is written.
        faults: number of faults; the run has two epochs for each, and some to end with.
        seed: of their order and moments.
        deadline: on the monotonic clock.
    """

    def __init__(self, folder: Path, faults: int, seed: int, deadline: float) -> None:
        self.folder, self.faults, self.deadline = folder, faults, deadline
        self.random, self.epochs = random.Random(seed), 2 * faults + 4
        self.mark = uuid.uuid4().hex
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.driver: subprocess.Popen[bytes] | None = None
        self.server: subprocess.Popen[bytes] | None = None
        self.starts, self.ends = 0, list[int]()
        self.memory = set[str]()
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.env = kept | {MARK: self.mark, "RAY_TMPDIR": str(folder / "ray"), "OMP_NUM_THREADS": "1"}

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.folder / "results" / "rotssl" / NAME

    def command(self, storage: Path, uri: str) -> list[str]:
        """The command of the run."""
        fields = {
            "data.name": "synthetic",
            "data.limit": 2560,
            "data.image_size": 16,
            "method.hidden_dim": 32,
            "method.out_dim": 16,
            "train.batch_size": 64,
            "train.epochs": self.epochs,
            "scaling.num_workers": 2,
            "tracking.uri": uri,
            "tracking.run_name": NAME,
            "storage.path": storage,
        }
        flags = [part for key, value in fields.items() for part in (f"--{key}", str(value))]
        return [sys.executable, str(ROOT / "jobs" / "pretrain.py"), *flags]

    def start_server(self) -> None:
        """Start MLflow's server."""
        store = f"sqlite:///{self.folder}/server.db"
        command = [str(Path(sys.executable).with_name("mlflow")), "server", "--backend-store-uri", store]
        command += [
            "--artifacts-destination",
            str(self.folder / "artifacts"),
            "--port",
            str(self.port),
            "--workers",
            "1",
        ]
        with (self.folder / "server.log").open("ab") as log:
            self.server = subprocess.Popen(
                command, env=self.env, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )

    def answers(self) -> bool:
        """Whether the server takes connections."""
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def start_driver(self) -> None:
        """Start the run, or go on with it."""
        self.starts += 1
        with (self.folder / "driver.log").open("ab") as log:
            self.driver = subprocess.Popen(
                self.command(self.folder / "results", f"http://127.0.0.1:{self.port}"),
                env=self.env,
                stdout=log,
                stderr=log,
                cwd=ROOT,
            )

    def tend(self) -> bool:
        """Start the run again if it ended; returns whether it is finished."""
        assert self.driver is not None
        code = self.driver.poll()
        if code is None:
            return False
        self.ends.append(code)
        if code == 0:
            return True
        time.sleep(RETRY_S)
        self.start_driver()
        return False

    def wait(self, condition: Callable[[], bool], what: str, tend: bool = False) -> None:
        """Wait for something.

        Raises:
            Unsound: the deadline has passed, or the run finished before.
        """
        while not condition():
            if time.monotonic() > self.deadline:
                raise Unsound(f"time is over, waiting for {what}")
            if tend and self.tend() and not condition():
                raise Unsound(f"the run finished, waiting for {what}")
            time.sleep(0.05)

    def epoch(self) -> int:
        """The last epoch in the journal."""
        from rotssl.runs import journal

        return max(journal.read(self.run_dir), default=0)

    def processes(self) -> list[psutil.Process]:
        """All processes that the faults may hit, and that must be gone at the end."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def note_memory(self) -> None:
        """Remember the files in shared memory that the run's processes have mapped now; the server's are not ours."""
        for process in self.processes():
            with suppress(OSError):
                if self.server is not None and os.getpgid(process.pid) == self.server.pid:
                    continue
                maps = Path(f"/proc/{process.pid}/maps").read_text()
                self.memory |= {line.split()[-1] for line in maps.splitlines() if f" {SHARED_MEMORY}/" in line}

    def named(self, *words: str) -> list[psutil.Process]:
        """Those with a word in their command."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                if any(word in " ".join(process.cmdline()[:1]) for word in words):
                    found.append(process)
        return found

    def worker(self) -> psutil.Process:
        """A worker that trains, at random."""
        found: list[psutil.Process] = []

        def there() -> bool:
            found[:] = sorted(self.named("TrainWorker"), key=lambda process: process.pid)
            return bool(found)

        self.wait(there, "a worker", tend=True)
        return self.random.choice(found)

    def end_driver(self, how: signal.Signals) -> None:
        """Send the driver a signal, and wait until it has ended."""
        assert self.driver is not None
        self.driver.send_signal(how)
        self.wait(
            lambda: self.driver is not None and self.driver.poll() is not None, f"the driver to end after {how.name}"
        )


def kill_worker(chaos: Chaos) -> None:
    """Kill -9 of a worker."""
    with suppress(psutil.NoSuchProcess):
        chaos.worker().kill()


def stop_worker(chaos: Chaos) -> None:
    """A worker stands still for some seconds."""
    with suppress(psutil.NoSuchProcess):
        worker = chaos.worker()
        worker.suspend()
        time.sleep(PAUSE_S)
        worker.resume()


def kill_driver(chaos: Chaos) -> None:
    """Kill -9 of the driver."""
    chaos.end_driver(signal.SIGKILL)


def end_driver(chaos: Chaos) -> None:
    """SIGTERM of the driver, as `ray job stop` sends it."""
    chaos.end_driver(signal.SIGTERM)


def kill_raylet(chaos: Chaos) -> None:
    """Kill -9 of the node's raylet."""
    for process in chaos.named("raylet"):
        process.kill()


def kill_gcs(chaos: Chaos) -> None:
    """Kill -9 of the head's control store."""
    for process in chaos.named("gcs_server"):
        process.kill()


def kill_server(chaos: Chaos) -> None:
    """Kill -9 of MLflow's server, which is back after some seconds."""
    assert chaos.server is not None
    chaos.wait(chaos.answers, "the server's answer", tend=True)
    os.killpg(chaos.server.pid, signal.SIGKILL)
    chaos.server.wait()
    time.sleep(PAUSE_S)
    chaos.start_server()


def freeze_server(chaos: Chaos) -> None:
    """MLflow's server stands still for some seconds."""
    assert chaos.server is not None
    chaos.wait(chaos.answers, "the server's answer", tend=True)
    os.killpg(chaos.server.pid, signal.SIGSTOP)
    time.sleep(PAUSE_S)
    os.killpg(chaos.server.pid, signal.SIGCONT)


def _newest(chaos: Chaos) -> Path:
    from rotssl.runs import checkpoint

    return checkpoint.found(chaos.run_dir)[0] / checkpoint.FILE


def flip_bit(chaos: Chaos) -> None:
    """A bit of the newest checkpoint is flipped while nothing runs."""
    chaos.end_driver(signal.SIGKILL)
    path = _newest(chaos)
    content = bytearray(path.read_bytes())
    content[chaos.random.randrange(len(content))] ^= 1 << chaos.random.randrange(8)
    path.write_bytes(content)


def tear_checkpoint(chaos: Chaos) -> None:
    """The newest checkpoint is cut short while nothing runs."""
    chaos.end_driver(signal.SIGKILL)
    path = _newest(chaos)
    os.truncate(path, chaos.random.randrange(path.stat().st_size))


def tear_journal(chaos: Chaos) -> None:
    """A line of the journal is left unfinished."""
    chaos.end_driver(signal.SIGKILL)
    with (chaos.run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'{"epoch": 1, "loss/to')


def empty_record(chaos: Chaos) -> None:
    """run.json is empty, as after a power failure."""
    chaos.end_driver(signal.SIGKILL)
    (chaos.run_dir / "run.json").write_bytes(b"")


KINDS: dict[str, Callable[[Chaos], None]] = {
    "worker": kill_worker,
    "worker_stopped": stop_worker,
    "driver": kill_driver,
    "sigterm": end_driver,
    "raylet": kill_raylet,
    "gcs": kill_gcs,
    "server": kill_server,
    "server_frozen": freeze_server,
    "checkpoint_bit": flip_bit,
    "checkpoint_torn": tear_checkpoint,
    "journal_torn": tear_journal,
    "record_empty": empty_record,
}
