"""Draw the embedded sample from the idx files of Fashion-MNIST.

    python scripts/make_sample.py RAW_FOLDER

5,000 train and 1,000 validation images from its train file, 1,000 test images from its test file, class-balanced, fixed seed.
The result is byte for byte the same wherever this runs on the same files.
"""

import hashlib
import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np

TARGET = Path(__file__).resolve().parent.parent / "rotssl" / "data" / "sample"
SEED = 20221023  # the first day of ECCV 2022


def read_idx(path: Path) -> np.ndarray:
    """The array of unsigned bytes in an idx file."""
    content = path.read_bytes()
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def draw(rng: np.random.Generator, labels: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    """Disjoint sets of indices with the same number of each class, in shuffled order."""
    parts: list[list[np.ndarray]] = [[] for _ in sizes]
    for label in range(10):
        own = rng.permutation(np.flatnonzero(labels == label))
        start = 0
        for part, size in zip(parts, sizes, strict=True):
            part.append(own[start : start + size // 10])
            start += size // 10
    return [rng.permutation(np.concatenate(part)) for part in parts]


def main(raw: Path) -> None:
    """Write images.npz and source.json."""
    files = {
        name: raw / f"{name}-ubyte"
        for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    }
    data = {name: read_idx(path) for name, path in files.items()}
    rng = np.random.default_rng(SEED)
    train, validation = draw(rng, data["train-labels-idx1"], [5000, 1000])
    (test,) = draw(rng, data["t10k-labels-idx1"], [1000])
    arrays = {}
    for split, source, index in (
        ("train", "train", train),
        ("validation", "train", validation),
        ("test", "t10k", test),
    ):
        arrays[f"{split}_images"] = data[f"{source}-images-idx3"][index]
        arrays[f"{split}_labels"] = data[f"{source}-labels-idx1"][index]
    TARGET.mkdir(exist_ok=True)
    target = TARGET / "images.npz"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(
                zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), buffer.getvalue(), zipfile.ZIP_DEFLATED
            )
    source = {
        "name": "Fashion-MNIST, a class-balanced sample",
        "origin": "Xiao, Rasul, Vollgraf: Fashion-MNIST, arXiv 1708.07747, github.com/zalandoresearch/fashion-mnist",
        "licence": "MIT, see LICENSE beside this file",
        "made_by": "scripts/make_sample.py",
        "seed": SEED,
        "sizes": {"train": 5000, "validation": 1000, "test": 1000},
        "sha256": hashlib.sha256(target.read_bytes()).hexdigest(),
        "sha256_of_sources": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files.values()},
    }
    (TARGET / "source.json").write_text(json.dumps(source, indent=2) + "\n")
    print(f"{target}: {target.stat().st_size / 1e6:.2f} MB, sha256 {source['sha256']}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
