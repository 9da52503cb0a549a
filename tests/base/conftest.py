"""A store that is made up, and a clock that counts the seconds slept."""

import pytest

from rotssl.base import objects
from rotssl.base.objects import ObjectPath
from tests.memory_store import Memory


@pytest.fixture
def store():
    return Memory("bucket/prefix")


@pytest.fixture
def top(store):
    return ObjectPath(store, "s3://bucket/prefix", "?endpoint_override=host:1")


@pytest.fixture
def quick(monkeypatch):
    """Seconds pass by counting those that are slept."""
    clock = [0.0]
    monkeypatch.setattr(objects.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(objects.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    return clock
