"""Show one run on a page: its curves, the map of its features, nearest neighbours, what rotation confuses, and its costs.

Reads the newest checkpoint of the run, and pictures of its validation split. Writes report.html, which needs no network, and
report.json.
"""

from rotssl.commands import EXIT_OK, run_command
from rotssl.commands.report import IMAGES, report, show
from rotssl.config.cli import Parser
from rotssl.config.fields import ConfigError
from rotssl.tracking.store import asked_uri


def main() -> int:
    """Write the page and print its place; returns the exit code."""
    parser = Parser(prog="jobs/report.py", description=__doc__, allow_abbrev=False)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", metavar="ID", help="run id in MLflow")
    which.add_argument("--checkpoint", metavar="DIR", help="folder of the run")
    text = "folder for the page; default: report in the folder of the run"
    parser.add_argument("--output", metavar="DIR", help=text)
    text = f"largest number of pictures on the map and for the rotation head [default: {IMAGES}]"
    parser.add_argument("--images", type=int, default=IMAGES, metavar="N", help=text)
    text = "URI of the tracking store, for --run; default: MLFLOW_TRACKING_URI, else mlflow.db in ./results"
    parser.add_argument("--uri", metavar="URI", help=text)
    parser.add_argument("--data.root", metavar="DIR", dest="root", help="folder of the images, if they were moved")
    given = parser.parse_args()
    if given.images < 2:
        raise ConfigError(f"--images: got {given.images}, expected at least 2")
    show(report(given.run, given.checkpoint, asked_uri(given.uri), given.output, given.root, given.images))
    return EXIT_OK


if __name__ == "__main__":
    run_command(main)
