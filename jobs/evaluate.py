"""Evaluate the encoder of a finished run on the test split, once: by kNN and a linear probe trained on the training images.

The numbers are logged to a child run in MLflow.
"""

from rotssl.commands import run_command
from rotssl.commands.evaluate import PROTOCOLS, evaluate
from rotssl.config.cli import Parser
from rotssl.config.fields import ConfigError
from rotssl.tracking.store import asked_uri


def main() -> int:
    """Evaluate and print; returns the exit code."""
    parser = Parser(prog="jobs/evaluate.py", description=__doc__, allow_abbrev=False)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", metavar="ID", help="run id in MLflow")
    which.add_argument("--checkpoint", metavar="DIR", help="folder of the run")
    text = f"comma-separated list of {', '.join(PROTOCOLS)} [default: both]"
    parser.add_argument("--protocol", metavar="NAMES", default=",".join(PROTOCOLS), help=text)
    text = "URI of the tracking store, for --run; default: MLFLOW_TRACKING_URI, else mlflow.db in ./results"
    parser.add_argument("--uri", metavar="URI", help=text)
    parser.add_argument("--data.root", metavar="DIR", dest="root", help="folder of the images, if they were moved")
    given = parser.parse_args()
    names = tuple(dict.fromkeys(given.protocol.split(",")))
    if not set(names) <= set(PROTOCOLS):
        raise ConfigError(f"--protocol: got {given.protocol!r}, expected one or more of {', '.join(PROTOCOLS)}")
    return evaluate(given.run, given.checkpoint, names, asked_uri(given.uri), given.root)


if __name__ == "__main__":
    run_command(main)
