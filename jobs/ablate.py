"""Run a sweep over auxiliary weights, epoch budgets, methods and seeds on a Ray cluster and report what the auxiliary task saves.

Each budget is a separate run with its own schedule. When started again, the same command runs only what is missing.
"""

import sys

from rotssl.commands import run_command
from rotssl.commands.ablate import run
from rotssl.config.sweep import parse

if __name__ == "__main__":
    run_command(lambda: run(parse(sys.argv[1:], "jobs/ablate.py", __doc__)))
