"""The command line: a recipe and flags, in any order, make one Config; every error is one line and exit code 2."""

import argparse
import dataclasses
import math
import os
import tempfile
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from rotssl import config as cfg
from rotssl.config import sections
from rotssl.config.datasets import DATASETS
from rotssl.config.fields import ConfigError, describe, nearest
from rotssl.config.methods import METHODS
from rotssl.config.recipes import load_recipe, recommended
from rotssl.config.tasks import SIXTEENTHS, TASKS


@dataclass(frozen=True)
class Command:
    """A parsed command line; ``recommended`` has the fields that come from the registry of methods, if no recipe is given."""

    config: cfg.Config
    print_config: bool
    dry_run: bool
    recommended: Mapping[str, Any] = field(default_factory=dict)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ConfigErrors."""

    def error(self, message: str) -> NoReturn:
        """Raise a ConfigError instead of printing the usage."""
        raise ConfigError(message)


def parser(
    method: str, program: str, description: str, usage: str, file: str = "recipe (YAML)"
) -> argparse.ArgumentParser:
    """A parser for --config, --dry-run and every field of a run with the given method."""
    made = Parser(prog=program, usage=usage, description=description, allow_abbrev=False)
    made.add_argument("--config", action="append", metavar="FILE", help=f"{file}; flags override it")
    made.add_argument("--dry-run", action="store_true", help="check everything, print the estimated cost and exit")
    add_fields(
        made, cfg.schema(method), {"method": f"method: fields of {method}"}, recommended({"method.name": method})
    )
    gain = METHODS[method].gain
    made.epilog = f"Defaults marked with * are those of {method} without a recipe{f': {gain}' if gain else ''}."
    return made


def add_fields(
    parser: argparse.ArgumentParser,
    schema: Mapping[str, tuple[Any, dataclasses.Field[Any]]],
    titles: Mapping[str, str] | None = None,
    others: Mapping[str, Any] | None = None,
) -> None:
    """Add a flag for each dotted field, grouped by section; fields that are not given are absent from the result.

    Args:
        parser: which gets the flags.
        schema: the fields.
        titles: section -> title of its group, if it is not its name.
        others: field -> default for the help, marked with a star, if it is not that of the field.
    """
    groups: dict[str, Any] = {}
    for key, (hint, spec) in schema.items():
        section = key.split(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group((titles or {}).get(section, section))
        default = (others or {}).get(key, spec.default)
        text = (
            ",".join(map(str, default))
            if isinstance(default, tuple)
            else str(default).lower()
            if isinstance(default, bool)
            else default
        )
        valid = ", ".join(METHODS) if key == "method.name" else describe(hint, spec.metadata["bounds"])
        star = "*" if key in (others or {}) else ""
        text = f"{spec.metadata['help']} [{valid}; default: {'null' if text is None else text}{star}]".replace(
            "%", "%%"
        )
        groups[section].add_argument(f"--{key}", metavar="VALUE", default=argparse.SUPPRESS, help=text)


def one_file(given: Sequence[str] | None) -> str | None:
    """The file given by --config, or None.

    Raises:
        ConfigError: several files are given.
    """
    if given and len(given) > 1:
        raise ConfigError(f"--config: got {len(given)} files, expected one")
    return given[0] if given else None


def refuse_unknown(unknown: Sequence[str], known: Iterable[str], method: str) -> None:
    """Reject the first unknown argument, suggesting the nearest known flag.

    Raises:
        ConfigError: there is an unknown argument.
    """
    if not unknown:
        return
    name = unknown[0].split("=")[0]
    if not name.startswith("--"):
        raise ConfigError(f"got {unknown[0]!r}, expected flags such as --train.epochs 10")
    other = [m for m in METHODS if name[2:] in cfg.schema(m)]
    why = f"; it is a field of {', '.join(other)}, not of {method}" if other else nearest(name[2:], known)
    raise ConfigError(f"{name[2:]}: no such field{why}")


def parse(argv: Sequence[str], program: str = "pretrain.py", description: str = "") -> Command:
    """Parse a command line; ``--help`` prints and exits.

    Raises:
        ConfigError: a flag, the recipe or a value in them is invalid.
    """
    usage = "%(prog)s [--config FILE] [--section.field VALUE ...] [--print_config] [--dry-run] [--smoke]"

    def make(method: str) -> argparse.ArgumentParser:
        made = parser(method, program, description, usage)
        made.add_argument("--print_config", action="store_true", help="print the resolved configuration and exit")
        made.add_argument(
            "--smoke",
            action="store_true",
            help="run two steps on a few synthetic images to check that the recipe works here",
        )
        return made

    first, _ = make("byol").parse_known_args([a for a in argv if a not in ("-h", "--help")])
    recipe = one_file(first.config)
    overrides = load_recipe(recipe) if recipe else {}
    method = str(getattr(first, "method.name", overrides.get("method.name", "byol")))
    # build() rejects an unknown method and suggests the nearest one.
    given, unknown = make(method if method in METHODS else "byol").parse_known_args(list(argv))
    flags = {key: value for key, value in vars(given).items() if "." in key}
    if method in METHODS:
        refuse_unknown(unknown, cfg.schema(method), method)
    # A recipe is complete in itself.
    registry = {} if recipe else recommended(flags)
    overrides |= registry
    if given.smoke:  # flags override it, except those of the data section
        overrides |= smoke({**overrides, **flags})
        flags = {key: value for key, value in flags.items() if not key.startswith("data.")}
    return Command(cfg.build({**overrides, **flags}), given.print_config, given.dry_run, registry)


def smoke(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides that shrink a recipe to two steps on a few synthetic images of the recipe's size, in this process."""
    side = overrides.get("data.image_size", "auto")
    native = _native_side(str(overrides.get("data.name", sections.DataConfig.name)))
    shares = [f"{task}.{leaf}" for task in TASKS for leaf in ("fraction", "fraction_end")]
    fraction = min(_number(overrides.get(key), 1) for key in shares)
    passes = math.ceil(_number(overrides.get("train.accumulate"), 1))
    parted = overrides.get("rotation.mode") == "disjoint" or any(key.startswith("equivariance.") for key in overrides)
    splits = math.ceil(_number(overrides.get("model.norm_splits"), sections.ModelConfig.norm_splits))
    unit = 2 * splits if overrides.get("model.norm") == "split" else SIXTEENTHS if parted else 1
    batch = math.ceil(max(2, math.ceil(2 / fraction)) / unit) * unit * passes  # two rotated images per pass
    return {
        "data.name": "synthetic",
        "data.image_size": native if side == "auto" else side,
        "data.root": None,
        "data.limit": 2 * batch,
        "data.download": False,
        "data.store": "auto",
        "train.batch_size": batch,
        "train.epochs": 1,
        "train.budget": None,
        "train.stop_after": None,
        "train.precision": "auto",  # half precision is far too slow on most CPUs
        "optim.warmup_epochs": 0,
        "scaling.num_workers": 0,
        "tracking.experiment": "smoke",
        # A new folder each time, because a finished run would not run again.
        "storage.path": os.path.join(tempfile.gettempdir(), f"rotssl-smoke-{uuid.uuid4().hex[:8]}"),
        **({"method.queue_size": batch} if _number(overrides.get("method.queue_size"), 0) else {}),
        **({"views.size_until": 0.5} if "views.size_start" in overrides else {}),  # one step of each side
    }


def _native_side(name: str) -> int:
    known = DATASETS[name].side if name in DATASETS else None
    return known or 224


def _number(value: object, default: float) -> float:
    """A positive number from flags or YAML, or the default; ``build`` rejects invalid values."""
    try:
        number = float(str(value))
    except ValueError:
        return default
    return number if 1e-3 <= number < math.inf else default
