"""Any GPU, for as many minutes as there are: the cells of gpu_queue.yaml, first to last, each with a number or a reason.

    python benchmarks/gpu.py --minutes 8 --output DIR [--known DIR ...] [--bundle .gpu] [--only NAME ...] [--dry-run]
    python benchmarks/gpu.py --device cpu --minutes 5 --smoke --output DIR       # every kind of cell in miniature

A cell that fits into the time left runs in processes of its own, with a deadline; what it has found by then is kept. Its line is
in DIR/results.jsonl, on disk, before the next one starts, so that whatever ends this program costs one cell. Called again it
goes on with the cells that are not done, here or in the folders of --known. DIR/report.md is for people, DIR/log.txt has what
the cells printed. Data, packages, runs and their checkpoints are in --scratch (default: DIR with ``-scratch`` added to its name);
a long training goes on from there, or from the folder ``runs`` of a --known. A checkpoint of a ResNet-18 with a teacher and heads
has some 160 MB.

Needs what rotssl's core needs: torch, torchvision, timm, rich, safetensors, scipy, matplotlib, pytest. Cells that need Ray or
lightly find them in the bundle of scripts/gpu_bundle.sh where they are not installed. The exit code is 0 if some cell is done.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # a bare machine has not installed the project

import gpu_facts  # noqa: E402

QUEUE = Path(__file__).with_name("gpu_queue.yaml")
KINDS = ("pytest", "ray", "speed", "profile", "lightly", "equal_minutes", "train")
NEEDS = ("ray", "lightly")
GRACE_S = 20  # between asking a cell to end and ending it
SLACK_S = 60  # that a cell may take beyond twice its estimate: imports, the first use of a GPU


@dataclass(frozen=True)
class Cell:
    """An entry of the queue.

    Attributes:
        name: unique.
        kind: one of KINDS.
        minutes: estimate, on an H100; in miniature, on two cores.
        answers: the question.
        args: of its kind.
        needs: packages that may be missing.
        least: minutes in which a cell that can go on later gets somewhere; None: it runs as a whole.
    """

    name: str
    kind: str
    minutes: float
    answers: str
    args: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    least: float | None = None

    def fits(self, seconds: float) -> bool:
        """Whether so many seconds are enough for it."""
        return 60 * (self.minutes if self.least is None else self.least) <= seconds

    def limit(self, seconds: float) -> float:
        """Seconds that it gets of those that are left."""
        return seconds if self.least is not None else min(seconds, 2 * 60 * self.minutes + SLACK_S)


def read_queue(path: Path, smoke: bool) -> list[Cell]:
    """The cells of a file, in miniature with ``smoke``.

    Raises:
        SystemExit: what is wrong with the file, in a line.
    """
    allowed = {"name", "kind", "minutes", "answers", "args", "needs", "least", "smoke"}
    cells: list[Cell] = []
    for i, entry in enumerate(yaml.safe_load(path.read_text())):
        place = f"{path.name}, cell {i + 1}"
        if (
            not isinstance(entry, dict)
            or not {"name", "kind", "minutes", "answers", "smoke"} <= entry.keys() <= allowed
        ):
            raise SystemExit(f"{place}: expected name, kind, minutes, answers, smoke, and perhaps args, needs, least")
        if entry["kind"] not in KINDS or not set(entry.get("needs", ())) <= set(NEEDS):
            raise SystemExit(
                f"{place}: got kind {entry['kind']!r}, needs {entry.get('needs')}; expected {KINDS}, {NEEDS}"
            )
        if entry["name"] in {cell.name for cell in cells}:
            raise SystemExit(f"{place}: {entry['name']} is there twice")
        small = entry.pop("smoke")
        args, minutes = dict(entry.pop("args", {})), entry.pop("minutes")
        if smoke:
            args, minutes = args | small.get("args", {}), small["minutes"]
        least = entry.pop("least", None)
        needs = tuple(entry.pop("needs", ()))
        cells.append(
            Cell(**entry, minutes=minutes, args=args, needs=needs, least=min(least, minutes) if least else None)
        )
    return cells


class Results:
    """What was found so far, one line a cell and try.

    Args:
        output: folder of results.jsonl, which is added to.
        known: folders of earlier ones, which are read.
    """

    NAME = "results.jsonl"

    def __init__(self, output: Path, known: Sequence[Path] = ()) -> None:
        self.path = output / self.NAME
        self.lines = [line for folder in (*known, output) for line in read_results(folder / self.NAME)]

    def done(self, cell: Cell, device: str, smoke: bool) -> bool:
        """Whether a cell is done, on this kind of device and at this size."""
        return any(
            (line["name"], line["status"], line["device"]["type"], line["smoke"]) == (cell.name, "done", device, smoke)
            for line in self.lines
        )

    def add(self, line: dict[str, Any]) -> None:
        """Write a result, to the disk."""
        self.lines.append(line)
        with self.path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; one that was cut short is passed over."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


class Runner:
    """Runs cells, one at a time.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.ends = time.monotonic() + 60 * args.minutes
        self.output, self.scratch = args.output.resolve(), args.scratch.resolve()
        for folder in (self.output, self.scratch):
            folder.mkdir(parents=True, exist_ok=True)
        self.results = Results(self.output, args.known)
        self.facts = gpu_facts.facts(args.device, args.bundle)
        self.site = gpu_facts.unpack(args.bundle, self.scratch)
        for runs in (folder / "runs" for folder in args.known if (folder / "runs").is_dir()):
            shutil.copytree(runs, self.scratch / "runs", dirs_exist_ok=True)

    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def run(self, cells: Sequence[Cell]) -> None:
        """Those that are not done and fit, in their order."""
        for cell in cells:
            if self.results.done(cell, self.args.device, self.args.smoke):
                print(f"{cell.name}: done before", flush=True)
            elif not cell.fits(self.left()):
                print(
                    f"{cell.name}: not now, {cell.minutes:g} minutes are more than the {self.left() / 60:.1f} left",
                    flush=True,
                )
            else:
                self.one(cell)
                report = gpu_facts.report(self.results.lines, cells, self.args.device, self.args.smoke)
                (self.output / "report.md").write_text(report)

    def one(self, cell: Cell) -> None:
        """Run a cell and write what it found."""
        print(f"{cell.name}: {cell.answers}", flush=True)
        told, began = self.scratch / f"{cell.name}.result.json", time.monotonic()
        told.unlink(missing_ok=True)
        started, limit = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), cell.limit(self.left())
        spec = {
            "name": cell.name,
            "kind": cell.kind,
            "args": cell.args,
            "needs": cell.needs,
            "device": self.args.device,
            "smoke": self.args.smoke,
            "scratch": str(self.scratch),
            "output": str(self.output),
            "archive": str(gpu_facts.archive(self.args.bundle)),
            "ends": time.time() + limit,
        }
        line = {
            "name": cell.name,
            "kind": cell.kind,
            "answers": cell.answers,
            "args": cell.args,
            "smoke": self.args.smoke,
        }
        try:
            why = self.process(cell, spec, told, limit)
        except KeyboardInterrupt:
            why = "interrupted"
        found = json.loads(told.read_text()) if told.exists() else {}
        status = found.get("status", "failed")
        if why:
            status = "cut" if why in ("deadline", "interrupted") else "failed"
        line |= {
            "status": status,
            "reason": why or found.get("reason", ""),
            "started": started,
            "seconds": round(time.monotonic() - began, 1),
            "result": found.get("result", {}),
            **self.facts,
        }
        self.results.add(line)
        print(f"{cell.name}: {status} after {line['seconds']:.0f} s {line['reason']}", flush=True)
        if why == "interrupted":
            raise KeyboardInterrupt

    def process(self, cell: Cell, spec: dict[str, Any], told: Path, limit: float) -> str:
        """Run a cell in a process group of its own; returns what ended it, if not the cell itself."""
        environment = dict(os.environ, PYTHONUNBUFFERED="1", PYTHONFAULTHANDLER="1")
        paths = [str(ROOT), str(ROOT / "benchmarks"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        # What a cell is about comes from the bundle; what the machine has is better left alone.
        site = [str(self.site)] if self.site else []
        paths = site + paths if cell.needs else paths + site
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu_cells.py"), json.dumps(spec), str(told)]
        log = self.output / "log.txt"
        with log.open("ab") as file:
            file.write(f"\n===== {cell.name}\n".encode())
            file.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # whose end tells the cell that this program is gone
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=ROOT,
                start_new_session=True,
            )
            try:
                # A little before its deadline a cell ends by itself, if it knows how.
                code = process.wait(timeout=limit)
                return "" if code == 0 else f"ended with {code}: {gpu_facts.tail(log)}"
            except subprocess.TimeoutExpired:
                return "deadline"
            finally:
                self.end(process)

    def end(self, process: "subprocess.Popen[bytes]") -> None:
        """End what a cell started."""
        for number, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, 5)):
            try:
                os.killpg(process.pid, number)
                process.wait(timeout=patience)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue


def main(argv: Sequence[str] | None = None) -> int:
    """Run what fits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--known", type=Path, nargs="*", default=[], help="folders of earlier results")
    parser.add_argument("--bundle", type=Path, default=ROOT / ".gpu", help="of scripts/gpu_bundle.sh")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="every cell in miniature")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="of cells")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--queue", type=Path, default=QUEUE)
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    args = parser.parse_args(argv)
    args.scratch = args.scratch or args.output.with_name(f"{args.output.resolve().name}-scratch")
    cells = read_queue(args.queue, args.smoke)
    if unknown := set(args.only or ()) - {cell.name for cell in cells}:
        raise SystemExit(
            f"--only: no cell {', '.join(sorted(unknown))}; there are {', '.join(cell.name for cell in cells)}"
        )
    if args.only:
        cells = [cell for cell in cells if cell.name in args.only]
    elif args.smoke:  # the first of each kind
        first = {cell.kind: cell.name for cell in reversed(cells)}
        cells = [cell for cell in cells if first[cell.kind] == cell.name]
    results = Results(args.output, args.known)
    for cell in cells:
        state = "done before" if results.done(cell, args.device, args.smoke) else f"{cell.minutes:g} min"
        print(f"{cell.name:<32} {state:<12} {cell.answers}")
    if args.dry_run:
        return 0
    reason = gpu_facts.missing(args.device)
    if reason:
        raise SystemExit(reason)
    runner = Runner(args)
    print(json.dumps(runner.facts), flush=True)
    try:
        runner.run(cells)
    except KeyboardInterrupt:
        return 130
    return 0 if any(runner.results.done(cell, args.device, args.smoke) for cell in cells) else 1


if __name__ == "__main__":
    sys.exit(main())
