"""The paper's analysis of why self-supervised methods learn slowly, with runs of one's own (docs/analysis.md).

sweep: the runs of an experiment beside a table or figure of the paper.
"""

import argparse

from rotssl.commands import analyze, folder_of, run_command
from rotssl.commands.compare import METRICS
from rotssl.config.cli import Parser
from rotssl.reports.paper import STUDIES
from rotssl.tracking.store import asked_uri


def parse() -> argparse.Namespace:
    """The flags."""
    parser = Parser(prog="jobs/analyze.py", description=__doc__, allow_abbrev=False)
    kinds = parser.add_subparsers(dest="kind", required=True, parser_class=Parser)
    sweep = kinds.add_parser("sweep", allow_abbrev=False, help="the runs of a sweep beside the paper's")
    sweep.add_argument("--experiment", metavar="NAME", required=True, help="MLflow experiment")
    sweep.add_argument("--study", choices=STUDIES, required=True, help="table or figure of the paper")
    sweep.add_argument("--metric", choices=METRICS, default="linear/top1", help="[default: linear/top1]")
    sweep.add_argument("--sweep", metavar="NAME", help="only the trials of this sweep (name or run id)")
    text = "default: MLFLOW_TRACKING_URI, else mlflow.db in ./results (~/rotssl-results in a Ray job)"
    sweep.add_argument("--uri", metavar="URI", help=f"URI of the tracking store; {text}")
    sweep.add_argument("--output", metavar="DIR", help="folder for the files [default: analysis-NAME]")
    return parser.parse_args()


def main() -> int:
    """Analyse and print; returns the exit code."""
    given = parse()
    output = folder_of("--output", given.output or f"analysis-{given.experiment}")
    return analyze.sweep(
        asked_uri(given.uri), given.experiment, given.study, given.metric, output.absolute(), given.sweep
    )


if __name__ == "__main__":
    run_command(main)
