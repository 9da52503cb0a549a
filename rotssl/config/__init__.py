"""The configuration of a run. Imports no torch, ray or mlflow, so a bad configuration is rejected in milliseconds."""

from rotssl.config.fields import ConfigError
from rotssl.config.identity import (
    MAY_CHANGE,
    NOT_IDENTITY,
    changes,
    described,
    fingerprint,
    flat,
    flat_dict,
    identity_of,
    later_defaults,
    replace,
    to_dict,
)
from rotssl.config.resolution import build, cut_down, default_storage, from_dict, resolve
from rotssl.config.resolved import ResolvedConfig
from rotssl.config.rules import check_workers, unshared
from rotssl.config.sections import Config, fields_of, schema

__all__ = [
    "MAY_CHANGE",
    "NOT_IDENTITY",
    "Config",
    "ConfigError",
    "ResolvedConfig",
    "build",
    "changes",
    "check_workers",
    "cut_down",
    "default_storage",
    "described",
    "fields_of",
    "fingerprint",
    "flat",
    "flat_dict",
    "from_dict",
    "identity_of",
    "later_defaults",
    "replace",
    "resolve",
    "schema",
    "to_dict",
    "unshared",
]
