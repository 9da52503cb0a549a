"""Protocol cards: what a number was measured with, as plain values that are recorded beside it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from rotssl.data.images import ImageSet
from rotssl.evaluation.plan import Number

LONGEST = 500  # of a parameter in MLflow; the card itself has the whole value


@dataclass(frozen=True)
class Result:
    """A measured number.

    Attributes:
        number: what was to be measured.
        metrics: the number by its key, and what goes with it.
        hits: which images were right, (M,) bool by name; of few-shot episodes their accuracies.
        facts: settings that turned out, for the card.
        files: name -> content of files that belong to it.
    """

    number: Number
    metrics: dict[str, float]
    hits: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


def digest(images: ImageSet) -> str:
    """Which images and labels a set has, in its order, as 16 hexadecimal digits of SHA-256.

    Images in files count by the files' content, so that it does not depend on the decoder.
    """
    found = hashlib.sha256(b"" if images.labels is None else np.ascontiguousarray(images.labels, "<i8").tobytes())
    if images.sums is not None:
        found.update(np.ascontiguousarray(images.sums[:, 0], "<u8").tobytes())
    elif not isinstance(images.images, np.ndarray):
        found.update(np.ascontiguousarray(images.images.checksums, "<u8").tobytes())
    else:
        for first in range(0, len(images), 4096):
            found.update(np.ascontiguousarray(images.images[first : first + 4096]).tobytes())
    return found.hexdigest()[:16]


def card(common: Mapping[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """The card of what was measured in one protocol: what all numbers share, and what each has of its own."""
    numbers = {result.number.key: {**result.number.settings, **result.facts} for result in results}
    shared = {
        key: value
        for key, value in next(iter(numbers.values())).items()
        if all(own.get(key, None) == value for own in numbers.values())
    }
    own = {
        name: {key: value for key, value in settings.items() if key not in shared} | {"value": result.metrics[name]}
        for (name, settings), result in zip(numbers.items(), results, strict=True)
    }
    return {"protocol": results[0].number.protocol, **common, **shared, "numbers": own}


def params(made: Mapping[str, Any]) -> dict[str, str]:
    """A card as parameters of a run in MLflow, ``card.NAME``; what numbers have of their own is listed."""
    found = {key: value for key, value in made.items() if key != "numbers"}
    for own in made["numbers"].values():
        for key, value in own.items():
            if key != "value":
                found.setdefault(key, []).append(value)
    return {f"card.{key}": _text(value)[:LONGEST] for key, value in found.items() if value not in (None, [])}


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        each = (" ".join(map(str, item)) if isinstance(item, list | tuple) else str(item) for item in value)
        return ", ".join(dict.fromkeys(each))
    return str(value)


def written(made: Mapping[str, Any]) -> str:
    """A card as the text of a file."""
    return json.dumps(made, indent=2) + "\n"
