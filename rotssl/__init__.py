"""Self-supervised pretraining with rotation prediction, on a Ray cluster."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rotssl.export.source import load_encoder as load_encoder

__version__ = "0.2.0"
_API = {"load_encoder": "rotssl.export.source"}  # name -> module; loaded on use, for torch takes seconds


def __getattr__(name: str) -> Any:
    if name in _API:
        return getattr(import_module(_API[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_API]
