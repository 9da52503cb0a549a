"""Folders of small pictures, for the tests."""

import hashlib

import pytest
from PIL import Image

from rotssl.config.fields import ConfigError
from rotssl.config.sections import DataConfig
from rotssl.data import datasets


def draw(path, size=(16, 16), colour=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = colour or tuple(hashlib.sha256("/".join(path.parts[-3:]).encode()).digest()[:3])
    Image.new("RGB" if isinstance(colour, tuple) else "L", size, colour).save(path, **options)
    return path


def folder(root, *splits, classes=("ant", "bee"), each=5):
    for split in splits or ("",):
        for name in classes:
            for i in range(each):
                draw(root / split / name / f"{i}.png")
    return root


def config(root, name="imagefolder", **options):
    return DataConfig(**{"name": name, "root": str(root), "image_size": 16, **options})


def rows(pictures):
    return {picture.tobytes() for picture in pictures}


def check_refused(root, *words, name="imagefolder"):
    with pytest.raises(ConfigError) as caught:
        datasets.inspect(config(root, name), 0.2)
    assert str(caught.value).startswith("data.root: ")
    assert all(str(word) in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)
