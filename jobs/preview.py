"""Draw what a recipe shows to the model (views, local crops, rotations, tiles), without training.

    python jobs/preview.py --config jobs/recipes/NAME.yaml [--section.field VALUE ...] [--output FILE]

Accepts the flags of jobs/pretrain.py. Reads 64 class-balanced images of the data set; with --smoke, synthetic ones.
"""

import sys

from rotssl.commands import run_command
from rotssl.commands.preview import preview

if __name__ == "__main__":
    run_command(lambda: preview(sys.argv[1:], __doc__))
