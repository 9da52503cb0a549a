"""Command lines and the recipes that they name, for the tests."""

import pytest

from rotssl.config.cli import parse
from rotssl.config.fields import ConfigError


def refused(argv, *words):
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


def recipe(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)
