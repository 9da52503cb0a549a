"""Pretrain an image encoder without labels, on a Ray cluster.

With no arguments: BYOL with rotation prediction on the embedded sample, on the GPUs or the two CPU workers that the machine has.
Started again, the same command goes on from the last checkpoint.
"""

import sys

from rotssl.commands import run_command
from rotssl.commands.pretrain import run
from rotssl.config.cli import parse

if __name__ == "__main__":
    run_command(lambda: run(parse(sys.argv[1:], "jobs/pretrain.py", __doc__)))
