"""Small sets of pictures of all shapes, and packing in this process."""

import io
import tarfile

import numpy as np
from PIL import Image

from rotssl.base.place import Folder
from rotssl.data.packed import Manifest
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


def members(path, **files):
    """A tar file with members given by name, with a double underscore for the dot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))


def index(folder, name="train"):
    return np.load(folder / f"{name}.npy")


def stored(folder, split="train"):
    """The image files of a split by the index, in its order."""
    manifest = Manifest.read(Folder(folder))
    shards = [(folder / shard.file).read_bytes() for shard in manifest.splits[split].shards]
    return [shards[row["shard"]][row["offset"] : row["offset"] + row["length"]] for row in index(folder, split)]
