"""Pack images into a set that runs read from any place: tar files with the images as they are, an index, and a manifest.

    python jobs/pack.py SOURCE SET [--holdout 0.02] [--on_bad skip] [--resize 512 --quality 95]

SOURCE is a folder of class folders (also below train/, val/ and test/), of WebDataset's tar files, of Parquet files with image
bytes, or of idx files as MNIST has them. SET is a folder, or an address such as s3://bucket/prefix. A packing that was ended goes
on where it was when the same command is given again.
"""

from rotssl.commands import run_command
from rotssl.commands.pack import pack
from rotssl.config.cli import Parser
from rotssl.config.fields import ConfigError
from rotssl.packing.packer import PER_SHARD
from rotssl.packing.shards import Options


def main() -> int:
    """Pack, and print what the set holds; returns the exit code."""
    parser = Parser(prog="jobs/pack.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("set", metavar="SET")
    text = "share of each class of train that becomes validation, if there is none [default: 0]"
    parser.add_argument("--holdout", type=float, default=0.0, metavar="SHARE", help=text)
    text = "what is done about images that cannot be read: stop, or leave them out and list them [default: error]"
    parser.add_argument("--on_bad", choices=("error", "skip"), default="error", help=text)
    text = "reduce images whose short side is longer to so many pixels; others stay as they are"
    parser.add_argument("--resize", type=int, metavar="PIXELS", help=text)
    parser.add_argument("--quality", type=int, default=95, help="of JPEG, for reduced images [default: 95]")
    parser.add_argument("--workers", type=int, metavar="N", help="processes [default: one for each core]")
    parser.add_argument(
        "--ray", action="store_true", help="pack on all cores of a Ray cluster; SET must be in reach of it"
    )
    parser.add_argument("--images", type=int, default=PER_SHARD, metavar="N", help=f"in a shard [default: {PER_SHARD}]")
    parser.add_argument(
        "--image_column", default="", metavar="NAME", help="of Parquet files [default: found by its name]"
    )
    parser.add_argument(
        "--label_column", default="", metavar="NAME", help="of Parquet files [default: found by its name]"
    )
    given = parser.parse_args()
    limits = {
        "holdout": (0, 0.9),
        "resize": (8, 65535),
        "quality": (1, 100),
        "workers": (1, 4096),
        "images": (1, 10**6),
    }
    for name, (low, high) in limits.items():
        value = getattr(given, name)
        if value is not None and not low <= value <= high:
            raise ConfigError(f"--{name}: got {value}, expected {low} to {high}")
    options = Options(given.resize, given.quality)
    columns = given.image_column, given.label_column
    skip = given.on_bad == "skip"
    return pack(given.source, given.set, options, given.holdout, skip, given.workers, given.ray, columns, given.images)


if __name__ == "__main__":
    run_command(main)
