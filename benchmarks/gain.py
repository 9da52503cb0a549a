"""Does the rotation task gain at equal compute, for every method?

    python benchmarks/gain.py time STAGE... [--work FOLDER] [--again] [--rounds 5]
    python benchmarks/gain.py run STAGE... [--jobs 2] [--work FOLDER] [--limit-minutes M]
    python benchmarks/gain.py report

The stages are those of gain_plan.yaml. ``time`` measures the seconds of a step of their forms over plain's: at equal compute a
form whose step takes r plain ones has 1/r of the epochs, rounded, where r within 5% of 1 counts as 1. ``run`` runs the cells of
the stages that are not there yet, each in one process and thread. Called again it goes on where it was ended, also within a run;
several may work on the same folders. ``report`` writes README.md and a picture of each final stage.

All is in benchmarks/results/gain/ (--results): cells/ has one JSON file a run, with its curve, and which images it classified
correctly. Needs $ROTSSL_DATA.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import gain_cells
import gain_steps
from common import RESULTS
from gain_cells import Cell
from gain_plan import PLAIN, Plan, Results, Stage
from gain_report import write


def untimed(plan: Plan, stage: Stage, results: Results) -> list[str]:
    """Forms that need a ratio of their steps and have none, by data and method."""
    rows = (row for data in stage.data for method in stage.methods for row in plan.rows(stage, data, method, results))
    return [f"{r.candidate.data} {r.candidate.method} {r.candidate.label}" for r in rows if not r.cells]


def take_times(plan: Plan, stages: Sequence[Stage], results: Results, work: Path, again: bool, rounds: int) -> None:
    """Measure the ratios of the stages' forms."""
    done = list[tuple[str, str, dict[str, object]]]()
    for stage in stages:
        for data, method in ((data, method) for data in stage.data for method in stage.methods):
            plain, forms = dict[str, object](), dict[str, dict[str, object]]()
            for candidate in plan.candidates(stage, data, method):
                key = results.steps.key(data, method, candidate.fields)
                if candidate.form == PLAIN:
                    plain = plain or dict(candidate.fields)
                elif key not in done and (again or results.steps.find(data, method, candidate.fields) is None):
                    done.append(key)
                    forms[candidate.label] = dict(candidate.fields)
            if forms and not plain:
                raise SystemExit(f"{stage.name}: has no plain form to time the others against")
            if forms:
                found = gain_steps.measure(data, method, plain, forms, work, plan.common, rounds)
                results.steps.add(found)
                shown = ", ".join(f"{entry['form']} {entry['ratio']:.3f}" for entry in found)
                print(f"{data} {method}: {shown}", flush=True)


def run(plan: Plan, stages: Sequence[Stage], results: Results, work: Path, jobs: int, minutes: float) -> int:
    """Run the stages' cells, and start none after so many minutes; returns how many could not be run."""
    until = time.monotonic() + 60 * minutes
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=8) as pool:
        flying: dict[Future[str], Cell] = {}
        elsewhere, broken = set[str](), set[str]()
        while True:
            now, needed = time.monotonic(), list[Cell]()
            if now < until:
                needed = [cell for stage in stages for cell in plan.needed(stage, results) if cell.name not in broken]
            busy = {cell.name for cell in flying.values()}
            free = list({cell.name: cell for cell in needed if cell.name not in busy}.values())
            # Last come those that another process runs, to be there if it ends early, or to go on when it is done.
            for cell in sorted(free, key=lambda cell: cell.name in elsewhere)[: jobs - len(flying)]:
                patience = until - now if cell.name in elsewhere else 0.0
                flying[pool.submit(gain_cells.run, cell, results.cells, work, plan.common, patience)] = cell
            if not flying:
                return len(broken)
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                cell = flying.pop(future)
                try:
                    line = future.result()
                except Exception as error:
                    broken.add(cell.name)
                    line = f"{cell.name}: {type(error).__name__}: {error}"
                if line:
                    print(line, flush=True)
                else:
                    elsewhere.add(cell.name)


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--plan", type=Path, default=Path(__file__).with_suffix("").with_name("gain_plan.yaml"))
    shared.add_argument("--results", type=Path, default=RESULTS / "gain")
    several = argparse.ArgumentParser(add_help=False)
    several.add_argument("stages", nargs="+", metavar="STAGE")
    several.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "rotssl-gain", help="of runs under way"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    timing = commands.add_parser("time", parents=[shared, several])
    timing.add_argument("--again", action="store_true", help="also what was timed before")
    timing.add_argument("--rounds", type=int, default=5, help="how often each step is timed")
    running = commands.add_parser("run", parents=[shared, several])
    running.add_argument("--jobs", type=int, default=2)
    running.add_argument("--limit-minutes", type=float, default=float("inf"), help="start no run after so many minutes")
    commands.add_parser("report", parents=[shared])
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    plan = Plan(args.plan)
    results = Results(args.results, plan.common)
    if args.command == "report":
        print(write(plan, results))
        return 0
    if unknown := set(args.stages) - plan.stages.keys():
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; the plan has {', '.join(plan.stages)}")
    stages, work = [plan.stages[name] for name in args.stages], args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if args.command == "time":
        take_times(plan, stages, results, work, args.again, args.rounds)
        return 0
    if missing := [form for stage in stages for form in untimed(plan, stage, results)]:
        parser.error(f"not timed: {missing[0]} and {len(missing) - 1} more; gain.py time measures them")
    return 1 if run(plan, stages, results, work, args.jobs, args.limit_minutes) else 0


if __name__ == "__main__":
    sys.exit(main())
