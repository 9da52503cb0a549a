"""A picture of what a recipe shows to the model: views, local crops, rotations, tiles; without training.

    python jobs/preview.py --config jobs/recipes/NAME.yaml [--section.field VALUE ...] [--output FILE]

Takes the flags of jobs/pretrain.py. Reads 64 images, class-balanced, of the data set, or with --smoke synthetic ones.
"""

import sys

from rotssl.commands import run_command
from rotssl.commands.preview import preview

if __name__ == "__main__":
    run_command(lambda: preview(sys.argv[1:], __doc__))
