"""Export the encoder of a run: for torchvision, timm, ONNX or Hugging Face, and into MLflow's model registry.

Each format is read again by its library, and must give the same features. In Python, rotssl.load_encoder reads runs and exports.
"""

from rotssl.commands import run_command
from rotssl.commands.export import DEFAULT, FORMATS, export, formats_of
from rotssl.config.cli import Parser
from rotssl.tracking.store import asked_uri


def main() -> int:
    """Export and print; returns the exit code."""
    parser = Parser(prog="jobs/export.py", description=__doc__, allow_abbrev=False)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", metavar="ID", help="run id in MLflow")
    which.add_argument("--checkpoint", metavar="DIR", help="folder of the run")
    text = f"comma-separated list of {', '.join(FORMATS)}, or all: those that are files and fit [default: {DEFAULT}]"
    parser.add_argument("--format", metavar="NAMES", default=DEFAULT, help=text)
    parser.add_argument("--output", metavar="DIR", help="folder to write to [default: export in the run's folder]")
    text = "student, teacher, or auto: the one that the run evaluated [default: auto]"
    parser.add_argument("--network", metavar="NAME", default="auto", help=text)
    parser.add_argument("--model", metavar="NAME", help="of the registered model, for mlflow [default: the run's name]")
    text = "licence of the weights, for the model card, as Hugging Face names it [default: not stated]"
    parser.add_argument("--licence", metavar="ID", help=text)
    text = "URI of the tracking store, for --run; default: MLFLOW_TRACKING_URI, else mlflow.db in ./results"
    parser.add_argument("--uri", metavar="URI", help=text)
    given = parser.parse_args()
    names, uri = formats_of(given.format), asked_uri(given.uri)
    return export(given.run, given.checkpoint, names, given.output, given.network, uri, given.model, given.licence)


if __name__ == "__main__":
    run_command(main)
