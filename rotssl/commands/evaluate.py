"""The driver of an evaluation: the encoder of a finished run on the test split."""

import sys
from collections.abc import Sequence

from rotssl import assessment
from rotssl.commands import EXIT_FAILED, EXIT_OK, run_at, say
from rotssl.config.evaluating import Options
from rotssl.config.fields import ConfigError
from rotssl.data.images import DataError
from rotssl.evaluation.crew import WorkersGone
from rotssl.reports import terminal
from rotssl.runtimes import torchrun
from rotssl.tracking import reader


def evaluate(
    run_id: str | None,
    folder: str | None,
    protocols: Sequence[str],
    uri: str,
    root: str | None = None,
    options: Options | None = None,
    network: str | None = None,
    name: str | None = None,
) -> int:
    """Carry out jobs/evaluate.py; returns the exit code. The numbers are those of ``assessment.assess``.

    Args:
        run_id: id of the run in MLflow, or None.
        folder: folder of the run, if there is no run_id.
        protocols: some of PROTOCOLS.
        uri: URI of the tracking store that has the run_id.
        root: folder of the images, if they were moved, or of the other data set.
        options: how to measure, and on which workers.
        network: student or teacher; None: the one that the run has evaluated.
        name: another data set than the run's.

    Raises:
        ConfigError: there is no such run, it is not finished, or it has no test split or no store.
    """
    if (group := torchrun.group()) is not None:
        raise ConfigError(
            f"jobs/evaluate.py: torchrun has started {group.count} processes of it, which would each measure everything; "
            f"start it once, with --scaling.num_workers {group.count}"
        )
    place = run_at(folder or reader.run_folder_of(uri, str(run_id)))
    try:
        found = assessment.assess(place, protocols, options or Options(), network, name, root, say, print)
    except (DataError, WorkersGone) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    if not found.new:
        print("already measured:")
    show(found)
    return EXIT_OK


def show(found: assessment.Assessed) -> None:
    """Print what is known of a run on test, and where it is kept if there is no store."""
    from rotssl.reports import evaluations

    more = [row for row in evaluations.rows(found.measures) if row[0] not in ("knn", "linear")]
    terminal.show(terminal.measures(f"{found.name} on the test split", found.measures, "test", more))
    if found.kept is not None:
        print(f"not recorded in MLflow, because the run is not; saved in {found.kept}")
