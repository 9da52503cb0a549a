"""The paper's analysis of why instance similarity learns slowly, with our runs: see docs/analysis.md.

``sweep`` reads the runs of an experiment, ``gradients`` the checkpoints of a run, ``overlap`` the views of a recipe. Each prints
what it found, and writes numbers and a plot.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rotssl.base.paths import AnyPath, filled, write_whole
from rotssl.commands import EXIT_OK, say
from rotssl.config.fields import ConfigError
from rotssl.reports.paper import STUDIES
from rotssl.tracking import reader

_READ = (
    "knn/top1",
    "linear/top1",
    "test/knn/top1",
    "test/linear/top1",
    "feature/std",
    "feature/effective_rank",
    "loss/ssl",
)


def sweep(uri: str, experiment: str, study: str, metric: str, output: AnyPath, only: str | None = None) -> int:
    """Set the runs of an experiment beside a table or figure of the paper; returns the exit code.

    Args:
        uri: URI of the tracking store.
        experiment: name of the experiment.
        study: a key of ``STUDIES``.
        metric: of the runs' last epoch.
        output: folder for plot, numbers and text.
        only: name or id of a sweep whose trials alone are read.

    Raises:
        ConfigError: the store can't be read, or its runs do not vary the study's field.
    """
    from rotssl.commands.compare import find_sweep

    records = reader.read_runs(uri, experiment, _READ)
    if only is not None:
        parent = find_sweep(records, only)
        kept = {record.run_id for record in records if record.parent == parent} | reader.trial_ids(uri, parent)
        records = [record for record in records if record.run_id in kept]
    from rotssl.reports import findings, groups, studies, study_plot

    runs, left_out = groups.sift(records, metric)
    asked = STUDIES[study]
    found = studies.found_in(runs, asked, metric)
    warnings = [f"left out: {entry.run.name}: {entry.reason}" for entry in left_out]
    warnings = findings.labels_used(runs) + warnings
    lines = studies.reading(found, asked)
    numbers = {"study": study, "warnings": warnings, "reading": lines, **studies.content(found, asked, metric)}
    words = [f"{asked.title} ({asked.source}), {experiment}", "", *warnings, *lines]
    try:
        with filled(output) as here:
            study_plot.save(found, asked, metric, here / f"{study}.png")
            _write(here, study, numbers, words)
    except OSError as error:
        raise ConfigError(f"--output: cannot write to {error.filename or output}: {error.strerror}") from error
    _show(warnings, lines, [output / f"{study}.{kind}" for kind in ("png", "json", "md")])
    return EXIT_OK


def _write(folder: Path, name: str, numbers: dict[str, Any], words: Sequence[str]) -> None:
    write_whole(folder / f"{name}.json", json.dumps(numbers, indent=2, sort_keys=True, allow_nan=False) + "\n")
    write_whole(folder / f"{name}.md", "\n".join(words) + "\n")


def _show(warnings: Sequence[str], lines: Sequence[str], files: Sequence[AnyPath]) -> None:
    for warning in warnings:
        say(f"warning: {warning}")
    print(*lines, sep="\n")
    print("files", *files)
