"""The runs below a storage path: state, epoch, images a second, time left, and when somebody last worked on them.

A run whose state is ``stale`` should be running, and nobody has worked on it for a minute: the same command resumes it.
"""

from rotssl.commands import run_command
from rotssl.commands.status import status
from rotssl.config import default_storage
from rotssl.config.cli import Parser


def main() -> int:
    """Print the table; returns the exit code."""
    parser = Parser(prog="jobs/status.py", description=__doc__, allow_abbrev=False)
    text = "default: ./results (~/rotssl-results in a Ray job)"
    parser.add_argument("storage", metavar="PATH", nargs="?", help=f"storage.path of the runs; {text}")
    parser.add_argument("--experiment", metavar="NAME", help="only the runs of this experiment")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each run")
    given = parser.parse_args()
    return status(given.storage or default_storage(), given.experiment, given.json)


if __name__ == "__main__":
    run_command(main)
