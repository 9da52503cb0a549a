"""Self-supervised pretraining with rotation prediction, on a Ray cluster."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rotssl.export.source import load_encoder as load_encoder

__version__ = "0.2.0"

# What `rotssl.NAME` is, as module:name. Imported when it is first used, so that `import rotssl` takes milliseconds.
_OFFERED = {
    "pretrain": "rotssl.api:pretrain",
    "ablate": "rotssl.api:ablate",
    "compare": "rotssl.api:compare",
    "evaluate": "rotssl.api:evaluate",
    "report": "rotssl.api:report",
    "load_encoder": "rotssl.export.source:load_encoder",
    "register_method": "rotssl.config.methods:register_method",
    "MethodSpec": "rotssl.config.methods:MethodSpec",
    "MethodConfig": "rotssl.config.methods:MethodConfig",
    "opt": "rotssl.config.fields:opt",
    "ConfigError": "rotssl.config.fields:ConfigError",
    "Method": "rotssl.methods.base:Method",
    "StepContext": "rotssl.base.step:StepContext",
    "StepOutput": "rotssl.base.step:StepOutput",
}


def __getattr__(name: str) -> Any:
    if name not in _OFFERED:
        raise AttributeError(f"module 'rotssl' has no attribute {name!r}")
    module, attribute = _OFFERED[name].split(":")
    found = globals()[name] = getattr(importlib.import_module(module), attribute)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_OFFERED})
