"""Pretrain an image encoder without labels, on a Ray cluster.

Without arguments: BYOL with rotation prediction on the embedded sample, on all GPUs of the machine or on up to two CPU workers.
When started again, the same command resumes from the last checkpoint.
"""

import sys

from rotssl.commands import run_command
from rotssl.commands.pretrain import run
from rotssl.config.cli import parse

if __name__ == "__main__":
    run_command(lambda: run(parse(sys.argv[1:], "jobs/pretrain.py", __doc__)))
