"""Addresses of tracking stores: without their login, and the file of one that is a file."""

import re
from pathlib import Path

_LOGIN = re.compile(r"(?<=://)[^/\s]*@")
_SQLITE = "sqlite:///"


def without_login(text: str) -> str:
    """The text without user names and passwords in addresses: ``http://HOST`` for ``http://USER:PASSWORD@HOST``."""
    return _LOGIN.sub("", text)


def file_of(uri: str) -> Path | None:
    """The file of an sqlite store, or None if the store is not a file."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) and uri != _SQLITE else None


def is_gone(uri: str) -> bool:
    """Whether a store is a file that is not there."""
    file = file_of(uri)
    return file is not None and not file.exists()
