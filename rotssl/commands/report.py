"""The page of one run: what its encoder has learned, and what its rotation head does."""

import dataclasses
import json
from typing import Any

from rotssl import config as cfg
from rotssl.base.paths import AnyPath, filled
from rotssl.commands import folder_of, recorded, run_at
from rotssl.config.fields import ConfigError
from rotssl.config.rules import labels_used
from rotssl.config.sections import OFF
from rotssl.data.again import images_of
from rotssl.data.images import DataError
from rotssl.runs import health, journal, tested
from rotssl.runs.journal import Points
from rotssl.runs.state import RunState
from rotssl.tracking import reader, store, writer

IMAGES = 2000


def report(
    run_id: str | None,
    folder: str | None,
    uri: str,
    output: str | None = None,
    root: str | None = None,
    images: int = IMAGES,
) -> AnyPath:
    """Write the page of a run, and log it to the run in MLflow; returns the page.

    Args:
        run_id: id of the run in MLflow, or None.
        folder: folder of the run, if there is no run_id.
        uri: URI of the tracking store that has the run_id.
        output: folder for the page; None: ``report`` in the run's folder.
        root: folder of the images, if they were moved.
        images: largest number of pictures that are shown and judged.

    Raises:
        ConfigError: there is no such run, it has no checkpoint, or its images or its store cannot be read.
    """
    place = run_at(folder or reader.run_folder_of(uri, str(run_id)))
    config, state, points = recorded(place, root), RunState.read(place / "run.json", {}), journal.read(place)
    try:
        splits = images_of(config, place)
    except DataError as error:
        raise ConfigError(f"data.root: {error}") from error
    from rotssl.explain.run import explain  # with it comes torch
    from rotssl.reports import run_page

    found = explain(place, config, splits, images)
    warnings = _warnings(config, points)
    fields = cfg.flat(config)
    shown = (config.tracking.run_name, f"{state.status} ({state.reason})", points, _tested(state, place), found)
    content = run_page.page(*shown, fields, _defaults(config), warnings)
    target = place / "report" if output is None else folder_of("--output", output)
    try:
        with filled(target) as here:
            files = [here / "report.html", here / "report.json"]
            files[0].write_text(run_page.render(content))
            files[1].write_text(json.dumps(_numbers(content), indent=2, allow_nan=False) + "\n")
            if state.uri != OFF and state.run_id is not None and not store.reachable(state.uri):
                writer.log_report(state.uri, state.run_id, files)
    except OSError as error:
        raise ConfigError(f"--output: cannot write to {error.filename or target}: {error.strerror}") from error
    return target / "report.html"


def _warnings(config: cfg.ResolvedConfig, points: Points) -> list[str]:
    """What one must know to read the page of a run."""
    warnings = [f"LABELS WERE USED IN PRETRAINING: {how}."] if (how := labels_used(config)) else []
    warnings += [health.ill(points)] if health.ill(points) else []
    if points and points[max(points)].get("rotation/off"):
        warnings.append("The rotation task was switched off during the run: its head is as it was then.")
    elif "rotation" in config.active() and config.rotation.until < 1:
        warnings.append(
            f"The rotation task ended at {config.rotation.until:.0%} of the run: its head is as it was then."
        )
    return warnings


def _tested(state: RunState, place: AnyPath) -> dict[str, float]:
    """Measures on the test split that exist; nothing is measured."""
    if state.uri != OFF and state.run_id is not None and not store.reachable(state.uri):
        return reader.evaluations_of(state.uri, state.run_id, "test")
    return tested.metrics(tested.read(place))


def _defaults(config: cfg.ResolvedConfig) -> dict[str, Any]:
    schema = cfg.schema(config.method.name)
    return {key: json.loads(json.dumps(field.default)) for key, (_, field) in schema.items()}


def _numbers(content: Any) -> dict[str, Any]:
    """The numbers of the page."""
    kept = (
        "title",
        "subtitle",
        "summary",
        "warnings",
        "measures",
        "angles",
        "confusion",
        "by_class",
        "costs",
        "fields",
    )
    return {name: value for name, value in dataclasses.asdict(content).items() if name in kept}


def show(page: AnyPath) -> None:
    """Print where the page is."""
    print(f"page         {page}")
    print(f"numbers      {page.parent / 'report.json'}")
