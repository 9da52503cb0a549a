"""Typed dataclass fields with help text and bounds, and the strict conversion of user input to their types.

This is the only path from text or YAML to a configuration. It imports nothing heavy, and every error names the field, the given
value and the valid ones.
"""

import difflib
import importlib
import math
import types
from collections.abc import Iterable
from dataclasses import field
from typing import Any, Literal, Union, get_args, get_origin

Auto = Literal["auto"]


class ConfigError(Exception):
    """A user's request that cannot be carried out; the text is the one line to print. Exit code 2."""


def require(condition: bool, key: str, given: object, expected: str) -> None:
    """Raise ``key: got GIVEN, expected EXPECTED`` unless the condition holds.

    Raises:
        ConfigError: the condition is false.
    """
    if not condition:
        raise ConfigError(f"{key}: got {given}, expected {expected}")


def load_class(target: str) -> Any:
    """Import and return the object that a registry names as ``module:name``."""
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def opt(default: Any, text: str, *, later: bool = False, **bounds: float) -> Any:
    """A field with a default, a help text and bounds (``ge``, ``gt``, ``le``, ``lt``) on its numbers.

    ``later`` marks a field that was added after runs had been recorded without it. Its default is what those runs did, and is
    left out of a run's identity so that they can be resumed.
    """
    return field(default=default, metadata={"help": text, "bounds": bounds, "later": later})


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the known name closest to the word, or an empty text."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


_BOUND_WORDS = {"ge": "at least {}", "gt": "greater than {}", "le": "at most {}", "lt": "less than {}"}


def describe(hint: Any, bounds: dict[str, float]) -> str:
    """A description of the values a field accepts: ``an integer at least 1 or 'auto'``."""
    limits = " and ".join(_BOUND_WORDS[name].format(value) for name, value in bounds.items())
    return " or ".join(_describe(option, limits) for option in _options(hint))


def _describe(option: Any, limits: str) -> str:
    if get_origin(option) is Literal:
        return ", ".join(repr(value) for value in get_args(option))
    if get_origin(option) is tuple:
        kind, more = get_args(option)[0], get_args(option)[1:]
        count = "" if more == (...,) else f"{len(more) + 1} "
        each = _describe(kind, limits).removeprefix("an ").removeprefix("a ")
        return f"{count}comma-separated {each.replace('number', 'numbers', 1)}"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words[option] + (f" {limits}" if option in (int, float) and limits else "")


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def convert(key: str, value: Any, hint: Any, bounds: dict[str, float]) -> Any:
    """The value converted to the field's type.

    Args:
        key: dotted name, for the message.
        value: text from the command line, or anything YAML yields.
        hint: the field's type: bool, int, float, str, None, Literal, tuple, or a union of these.
        bounds: limits on numbers. Numbers must always be finite.

    Raises:
        ConfigError: the value does not fit the type or the bounds; the message names the field.
    """
    # null before text, which would accept the word "null" itself
    for option in sorted(_options(hint), key=lambda option: option is not type(None)):
        try:
            return _convert(value, option, bounds)
        except (ValueError, OverflowError):
            continue
    valid = [v for option in _options(hint) if get_origin(option) is Literal for v in get_args(option)]
    hint_text = nearest(value, map(str, valid)) if isinstance(value, str) and len(valid) > 1 else ""
    given = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
    raise ConfigError(f"{key}: got {given}, expected {describe(hint, bounds)}{hint_text}")


def _convert(value: Any, option: Any, bounds: dict[str, float]) -> Any:
    text = isinstance(value, str)
    if get_origin(option) is Literal:
        for valid in get_args(option):
            if value == valid and isinstance(value, str):
                return valid
    elif get_origin(option) is tuple:
        items = value.strip("[]() ").split(",") if text else [value] if isinstance(value, int | float) else value
        kinds = get_args(option)
        if isinstance(items, list | tuple) and items and (kinds[1:] == (...,) or len(items) == len(kinds)):
            return tuple(_convert(v.strip() if isinstance(v, str) else v, kinds[0], bounds) for v in items)
    elif option is type(None):
        if value is None or (text and value.lower() in ("null", "none")):
            return None
    elif option is bool:
        if isinstance(value, bool):
            return value
        if text and value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif option is str:
        if text and value.strip():
            return value
    elif option in (int, float) and not isinstance(value, bool) and (text or isinstance(value, int | float)):
        number = option(value)
        if (text or number == value) and math.isfinite(number) and _within(number, bounds):
            return number
    raise ValueError


def _within(number: float, bounds: dict[str, float]) -> bool:
    return (
        number >= bounds.get("ge", -math.inf)
        and number > bounds.get("gt", -math.inf)
        and number <= bounds.get("le", math.inf)
        and number < bounds.get("lt", math.inf)
    )
