"""Evaluate the encoder of a finished run on the test split, once for each protocol: kNN and a linear probe, or others.

The numbers, their protocol cards and which images were right go to child runs in MLflow, and to the run's folder.
"""

from rotssl.commands import run_command
from rotssl.commands.evaluate import evaluate
from rotssl.config import evaluating
from rotssl.config.cli import Parser, add_fields
from rotssl.tracking.store import asked_uri


def main() -> int:
    """Evaluate and print; returns the exit code."""
    parser = Parser(prog="jobs/evaluate.py", description=__doc__, allow_abbrev=False)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", metavar="ID", help="run id in MLflow")
    which.add_argument("--checkpoint", metavar="DIR", help="folder of the run")
    text = f"comma-separated list of {', '.join(evaluating.PROTOCOLS)} [default: knn,linear]"
    parser.add_argument("--protocol", metavar="NAMES", default="knn,linear", help=text)
    text = "student or teacher [default: the one that the run has evaluated]"
    parser.add_argument("--network", metavar="NAME", choices=("student", "teacher"), help=text)
    text = "URI of the tracking store, for --run; default: MLFLOW_TRACKING_URI, else mlflow.db in ./results"
    parser.add_argument("--uri", metavar="URI", help=text)
    text = "another labelled data set to train classifiers on and to classify [default: the run's]"
    parser.add_argument("--data.name", metavar="NAME", dest="name", help=text)
    text = "folder of the images: of the other data set, or of the run's if they were moved"
    parser.add_argument("--data.root", metavar="DIR", dest="root", help=text)
    add_fields(parser, evaluating.schema())
    given = parser.parse_args()
    protocols, options = evaluating.protocols_of(given.protocol), evaluating.build(vars(given))
    return evaluate(
        *(given.run, given.checkpoint, protocols, asked_uri(given.uri), given.root),
        options=options,
        network=given.network,
        name=given.name,
    )


if __name__ == "__main__":
    run_command(main)
