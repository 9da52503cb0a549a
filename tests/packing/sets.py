"""Small sets of pictures of all shapes, and packing in this process."""

import numpy as np
from PIL import Image

from rotssl.packing import packer
from rotssl.packing.shards import Options, make
from rotssl.packing.sources import look

ORIENTATION = 0x0112


def picture(path, width, height, seed=0, orientation=1, **options):
    """A smooth picture, upright or stored as its orientation tag says."""
    few = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)
    image = Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    if orientation > 1:
        options["exif"] = Image.Exif()
        options["exif"][ORIENTATION] = orientation
    image.save(path, **options)
    return path


def pictures(root, each=8, splits=("train", "val")):
    """Two classes in each split, of many sizes and all eight orientations."""
    sizes = np.random.default_rng(0).integers(20, 140, (2 * each * len(splits), 2)).tolist()
    for s, split in enumerate(splits):
        for c, name in enumerate(("bee", "wasp")):
            for i in range(each):
                k = (s * 2 + c) * each + i
                picture(root / split / name / f"{i}.jpg", *sizes[k], k, i % 8 + 1, quality=92)
    return root


def here(tasks, options, address):
    """Make the shards one after the other."""
    return [make(task, options, address) for task in tasks]


def packed(source, to, run=here, options=None, holdout=0.0, per_shard=5, skip=False):
    """Pack a source; returns the manifest."""
    planned = packer.plan(look(str(source)), options or Options(), holdout, per_shard)
    return packer.pack(planned, str(to), run, skip)


def files(folder):
    """All files of a folder by name, with their content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
