"""Faults at random moments of a real run, which must end as if nothing had happened.

    python scripts/chaos.py [--faults 20] [--seed 0] [--minutes 15] [--kinds worker,driver,...] [--folder FOLDER]

Two Ray workers train a small run, which a server of MLflow records. Programs are killed, ended and stopped and files damaged, in
an order and at moments that follow from the seed; a program that ended is started again with the same command. At the end the
weights must be those of a quiet run bit for bit, the journal and MLflow must have each epoch once, and no process and no shared
memory may be left. Exit code 1 if not. Linux only.
"""

import argparse
import hashlib
import itertools
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from chaos_faults import KINDS, NAME, ROOT, Chaos, Unsound

SAME = ("loss/total", "loss/ssl", "loss/rotation", "rotation/accuracy", "knn/top1", "feature/std", "optim/lr")
SHARED_MEMORY = Path("/dev/shm")


def weights(run_dir: Path) -> str:
    """A hash of the model and the optimizer of the newest checkpoint."""
    import torch

    from rotssl.runs import checkpoint

    state, found = checkpoint.load(checkpoint.found(run_dir)[0]), hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(value.contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else repr(value).encode())
        elif isinstance(value, dict):
            for key in value:
                found.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            found.update(repr(value).encode())

    add({key: state[key] for key in ("model", "optimizer")})
    return found.hexdigest()


def shared_memory() -> set[str]:
    """What lies in shared memory."""
    return {path.name for path in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()


def quiet(chaos: Chaos) -> float:
    """Run without faults; returns its seconds."""
    started = time.monotonic()
    storage = chaos.folder / "quiet"
    command = chaos.command(storage, f"sqlite:///{chaos.folder}/quiet.db")
    with (chaos.folder / "quiet.log").open("wb") as log:
        done = subprocess.run(
            command, env=chaos.env, cwd=ROOT, stdout=log, stderr=log, timeout=chaos.deadline - started
        )
    if done.returncode:
        raise Unsound(f"the quiet run ended with {done.returncode}")
    return time.monotonic() - started


def disturb(chaos: Chaos, kinds: Sequence[str]) -> Iterator[tuple[str, int, float, int]]:
    """Inject the faults; yields of each its kind, the epoch it hit, seconds to the next epoch, and starts of the driver."""
    order = list(itertools.islice(itertools.cycle(kinds), chaos.faults))
    chaos.random.shuffle(order)
    pace = 0.5
    for number, kind in enumerate(order):
        due = 2 * number + 1
        chaos.wait(lambda due=due: chaos.epoch() >= due, f"epoch {due}", tend=True)
        time.sleep(chaos.random.uniform(0, pace))
        before, starts, hit = chaos.epoch(), chaos.starts, time.monotonic()
        KINDS[kind](chaos)
        if before < chaos.epochs:
            chaos.wait(
                lambda before=before: chaos.epoch() > before, f"an epoch after fault {number + 1}, {kind}", tend=True
            )
        yield kind, before, time.monotonic() - hit, chaos.starts - starts


def check(chaos: Chaos, memory: set[str]) -> list[str]:
    """What is not as after a quiet run; once all programs have ended."""
    from mlflow.tracking import MlflowClient

    from rotssl.runs import journal

    wrong = []
    calm = chaos.folder / "quiet" / "rotssl" / NAME
    if weights(chaos.run_dir) != weights(calm):
        wrong.append("the weights are others than the quiet run's")
    ours, theirs = (
        {epoch: {key: point.get(key) for key in SAME} for epoch, point in journal.read(folder).items()}
        for folder in (chaos.run_dir, calm)
    )
    wrong += [f"epoch {epoch} has other metrics" for epoch in theirs if ours.get(epoch) != theirs[epoch]]
    client = MlflowClient(f"sqlite:///{chaos.folder}/server.db")
    experiments = [e.experiment_id for e in client.search_experiments() if e.name == "rotssl"]
    runs = client.search_runs(experiments)
    if [run.info.status for run in runs] != ["FINISHED"]:
        wrong.append(f"MLflow has runs with the states {', '.join(run.info.status for run in runs)}")
    for run in runs:
        for key in SAME:
            steps = [point.step for point in client.get_metric_history(run.info.run_id, key)]
            if steps != list(range(1, chaos.epochs + 1)):
                wrong.append(f"MLflow has {key} at {steps}")
    wrong += [f"process {p.pid} is left: {' '.join(p.cmdline())[:80]}" for p in chaos.processes()]
    wrong += [f"shared memory is left: {name}" for name in sorted(shared_memory() - memory)]
    wrong += [f"a file is left: {path}" for path in chaos.run_dir.rglob("*.part")]
    return wrong


@contextmanager
def ending(chaos: Chaos) -> Iterator[None]:
    """End all programs that are left when an error ends the body."""
    try:
        yield
    except BaseException:
        for process in chaos.processes():
            with suppress(psutil.Error):
                process.kill()
        raise


def gone(chaos: Chaos) -> None:
    """End the server, and wait until the processes of Ray have ended, too."""
    assert chaos.server is not None
    os.killpg(chaos.server.pid, signal.SIGTERM)
    chaos.server.wait()
    until = time.monotonic() + 30
    while chaos.processes() and time.monotonic() < until:
        time.sleep(0.2)


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--folder", type=Path, help="kept; by default a temporary one")
    args = parser.parse_args()
    if unknown := set(args.kinds.split(",")) - KINDS.keys():
        parser.error(f"unknown kind {', '.join(sorted(unknown))}")
    sys.path.insert(0, str(ROOT))
    folder = args.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    started, memory = time.monotonic(), shared_memory()
    chaos = Chaos(folder.resolve(), args.faults, args.seed, started + 60 * args.minutes)
    seconds: dict[str, list[float]] = {}
    try:
        with ending(chaos):
            calm = quiet(chaos)
            print(f"quiet run: {chaos.epochs} epochs, {calm:.0f} s", flush=True)
            begun = time.monotonic()
            chaos.start_server()
            chaos.start_driver()
            for number, (kind, epoch, taken, starts) in enumerate(disturb(chaos, args.kinds.split(",")), 1):
                seconds.setdefault(kind, []).append(taken)
                print(f"{number:>3} {kind:<15} after epoch {epoch:>3}: {taken:5.1f} s, {starts} starts", flush=True)
            chaos.wait(chaos.tend, "the end of the run")
            disturbed = time.monotonic() - begun
            gone(chaos)
        wrong = check(chaos, memory)
    except Unsound as error:
        wrong = [str(error)]
        disturbed = calm = float("nan")
    print(f"{sum(map(len, seconds.values()))} faults, {chaos.starts} starts, which ended with {chaos.ends}")
    print(
        f"{disturbed:.0f} s, {disturbed - calm:.0f} s more than the quiet run; median seconds from fault to next epoch:"
    )
    print(", ".join(f"{kind} {statistics.median(each):.1f}" for kind, each in sorted(seconds.items())))
    print("\n".join(f"WRONG: {line}" for line in wrong) or "weights bit for bit, each epoch once, nothing left behind")
    if not wrong and args.folder is None:
        shutil.rmtree(folder)
    elif wrong:
        print(f"see {folder}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
