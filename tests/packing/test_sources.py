"""What packing takes for a source, and what it finds in it."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from rotssl.config.fields import ConfigError
from rotssl.packing.sources import content, look
from tests.packing.sets import index, members, packed, picture, pictures, stored


def parquet(path, images, labels, names=None):
    """A file as the datasets library writes it."""
    import pyarrow as pa
    from pyarrow import parquet as pq

    cells = pa.array([{"bytes": image, "path": None} for image in images])
    about = {"info": {"features": {"label": {"names": names}}}} if names else {}
    table = pa.table({"image": cells, "label": pa.array(labels)}, metadata={"huggingface": json.dumps(about)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=3)


def test_parquet_files_with_image_bytes(tmp_path):
    images = [path.read_bytes() for path in sorted(pictures(tmp_path / "source").rglob("*.jpg"))]
    for split, few in (("train", images[:7]), ("validation", images[7:12])):
        labels = [i % 2 for i in range(len(few))]
        parquet(tmp_path / "parquet" / f"{split}-00000-of-00001.parquet", few, labels, ["day", "night"])
    manifest = packed(tmp_path / "parquet", tmp_path / "set")
    assert manifest.classes == ("day", "night")
    # Files that must be read from start to end keep their order.
    assert stored(tmp_path / "set") == images[:7] and stored(tmp_path / "set", "validation") == images[7:12]
    assert index(tmp_path / "set")["label"].tolist() == [0, 1, 0, 1, 0, 1, 0]
    with tarfile.open(tmp_path / "set" / "train-00000.tar") as archive:
        assert archive.getnames()[:2] == ["train-00000-of-00001/000000000.jpg", "train-00000-of-00001/000000000.cls"]


def test_samples_of_tar_files(tmp_path):
    image = picture(tmp_path / "a.jpg", 9, 9).read_bytes()
    members(tmp_path / "tars" / "train.tar", a__jpg=image, a__json=b'{"w": 1}', a__cls=b"1", b__jpg=image, b__cls=b"0")
    members(tmp_path / "tars" / "val.tar", a__jpg=image, a__png=image, a__json=b'{"label": 1}')
    source = look(str(tmp_path / "tars"))
    assert source.classes == ("0", "1") and dict(source.skipped) == {"second images of a sample": 1}
    assert {name: [item.label for item in items] for name, items in source.splits.items()} == {
        "train": [1, 0],
        "validation": [1],
    }
    for wrong in (b"bee", b"4294967296000", b"true", b"-2"):
        members(tmp_path / "wrong" / "train.tar", a__jpg=image, a__cls=wrong)
        with pytest.raises(ConfigError, match=r"train.tar, a.cls: expected a label"):
            look(str(tmp_path / "wrong"))
    members(tmp_path / "some" / "train.tar", a__jpg=image, a__cls=b"1", b__jpg=image)
    with pytest.raises(ConfigError, match="1 of the images in the tar files have no label"):
        look(str(tmp_path / "some"))


def test_idx_files_as_mnist_has_them(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 7), np.uint8)
    for name, count in (("train", 6), ("t10k", 4)):
        head = b"\0\0\x08\x03" + np.array([count, 9, 7], ">u4").tobytes()
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(head + pixels[:count].tobytes())
        labels = np.arange(count, dtype=np.uint8) % 3
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(
            b"\0\0\x08\x01" + np.array([count], ">u4").tobytes() + labels.tobytes()
        )
    source = look(str(tmp_path))
    assert source.classes == ("0", "1", "2") and {k: len(v) for k, v in source.splits.items()} == {
        "train": 6,
        "test": 4,
    }
    for i, item in enumerate(source.splits["train"]):
        image = np.asarray(Image.open(io.BytesIO(content(item.where))))
        assert np.array_equal(image, pixels[i]) and item.label == i % 3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: None, "no such file or folder"),
        (lambda root: (root / "a.txt").parent.mkdir(), "no images"),
        (lambda root: (root.mkdir(), (root / "a.tar").write_bytes(b"x" * 2000)), "is no tar file"),
        (lambda root: (root.mkdir(), (root / "a-images-idx3-ubyte").write_bytes(b"x" * 2000)), "is no idx file"),
    ],
)
def test_what_is_no_source_is_refused_by_name(tmp_path, make, words):
    make(tmp_path / "source")
    with pytest.raises(ConfigError, match=words):
        look(str(tmp_path / "source"))
