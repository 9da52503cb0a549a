"""Take one step of a run apart: the step at which it broke down, or any other one.

Trains from the newest checkpoint before the step up to it, in this process, and shows where its numbers stop being finite.
"""

from rotssl.commands import run_command
from rotssl.commands.replay import replay
from rotssl.config.cli import Parser


def main() -> int:
    """Replay and print; returns the exit code."""
    parser = Parser(prog="jobs/replay.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--step", type=int, metavar="N", help="number of the step in the run, from 0 [default: the bad one]"
    )
    parser.add_argument("--data.root", metavar="DIR", dest="root", help="folder of the images, if they were moved")
    given = parser.parse_args()
    return replay(given.folder, given.step, given.root)


if __name__ == "__main__":
    run_command(main)
