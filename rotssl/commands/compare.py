"""Comparison of an MLflow experiment: which auxiliary task and weight to use, for how many epochs, and what it saves.

Reads runs of jobs/pretrain.py and of sweeps. Writes a page, its pictures, and all numbers as ``report.json``.
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotssl.base.paths import AnyPath, filled
from rotssl.config.fields import ConfigError, nearest
from rotssl.tracking import reader, writer
from rotssl.tracking.reader import TrackedRun

if TYPE_CHECKING:  # they import numpy, scipy and matplotlib, which would delay the error of a wrong flag
    from rotssl.reports.comparison import Comparison, Recommendation
    from rotssl.reports.groups import LeftOut, Variant
    from rotssl.reports.html import Picture
    from rotssl.reports.tables import Table

METRICS = ("knn/top1", "linear/top1", "test/knn/top1", "test/linear/top1")
_HEALTH = ("feature/std", "feature/effective_rank", "loss/total", "loss/ssl")
_READ = (*METRICS, *_HEALTH, "cost/epochs", "cost/flops", "cost/device_seconds")


@dataclass(frozen=True)
class Report:
    """The results of a comparison and the files they were written to.

    Attributes:
        comparison: the numbers.
        answers: sentences about each family.
        warnings: warnings about the runs.
        tables: the tables.
        content: content of ``report.json``; keys of values that depend on measured time contain ``seconds``.
        files: the page, ``report.json`` and the pictures.
        logged_to: id of the run that has the files as artifacts, or None.
    """

    comparison: "Comparison"
    answers: Sequence[Sequence[str]]
    warnings: Sequence[str]
    tables: "Sequence[Table]"
    content: dict[str, Any]
    files: Sequence[AnyPath]
    logged_to: str | None


def default_output(uri: str, experiment: str) -> Path:
    """``report-EXPERIMENT`` next to the sqlite file, or in the current folder if a server holds the runs."""
    folder = Path(uri.removeprefix("sqlite:///")).parent if uri.startswith("sqlite:///") else Path()
    return folder / f"report-{_slug(experiment)}"


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "unnamed"


def compare(
    uri: str,
    experiment: str,
    output: AnyPath,
    baseline: str | None = None,
    target: float | None = None,
    metric: str = "knn/top1",
    only: Collection[str] | None = None,
    parent: str | None = None,
    sweep: str | None = None,
) -> Report:
    """Compare the runs of an experiment, and write the report.

    Args:
        uri: URI of the tracking store.
        experiment: name of the experiment.
        output: folder for the report; created if missing.
        baseline: ``key=value,key=value`` that define the baseline; None: all auxiliary weights are 0.
        target: level of the metric to reach; None: the final value of the baseline with the same seed and budget.
        metric: one of METRICS.
        only: ids of the runs to compare; None: all.
        parent: id of the run that the report is logged to; None: the sweep that all compared runs belong to, if there is one.
        sweep: name or id of a sweep; only its trials are compared, and the report is logged to it.

    Raises:
        ConfigError: the store can't be read, there is nothing to compare, or the report can't be written.
    """
    records = reader.read_runs(uri, experiment, _READ)
    if sweep is not None:
        parent = find_sweep(records, sweep)
        only = {record.run_id for record in records if record.parent == parent} | reader.trial_ids(uri, parent)
    from rotssl.reports import evaluations, findings, groups, tables
    from rotssl.reports.comparison import compare_cells

    runs, left_out = groups.sift([record for record in records if only is None or record.run_id in only], metric)
    owners = {run.parent for run in runs}
    if parent is None and len(owners) == 1:
        parent = owners.pop()
    cells = groups.cells_of(runs, _axes(records, parent))
    _check(cells, left_out, experiment, metric)
    found = compare_cells(cells, left_out, groups.conditions(baseline, cells), metric, target)
    facts, warnings = findings.facts(cells, metric, left_out)
    choices = [(choice, *findings.headline(found, choice)) for choice in found.recommendations]
    content = _content(found) | {
        "experiment": experiment,
        "facts": dict(facts),
        "warnings": warnings,
        "recommendations": [_recommendation(choice, lines, timed) for choice, lines, timed in choices],
        "evaluations": evaluations.content_of(records, runs),
    }
    told = [[*lines, *timed] for _, lines, timed in choices]
    shown = [*tables.tables_of(found), *evaluations.tables_of(records, runs)]
    report = Report(found, told, warnings, shown, content, (), None)
    try:
        with filled(output) as here:
            files = _write(report, experiment, here, facts)
            logged = parent if parent is not None and writer.log_report(uri, parent, files) else None
    except OSError as error:
        raise ConfigError(f"--output: cannot write to {error.filename or output}: {error.strerror}") from error
    return Report(found, told, warnings, report.tables, content, [output / file.name for file in files], logged)


def find_sweep(records: Sequence[TrackedRun], name: str) -> str:
    """The id of the sweep with a name or an id.

    Raises:
        ConfigError: there is none, or there are several.
    """
    sweeps = [record for record in records if record.tags.get("kind") == "sweep"]
    matching = [record.run_id for record in sweeps if name in (record.name, record.run_id)]
    if not matching:
        names = sorted({record.name for record in sweeps})
        raise ConfigError(f"--sweep: got {name!r}, expected one of {', '.join(names) or 'none'}{nearest(name, names)}")
    if len(matching) > 1:
        raise ConfigError(
            f"--sweep: got {name!r}, the name of {len(matching)} sweeps, expected an id: {', '.join(matching)}"
        )
    return matching[0]


def _axes(records: Sequence[TrackedRun], sweep: str | None) -> list[str] | None:
    """The fields varied by a sweep; None if unknown, or if recipes were varied, which may differ in any field."""
    tags = next((record.tags for record in records if record.run_id == sweep), {})
    try:
        axes = [str(axis) for axis in json.loads(tags["sweep.axes"])]
    except (KeyError, ValueError, TypeError):  # a sweep of before, or no sweep; tags can be edited
        return None
    return None if "recipe" in axes else axes


def _check(cells: "Sequence[Variant]", left_out: "Sequence[LeftOut]", experiment: str, metric: str) -> None:
    if sum(len(cell.runs) for cell in cells) > 1:
        return
    why = "; ".join(f"{entry.run.name}: {entry.reason}" for entry in left_out[:3])
    more = f"; and {len(left_out) - 3} more" if len(left_out) > 3 else ""
    left = f" (left out: {why}{more})" if why else ""
    if cells:
        raise ConfigError(
            f"nothing to compare in {experiment!r}: all complete runs have the same configuration and length, "
            f"{cells[0].family}, {cells[0].variant}{left}"
        )
    raise ConfigError(f"nothing to compare in {experiment!r}: no complete run with {metric}{left}")


def _content(found: "Comparison") -> dict[str, Any]:
    runs = [
        {
            "family": cell.family,
            "variant": cell.variant,
            "budget": budget,
            "seed": seed,
            "name": run.name,
            "run_id": run.run_id,
            "final": run.points[budget][found.metric],
        }
        for cell in found.cells
        for budget, by_seed in cell.runs.items()
        for seed, run in by_seed.items()
    ]
    return {
        "metric": found.metric,
        "target": found.target,
        "baseline": dict(found.baseline.fields),
        "configurations": [
            {"family": cell.family, "variant": cell.variant, "fields": cell.axes} for cell in found.cells
        ],
        "runs": runs,
        "budgets": [asdict(row) for row in found.rows],
        "cheapest": [asdict(row) for row in found.cheapest],
        "equal": {cost: [asdict(fit) for fit in fits] for cost, fits in found.equal.items()},
        "left_out": [
            {"name": entry.run.name, "run_id": entry.run.run_id, "reason": entry.reason} for entry in found.left_out
        ],
    }


def _recommendation(choice: "Recommendation", lines: Sequence[str], timed: Sequence[str]) -> dict[str, Any]:
    return {
        "family": choice.family,
        "budget": choice.best.budget,
        "best": choice.best.variant,
        "second": choice.second and choice.second.variant,
        "lead": choice.lead and asdict(choice.lead),
        "separated": choice.separated,
        "cheaper": choice.cheaper,
        "ranking": asdict(choice.ranking),
        "text": lines,
        "text_seconds": timed,
    }


def _write(report: Report, experiment: str, output: Path, facts: Sequence[tuple[str, str]]) -> list[Path]:
    from rotssl.reports import html, tables

    found = report.comparison
    pictures = _draw(found, output)
    count = sum(len(by_seed) for cell in found.cells for by_seed in cell.runs.values())
    content = html.Page(
        title=f"Comparison of the runs in {experiment}",
        subtitle=f"{count} runs, {tables.name_of(found.metric)} on validation; baseline: {found.baseline}",
        answers=report.answers,
        warnings=report.warnings,
        pictures=pictures,
        tables=report.tables,
        facts=facts,
    )
    files = [output / "report.html", output / "report.json"]
    files[0].write_text(html.render(content))
    files[1].write_text(json.dumps(report.content, indent=2, sort_keys=True, allow_nan=False) + "\n")
    return [*files, *(picture.path for picture in pictures)]


def _draw(found: "Comparison", output: Path) -> "list[Picture]":
    from rotssl.reports import plots
    from rotssl.reports.html import Picture

    pictures = []
    families = list(dict.fromkeys(cell.family for cell in found.cells))
    baselines = {row.baseline for row in found.rows}
    for i, family in enumerate(families, 1):
        cells = [cell for cell in found.cells if cell.family == family]
        path = output / (f"convergence-{i}-{_slug(family)}.png" if len(families) > 1 else "convergence.png")
        plots.save_curves(
            cells, {cell.variant for cell in cells if (family, cell.variant) in baselines}, found.metric, path
        )
        caption = (
            "Lines show the mean over seeds, bands the range; baselines are black. Against FLOPs and device time, a point is at "
            "the mean cost of its epoch. Runs of different lengths are separate runs with their own schedules (if they were "
            "measured only at their end, lines join the lengths)."
        )
        pictures.append(Picture(path, f"Convergence: {family}", caption))
    path = output / "final.png"
    plots.save_heat_map(found.cells, found.metric, path)
    caption = "Mean over seeds at the last epoch, in percent. The best of each row is bold; hatched cells have no complete run."
    return [*pictures, Picture(path, "Final accuracy", caption)]


def show(report: Report) -> None:
    """Print the report to stdout: recommendations, warnings, tables and the paths of the files."""
    from rich.text import Text

    from rotssl.reports import terminal

    for answer in report.answers:
        terminal.show(*(Text(line, style="bold" if i == 0 else "") for i, line in enumerate(answer)), Text())
    terminal.show(*(Text(f"warning: {warning}") for warning in report.warnings))
    terminal.show(*map(terminal.rich_table, report.tables))
    print(f"\npage         {report.files[0]}")
    print(f"numbers      {report.files[1]}")
    for path in report.files[2:]:
        print(f"picture      {path}")
    if report.logged_to is not None:
        print(f"MLflow       artifacts 'report' of run {report.logged_to}")
