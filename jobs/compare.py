"""Compare the runs of an MLflow experiment: which auxiliary weight to use, for how many epochs, and what it saves.

Reads the runs logged by jobs/pretrain.py and by sweeps, prints the answer and writes a report with pictures and report.json.
"""

import math

from rotssl.commands import EXIT_OK, folder_of, run_command
from rotssl.commands.compare import METRICS, compare, default_output, show
from rotssl.config.cli import Parser
from rotssl.config.fields import ConfigError
from rotssl.tracking.store import asked_uri


def parse() -> dict[str, object]:
    """The flags, as arguments of compare()."""
    parser = Parser(prog="jobs/compare.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--experiment", metavar="NAME", required=True, help="MLflow experiment")
    text = "fields that define the baseline: KEY=VALUE,KEY=VALUE; default: all auxiliary weights are 0"
    parser.add_argument("--baseline", metavar="KEY=VALUE", help=text)
    text = "accuracy to reach, from 0 to 1; default: the final accuracy of the baseline with the same seed and length"
    parser.add_argument("--target", metavar="X", help=text)
    text = "default: report-NAME next to the sqlite file, or in the current folder if a server holds the runs"
    parser.add_argument("--output", metavar="DIR", help=f"folder for the report; {text}")
    text = "default: MLFLOW_TRACKING_URI, else mlflow.db in ./results (~/rotssl-results in a Ray job)"
    parser.add_argument("--uri", metavar="URI", help=f"URI of the tracking store; {text}")
    text = "metric to compare; linear/top1 exists for the last epoch only [default: knn/top1]"
    parser.add_argument("--metric", choices=METRICS, default="knn/top1", help=text)
    parser.add_argument("--sweep", metavar="NAME", help="compare only the trials of this sweep (name or run id)")
    given = vars(parser.parse_args())
    if given["target"] is not None:
        given["target"] = _fraction(given["target"])
    given["uri"] = asked_uri(given["uri"])
    given["output"] = folder_of(
        "--output", given["output"] or default_output(given["uri"], given["experiment"])
    ).absolute()
    return given


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise ConfigError(f"--target: got {text!r}, expected a fraction above 0 and at most 1, such as 0.7")
    return value


def main() -> int:
    """Compare and print; returns the exit code."""
    show(compare(**parse()))
    return EXIT_OK


if __name__ == "__main__":
    run_command(main)
