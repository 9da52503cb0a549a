"""A sweep of many trials at once on MLflow's server and PostgreSQL: is every point there once, and how long does an epoch take?

    python benchmarks/tracking_server.py [--trials 16] [--epochs 6] [--logged 40] [--parts sweep writers]

Starts PostgreSQL and MLflow's server with logins on it, as the manifests in cluster/kubernetes do, and Ray with as many logical
CPUs as there are trials; then jobs/ablate.py with all trials at once. Compares the tables in PostgreSQL with the journals of the
trials. Then one process, and as many as there are trials, log epochs of the same metrics without a pause: the time is that of
Tracker.sync for one epoch, seen from the client. Needs the extras server and cluster, and PostgreSQL. Writes
benchmarks/results/tracking_server_DATE.md.
"""

import argparse
import datetime
import json
import math
import multiprocessing
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from common import RESULTS, command, commit, machine

from rotssl.runs import journal
from rotssl.runs.journal import Points

ROOT = RESULTS.parent.parent
READY_S = 300  # until all writers have to be
METRICS = 19  # of an epoch with rotation and kNN
Rows = Counter[tuple[str, str, int, float]]
_start: Any = None
SYSTEM = "system/"  # MLflow's own metrics of the machine, which are in no journal


def sweep_file(folder: Path, name: str, trials: int, epochs: int) -> Path:
    """A sweep of tiny trials, all at once: two weights and as many seeds as make so many trials."""
    file = folder / f"{name}.yaml"
    content = {
        "sweep": {"seeds": math.ceil(trials / 2), "concurrency": trials},
        "grid": {"rotation.weight": [0, 1.0]},
        "data": {"name": "fashion-mnist-sample", "limit": 256},
        "method": {"name": "byol", "hidden_dim": 32, "out_dim": 16},
        "train": {"batch_size": 64, "epochs": epochs},
        "evaluation": {"linear": False},
    }
    file.write_text(yaml.safe_dump(content))
    return file


@contextmanager
def ray_of(cpus: int, folder: Path) -> Iterator[dict[str, str]]:
    """A Ray of so many logical CPUs on this machine; yields what leads to it."""
    from tests.conftest import free_port
    from tests.programs import started, wait_for

    token, port = folder / "token", free_port()
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # a node that is told to end would wait half a minute
    ports = [f"--port={port}", f"--dashboard-port={free_port()}"]
    size = [f"--num-cpus={cpus}", "--object-store-memory=300000000"]
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--head", *ports, *size, "--block"]
    with started(ray, folder / "ray.log", os.environ | env) as process:
        wait_for(lambda: "Ray runtime started" in process.told(), process)
        try:
            yield env | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
        finally:
            process.terminate()  # with --block it ends all that it has started
            process.wait()


def journals(storage: Path, experiment: str) -> dict[str, Rows]:
    """What has to be in MLflow: the points of each trial of a sweep, by the id of its run."""
    found = {}
    for file in sorted((storage / experiment).glob("*/run.json")):
        if (file.parent / journal.Journal.NAME).exists():  # the sweep has a run of its own, without points
            run_id = json.loads(file.read_text())["run_id"]
            found[run_id] = rows_of(run_id, journal.read(file.parent))
    return found


def rows_of(run_id: str, points: Points) -> Rows:
    """The rows of a run in MLflow's table of metrics."""
    return Counter((run_id, key, at, value) for at in points for key, value in points[at].items())


def differences(tables: Any, expected: Mapping[str, Rows]) -> list[str]:
    """How MLflow's tables differ from the journals; empty if each point is there once, and nothing else."""
    ids = list(expected)
    query = "select run_uuid, key, step, value, is_nan from metrics where run_uuid = any(%s) and key not like %s"
    rows = tables.execute(query, [ids, f"{SYSTEM}%"]).fetchall()
    there = Counter((run, key, step, math.nan if odd else value) for run, key, step, value, odd in rows)
    wanted = sum(expected.values(), Counter())
    lines = [f"{count} times too few: {row}" for row, count in (wanted - there).items()]
    lines += [f"{count} times too many: {row}" for row, count in (there - wanted).items()]
    # What MLflow shows in its table of runs: the value of the last step.
    last: dict[tuple[str, str], tuple[int, float]] = {}
    for run, key, step, value in wanted:
        last[run, key] = max(last.get((run, key), (-1, 0.0)), (step, value))
    query = query.replace("from metrics", "from latest_metrics")
    shown = {(run, key): (step, value) for run, key, step, value, _ in tables.execute(query, [ids, f"{SYSTEM}%"])}
    lines += [
        f"shown {shown.get(place)}, last {last.get(place)}: {place}"
        for place in shown | last
        if shown.get(place) != last.get(place)
    ]
    return lines


def together(start: Any) -> None:
    """Set up a writer's process: ``start`` is what all of them wait for."""
    global _start
    _start = start


def write(uri: str, name: str, point: Mapping[str, float], epochs: int) -> tuple[str, Points, list[float]]:
    """Log epochs to a run of its own without a pause, once all writers are ready: its id, its points, seconds of each epoch."""
    from rotssl.tracking import writer
    from rotssl.tracking.follower import progress

    run_id = writer.open_run(uri, "writers", name, None, {}, {}, Path())
    tracker = writer.Tracker(uri, run_id)
    points = {1: dict(point)}
    assert tracker.sync(points, progress(points, epochs))  # asks what there is, and opens the connection
    _start.wait(READY_S)
    taken = []
    for epoch in range(2, epochs + 2):
        points[epoch] = {key: value + epoch for key, value in point.items()}
        began = time.perf_counter()
        assert tracker.sync(points, progress(points, epochs))
        taken.append(time.perf_counter() - began)
    return run_id, points, taken


def writers(uri: str, count: int, point: Mapping[str, float], epochs: int) -> tuple[dict[str, Rows], list[float]]:
    """So many processes that log at once: what has to be in MLflow, and the seconds of each epoch."""
    context = multiprocessing.get_context("spawn")
    expected, seconds = {}, list[float]()
    with ProcessPoolExecutor(count, context, together, [context.Barrier(count)]) as processes:
        asked = [processes.submit(write, uri, f"{count} writers, {number}", point, epochs) for number in range(count)]
        for answer in asked:
            run_id, points, taken = answer.result()
            expected[run_id] = rows_of(run_id, points)
            seconds += taken
    return expected, seconds


def row(label: str, seconds: Sequence[float]) -> str:
    """A row of the table."""
    ms = [1000 * value for value in seconds]
    last = statistics.quantiles(ms, n=10)[-1]
    return f"| {label} | {len(ms)} | {statistics.median(ms):.0f} | {last:.0f} | {max(ms):.0f} |"


def count(found: Mapping[str, Rows]) -> int:
    """The number of points."""
    return sum(sum(rows.values()) for rows in found.values())


def of_sweep(server: Any, database: Any, work: Path, trials: int, epochs: int) -> tuple[list[str], list[str]]:
    """Run the sweep: lines of the result, and how the tables differ from the journals."""
    file = sweep_file(work, "many", trials, epochs)
    places = ["--storage.path", work / "results", "--tracking.uri", server.uri]
    argv = [sys.executable, "jobs/ablate.py", "--config", file, *places]
    with ray_of(trials, work / "ray") as leads:
        began = time.monotonic()
        subprocess.run([*map(str, argv)], env=os.environ | leads, cwd=ROOT, check=True)
        whole = time.monotonic() - began
    found = journals(work / "results", "many")
    if len(found) != trials:
        raise SystemExit(f"{len(found)} of {trials} trials have a journal")
    with database.connect() as tables:
        wrong = differences(tables, found)
    lines = [
        f"A sweep of {trials} trials of {epochs} epochs, all at once, in {whole:.0f} s: {count(found)} points in the journals, "
        f"{len(wrong)} missing in PostgreSQL, twice there, or in no journal.",
    ]
    return lines, wrong


def of_writers(server: Any, database: Any, writing: int, epochs: int) -> tuple[list[str], list[str]]:
    """Time one writer, and many: lines of the result, and how the tables differ from what was written."""
    point = {f"metric/{number}": number / 7 for number in range(METRICS)}
    one, of_one = writers(server.uri, 1, point, epochs)
    many, of_many = writers(server.uri, writing, point, epochs)
    with database.connect() as tables:
        wrong = differences(tables, one | many)
    lines = [
        f"Writers without a pause; an epoch has {METRICS} metrics and two tags, and is one request. {count(one | many)} points, "
        f"{len(wrong)} missing, twice, or not written.",
        "",
        "| logging an epoch | epochs | median, ms | 90th percentile, ms | longest, ms |",
        "|---|---|---|---|---|",
        row("one writer", of_one),
        row(f"{writing} writers at once", of_many),
    ]
    return lines, wrong


def main() -> None:
    """Start everything, run, compare, measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=6, help="of a trial")
    parser.add_argument("--logged", type=int, default=40, help="epochs that each writer logs")
    parser.add_argument("--parts", nargs="+", choices=("sweep", "writers"), default=["sweep", "writers"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    sys.path.append(str(ROOT))  # the servers are those of the tests
    from tests.cluster import services

    if reason := services.missing():
        raise SystemExit(reason)
    lines = [
        f"# Many trials at once on MLflow's server and PostgreSQL, {datetime.date.today()}",
        "",
        f"Command: `{command()}`, commit {commit()}. Once.",
        f"Machine: {machine()}; servers, Ray and writers share its cores.",
        f"MLflow with two workers and logins. Load average before: {os.getloadavg()[0]:.1f}.",
    ]
    wrong = list[str]()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        for name in ("mlflow", "ray"):
            (work / name).mkdir()
        with (
            services.postgres() as database,
            services.mlflow_server(database, work / "mlflow") as server,
        ):
            os.environ.update(server.login)
            for part in args.parts:
                if part == "sweep":
                    more, bad = of_sweep(server, database, work, args.trials, args.epochs)
                else:
                    more, bad = of_writers(server, database, args.trials, args.logged)
                lines += ["", *more]
                wrong += bad
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"tracking_server_{datetime.date.today()}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), *wrong[:20], sep="\n")
    if wrong:
        raise SystemExit("the tables are not what the journals say")


if __name__ == "__main__":
    main()
