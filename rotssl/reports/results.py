"""What the functions of rotssl.api return, with what a notebook shows of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotssl import config as cfg
from rotssl.base.paths import AnyPath
from rotssl.config.sections import OFF
from rotssl.reports import notebook
from rotssl.reports.notebook import Points

if TYPE_CHECKING:
    from rotssl.commands.compare import Report
    from rotssl.lifecycle import Run


@dataclass(frozen=True)
class Pretrained:
    """A run, as it is on disk after a call.

    Attributes:
        name: its name.
        folder: its folder, with checkpoints, encoder and curves.
        run_id: its id in MLflow; None without MLflow.
        status: ``finished``, ``failed``, ``stopped`` (by train.stop_after), ``pruned`` (by a sweep's scheduler), ``interrupted``
            or ``new``.
        reason: why it has this status.
        config: its resolved configuration, by dotted names.
        points: its metrics, epoch by epoch.
    """

    name: str
    folder: AnyPath
    run_id: str | None
    status: str
    reason: str
    config: dict[str, Any] = field(repr=False)
    points: Points = field(repr=False)

    @classmethod
    def of(cls, run: "Run") -> "Pretrained":
        """What is on disk of a run now."""
        state = run.state
        made = run.name, run.folder, None if state.uri == OFF else state.run_id, state.status, state.reason
        return cls(*made, cfg.flat(run.config), Points(run.points))

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the last epoch; empty if there is none."""
        return dict(self.points[max(self.points)]) if self.points else {}

    def _repr_html_(self) -> str:
        known = {"status": f"{self.status}: {self.reason}", "folder": self.folder, "MLflow": self.run_id or "off"}
        return notebook.facts(self.name, known, self.status == "failed") + self.points._repr_html_()


@dataclass(frozen=True)
class Compared:
    """A comparison of runs.

    Attributes:
        answers: what to do, in words: for each family of runs, sentences.
        warnings: what is to be known about the runs.
        content: all numbers, as in report.json.
        page: the page, report.html; the other files are in its folder.
    """

    answers: Sequence[Sequence[str]]
    warnings: Sequence[str] = field(repr=False)
    content: dict[str, Any] = field(repr=False)
    page: AnyPath
    _html: str = field(repr=False)

    @classmethod
    def of(cls, report: "Report") -> "Compared":
        """What a notebook shows of a comparison."""
        drawn = [file for file in report.files if isinstance(file, Path) and file.suffix == ".png"]
        html = notebook.comparison(report.answers, report.warnings, report.tables, drawn)
        return cls(report.answers, report.warnings, report.content, report.files[0], html)

    def _repr_html_(self) -> str:
        return self._html


@dataclass(frozen=True)
class Ablated:
    """A sweep, as it is on disk after a call.

    Attributes:
        name: its name.
        folder: its folder.
        status: ``finished``; ``failed`` if some trials are not, or if MLflow lacks some.
        trials: its runs.
        comparison: what they say; None if there is too little to compare.
    """

    name: str
    folder: AnyPath
    status: str
    trials: Sequence[Pretrained] = field(repr=False)
    comparison: Compared | None = field(repr=False)

    def _repr_html_(self) -> str:
        rows = []
        for trial in self.trials:
            last = (f"{trial.metrics[key]:.1%}" if key in trial.metrics else "" for key in ("knn/top1", "linear/top1"))
            rows.append([trial.name, trial.status, str(max(trial.points, default=0)), *last])
        runs = notebook.table(["run", "status", "epochs", "kNN", "linear probe"], rows, names=2)
        title = notebook.facts(self.name, {"status": self.status, "folder": self.folder}, self.status == "failed")
        return title + (self.comparison._repr_html_() if self.comparison else "") + runs


@dataclass(frozen=True)
class Evaluated:
    """What was measured on the test split.

    Attributes:
        folder: folder of the run.
        metrics: its measures, such as ``knn/top1``, as fractions.
    """

    folder: AnyPath
    metrics: dict[str, float]

    def _repr_html_(self) -> str:
        rows = [[key, f"{value:.4g}"] for key, value in sorted(self.metrics.items())]
        return notebook.table(["on the test split", "value"], rows)


@dataclass(frozen=True)
class Reported:
    """The page of a run.

    Attributes:
        page: report.html; its numbers are beside it, in report.json.
        summary: what it says, in words.
    """

    page: AnyPath
    summary: Sequence[str]

    def _repr_html_(self) -> str:
        return notebook.comparison([self.summary], (), (), ()) + notebook.facts("", {"page": self.page})
