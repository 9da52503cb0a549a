"""Cells that show whether it runs: the tests, and a run under Ray Train that is killed and goes on."""

import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

from gpu_cell import Cell, NotHere, TimeUp

from rotssl.runs import checkpoint, journal

ROOT = Path(__file__).parent.parent
WRAP_UP_S = 10  # that a cell keeps for its end


# --- tests ---------------------------------------------------------------------------------------------------------------------


def pytest(cell: Cell) -> None:
    """Run tests, and count as they go; args: paths, options.

    The settings are of this cell alone: the project's own ask for a plugin that a bare machine lacks.
    """
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    ini = cell.scratch / "pytest.ini"
    ini.write_text("[pytest]\nmarkers =\n" + "".join(f"    {marker}\n" for marker in settings["markers"]))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(ini),
        "--rootdir",
        str(ROOT),
        "-p",
        "no:cacheprovider",
        "-v",
        "-rfE",
    ]
    command += [*cell.args.get("options", ()), *(str(ROOT / path) for path in cell.args["paths"])]
    counts: Counter[str] = Counter()
    failures: dict[str, str] = {}
    cell.tell(ran=" ".join(cell.args["paths"]))
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    # As wide as reasons may be, which pytest cuts off at the terminal's width.
    process = subprocess.Popen(command, text=True, cwd=ROOT, env=dict(os.environ, COLUMNS="300"), **pipes)
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="")
        if found := re.match(r"(\S*::.*?) (PASSED|FAILED|ERROR|SKIPPED)", line):
            counts[found[2].lower()] += 1
            if found[2] in ("FAILED", "ERROR"):
                failures[found[1]] = ""  # the reason comes with the summary, if that comes
            told = [{"test": name, "reason": reason} for name, reason in failures.items()]
            cell.tell(counts=dict(counts), last=found[1], failures=told)
        elif found := re.match(r"(FAILED|ERROR) (\S*::.*?)(?: - (.*))?$", line):
            failures[found[2]] = found[3] or ""
    code = process.wait()
    cell.tell(failures=[{"test": name, "reason": reason} for name, reason in failures.items()])
    if code not in (0, 1) or not counts:
        raise RuntimeError(f"pytest ended with {code}")
    if set(counts) == {"skipped"}:
        raise NotHere("all tests were skipped")


# --- Ray Train -----------------------------------------------------------------------------------------------------------------


def ray(cell: Cell) -> None:
    """Under Ray Train: a run to its end, and one that is killed and goes on; args: fields, epochs.

    Raises:
        RuntimeError: what came out is not as it should be.
    """
    folder = cell.scratch / "ray"
    shutil.rmtree(folder, ignore_errors=True)
    epochs = cell.args["epochs"]
    checks: dict[str, bool] = {}

    def check(name: str, holds: bool) -> None:
        checks[name] = bool(holds)
        cell.tell(checks=checks)

    def sound(run: Path) -> None:
        points = journal.read(run)
        check(f"{run.name}: every epoch once", list(points) == list(range(1, epochs + 1)) and not _repeated(run))
        finite = all(math.isfinite(value) for point in points.values() for value in point.values())
        check(f"{run.name}: finite", finite)
        state = next(checkpoint.latest(run), {"epoch": 0})
        check(f"{run.name}: checkpoint of the last epoch", state["epoch"] == epochs)
        check(f"{run.name}: encoder exported", (run / "encoder.safetensors").exists())

    whole, killed = folder / "rotssl" / "whole", folder / "rotssl" / "killed"
    started = time.perf_counter()
    process = _start(cell, folder, "whole")
    _wait_for(process, whole, 1, cell.left())
    cell.tell(**{"seconds to the end of the first epoch": time.perf_counter() - started})
    check("whole: ended with 0", process.wait(timeout=cell.left()) == 0)
    if not checks["whole: ended with 0"]:
        raise RuntimeError("the run failed; the log has its output")
    sound(whole)
    tags = json.loads((whole / "tags.json").read_text())
    rates = [point["throughput/images_per_second"] for point in journal.read(whole).values()]
    cell.tell(device=tags["device"], precision=tags["precision"], **{"images/s": statistics.median(rates)})
    check("whole: on the device", tags["device"] == cell.device.type)
    process = _start(cell, folder, "killed")
    _wait_for(process, killed, 2, cell.left())
    process.kill()
    process.wait()
    before = journal.read(killed)
    check("killed: in the middle", 2 <= len(before) < epochs)
    started = time.perf_counter()
    second = folder / "second.txt"
    try:
        with second.open("w") as output:
            code = _start(cell, folder, "killed", output).wait(timeout=cell.left())
    finally:
        print(second.read_text())
    check("killed: ended with 0 the second time", code == 0)
    cell.tell(**{"seconds of the second start": time.perf_counter() - started})
    sound(killed)
    # A run that started anew would come to the same journal, in which the first line of an epoch stands.
    check("killed: went on from its checkpoint", "going on after epoch" in second.read_text())
    after = journal.read(killed)
    check("killed: its epochs stand", all(before[epoch].items() <= after[epoch].items() for epoch in before))
    if not all(checks.values()):
        raise RuntimeError("; ".join(name for name, holds in checks.items() if not holds))


def _start(cell: Cell, folder: Path, name: str, output: Any = None) -> "subprocess.Popen[bytes]":
    fields = {
        "scaling.num_workers": 1,
        "scaling.use_gpu": str(cell.cuda).lower(),
        "tracking.uri": "off",
        "tracking.run_name": name,
        "storage.path": folder,
        "train.epochs": cell.args["epochs"],
        **cell.args.get("fields", {}),
    }
    flags = [word for key, value in fields.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, str(ROOT / "jobs" / "pretrain.py"), *flags]
    both: dict[str, Any] = {"stdout": output, "stderr": subprocess.STDOUT} if output is not None else {}
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, **both)


def _wait_for(process: "subprocess.Popen[bytes]", run: Path, epochs: int, seconds: float) -> None:
    """Until a run has so many epochs, its command has ended, or there is no time left."""
    end = time.monotonic() + seconds
    while len(journal.read(run)) < epochs and process.poll() is None:
        if time.monotonic() > end:
            raise TimeUp(f"no {epochs} epochs by the deadline")
        time.sleep(0.05)


def _repeated(run: Path) -> list[tuple[int, str]]:
    """What stands twice in a journal."""
    from rotssl.runs.journal import Journal

    lines = [json.loads(line) for line in (run / Journal.NAME).read_text().splitlines()]
    told = Counter((line["epoch"], key) for line in lines for key in line if key != "epoch")
    return [key for key, count in told.items() if count > 1]
