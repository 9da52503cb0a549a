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
lightly find them in the bundle of scripts/gpu_bundle.sh where they are not installed. The exit code is 1 if cells ran and none
came to a figure, 2 if what was asked for cannot be done, and 130 after Ctrl-C.
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
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # a bare machine has not installed the project

import gpu_facts  # noqa: E402
import gpu_queue  # noqa: E402
from gpu_queue import Cell, Refused, Results, read_queue  # noqa: E402

QUEUE = Path(__file__).with_name("gpu_queue.yaml")
GRACE_S = 20  # between asking a cell to end and ending it


class Runner:
    """Runs cells, one at a time.

    Args:
        args: of the command line.

    Attributes:
        ended: how the cells of this call ended, in their order.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.ended = args, list[str]()
        self.ends = time.monotonic() + 60 * args.minutes
        self.output, self.scratch = args.output.resolve(), args.scratch.resolve()
        for folder in (self.output, self.scratch):
            folder.mkdir(parents=True, exist_ok=True)
        self.log = self.output / "log.txt"
        self.results = Results(self.output, args.known)
        self.facts = gpu_facts.ask(args.device, args.bundle)
        self.site = gpu_facts.unpack(args.bundle, self.scratch)
        take_up(args.known, self.scratch)

    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def run(self, cells: Sequence[Cell]) -> None:
        """Those that are not done and fit, in their order."""
        for cell in cells:
            if self.results.done(cell, self.args.device, self.args.smoke):
                print(f"{cell.name}: done before", flush=True)
            elif not cell.fits(self.left()):
                least = cell.minutes if cell.least is None else cell.least
                print(f"{cell.name}: not now, of its {least:g} minutes {self.left() / 60:.1f} are left", flush=True)
            else:
                self.one(cell, cells)

    def one(self, cell: Cell, cells: Sequence[Cell]) -> None:
        """Run a cell, write what it found, and the report of all."""
        print(f"\n{cell.name}: {cell.answers}", flush=True)
        told, began = self.scratch / f"{cell.name}.result.json", time.monotonic()
        told.unlink(missing_ok=True)
        started, limit = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), cell.limit(self.left())
        line = {"name": cell.name, "kind": cell.kind, "answers": cell.answers, "args": cell.args}
        line |= {"smoke": self.args.smoke}
        size = self.log.stat().st_size if self.log.exists() else 0
        try:
            why = self.process(cell, told, limit)
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
        self.ended.append(status)
        report = gpu_facts.report(self.results.lines, cells, self.args.device, self.args.smoke)
        (self.output / "report.md").write_text(report)
        if status != "done":
            print(gpu_facts.tail(self.log, size, 12))
        print("\n".join(filter(None, gpu_facts.table("", line["result"]))))
        print(f"{cell.name}: {status} after {line['seconds']:.0f} s {line['reason']}", flush=True)
        gpu_facts.shorten(self.log)
        if why == "interrupted":
            raise KeyboardInterrupt

    def process(self, cell: Cell, told: Path, limit: float) -> str:
        """Run a cell in a process group of its own; returns what ended it, if not the cell itself."""
        spec = {key: getattr(cell, key) for key in ("name", "kind", "args")}
        spec |= {"needs": [module for name in cell.needs for module in gpu_queue.NEEDS[name]]}
        spec |= {"device": self.args.device, "smoke": self.args.smoke, "ends": time.time() + limit}
        spec |= {"archive": str(gpu_facts.archive(self.args.bundle))}
        spec |= {"scratch": str(self.scratch), "output": str(self.output)}
        environment = dict(os.environ, PYTHONUNBUFFERED="1", PYTHONFAULTHANDLER="1")
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(self.scratch / "inductor"))  # for the cells that follow
        environment["PYTHONPATH"] = gpu_facts.import_path(spec["needs"], self.site)
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu_cells.py"), json.dumps(spec), str(told)]
        with self.log.open("ab") as file:
            file.write(f"\n===== {cell.name}\n".encode())
            file.flush()
            size = file.tell()
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
                last = gpu_facts.tail(self.log, size, 1) or "nothing was printed"
                return "" if code == 0 else f"ended with {code}: {last[:300]}"
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


def take_up(known: Sequence[Path], scratch: Path) -> None:
    """Copy long trainings from where an earlier call kept them; one that is here already is left as it is."""
    for kept in (run for folder in known for name in ("runs", "runs-smoke") for run in (folder / name).glob("*")):
        ours = scratch / kept.parent.name / kept.name
        if not ours.exists():
            part = ours.with_name(f"{ours.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(kept, part)
            part.rename(ours)


def plan(cells: Sequence[Cell], args: argparse.Namespace) -> None:
    """Print what would run, by the estimates, and what is missing here."""
    results, left = Results(args.output, args.known), 60 * args.minutes
    for cell in cells:
        lacks = [name for name in cell.needs if not gpu_facts.here(gpu_queue.NEEDS[name], args.bundle)]
        state = f"{cell.minutes:g} min"
        if results.done(cell, args.device, args.smoke):
            state = "done before"
        elif lacks:
            state = f"no {', '.join(lacks)} here"
        elif not cell.fits(left):
            state += ", not now"
        else:
            left -= min(left, 60 * cell.minutes)
        print(f"{cell.name:<18} {state:<17} {cell.answers}")
    if lacks := gpu_facts.lacking(args.bundle):
        print(f"missing here: {', '.join(lacks)}")


def chosen(args: argparse.Namespace) -> list[Cell]:
    """The cells that are asked for.

    Raises:
        Refused: there are none of such a name, or the queue is not as it should be.
    """
    cells = read_queue(args.queue, args.smoke)
    if unknown := set(args.only or ()) - {cell.name for cell in cells}:
        there = ", ".join(cell.name for cell in cells)
        raise Refused(f"--only: no cell {', '.join(sorted(unknown))}; there are {there}")
    if args.only:
        return [cell for cell in cells if cell.name in args.only]
    if args.smoke:  # the first of each kind
        first = {cell.kind: cell.name for cell in reversed(cells)}
        return [cell for cell in cells if first[cell.kind] == cell.name]
    return cells


def main(argv: Sequence[str] | None = None) -> int:
    """Run what fits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--known", type=Path, nargs="*", action="extend", default=[], help="folders of earlier results")
    parser.add_argument("--bundle", type=Path, default=ROOT / ".gpu", help="of scripts/gpu_bundle.sh")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="every cell in miniature")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="of cells")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--queue", type=Path, default=QUEUE)
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    args = parser.parse_args(argv)
    args.scratch = args.scratch or args.output.with_name(f"{args.output.resolve().name}-scratch")
    try:
        cells = chosen(args)
        plan(cells, args)
        if args.dry_run:
            return 0
        runner = Runner(args)
        print(json.dumps(runner.facts), flush=True)
        runner.run(cells)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 1 if runner.ended and not {"done", "cut"} & {*runner.ended} else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit around this ends it as Ctrl-C does
    sys.exit(main())
