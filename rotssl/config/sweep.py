"""Sweeps: one file that lists the configurations to compare, and the trials that it expands to.

A sweep file has the sections of a recipe (fields shared by all trials) and three more: ``sweep`` (below), ``grid`` (dotted field
-> list of values) and ``distributions`` (dotted field -> distribution to draw from). A trial is an ordinary run. Its name depends
only on its configuration, so a sweep that is extended or restarted finds the trials it has already run. Imports no torch, ray or
mlflow.
"""

import argparse
import hashlib
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rotssl import config as cfg
from rotssl.config import MAY_CHANGE, NOT_IDENTITY, Config, cli
from rotssl.config.fields import Auto, ConfigError, convert, nearest, opt
from rotssl.config.identity import canonical, is_baseline
from rotssl.config.methods import METHODS
from rotssl.config.recipes import flatten, load_recipe, read_yaml, recommended
from rotssl.config.sections import OFF
from rotssl.config.tasks import TASKS, WEIGHTS

MOST = 10_000  # configurations; more are most likely a mistake
SHARED = ("scaling.", "storage.", "tracking.uri", "tracking.experiment")  # the same for all trials of a sweep


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Settings of a sweep."""

    name: str | None = opt(None, "Name of the sweep, and the default of tracking.experiment; default: the file's name.")
    recipe: str | None = opt(
        None, "Recipe that the trials start from; relative to the sweep file or to the working directory."
    )
    seeds: int = opt(1, "Number of seeds per configuration, counted up from train.seed.", ge=1)
    samples: int = opt(1, "Number of draws from the distributions; a larger number keeps the earlier draws.", ge=1)
    baseline: bool = opt(True, "For each configuration, add the run without auxiliary tasks if the grid lacks it.")
    scheduler: Literal["none", "asha", "median"] = opt(
        "none",
        "Stop weak trials early. asha: asynchronous successive halving (arXiv 1810.05934); median: stop if the best kNN is below "
        "the median of the others' means. Only trials of one method, data set and budget are compared; baselines never stop.",
    )
    grace_epochs: int = opt(1, "Never stop a trial before this epoch.", ge=1)
    reduction_factor: float = opt(2.0, "With asha, one trial in this many continues at each rung.", gt=1)
    concurrency: int | Auto = opt("auto", "Number of concurrent trials; auto: as many as fit into the cluster.", ge=1)
    gpus_per_trial: float | Auto = opt(
        "auto", "Share of a GPU for a trial with one worker; auto: a whole GPU if there are any.", gt=0, le=1
    )


@dataclass(frozen=True)
class Sweep:
    """A sweep as read from its file and flags.

    ``common`` holds the overrides shared by all trials, ``grid`` the axes, ``distributions`` dotted field -> (kind, arguments).
    """

    name: str
    file: Path
    settings: SweepConfig
    common: dict[str, Any]
    grid: dict[str, list[Any]]
    distributions: dict[str, tuple[str, list[Any]]]


@dataclass(frozen=True)
class SweepCommand:
    """A parsed command line."""

    sweep: Sweep
    dry_run: bool
    resume: bool


@dataclass(frozen=True)
class Point:
    """A configuration of the sweep with one seed, not yet resolved; ``label`` names the varied fields, without the seed."""

    config: Config
    label: str

    @property
    def baseline(self) -> bool:
        """Whether it has no auxiliary task."""
        return is_baseline(self.config)


def parse(argv: Sequence[str], program: str, description: str) -> SweepCommand:
    """Parse a command line; ``--help`` prints and exits.

    Raises:
        ConfigError: a flag, the sweep file, the recipe or a value in them is invalid.
    """
    usage = "%(prog)s --config FILE [--sweep.field VALUE ...] [--section.field VALUE ...] [--dry-run] [--resume]"
    known = cfg.fields_of("sweep", SweepConfig)
    every = dict.fromkeys(key for name in METHODS for key in cfg.schema(name))

    def make(method: str) -> argparse.ArgumentParser:
        parser = cli.parser(method, program, description, usage, "sweep file (YAML)")
        parser.add_argument("--resume", action="store_true", help="fail if the sweep was never started")
        cli.add_fields(parser, known)
        # Fields of all methods are flags; each trial's configuration checks that they belong to its method.
        for key in every:
            if key not in cfg.schema(method):
                parser.add_argument(f"--{key}", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return parser

    first, _ = make("byol").parse_known_args([a for a in argv if a not in ("-h", "--help")])
    asked = getattr(first, "method.name", "byol")
    method = asked if asked in METHODS else "byol"
    given, unknown = make(method).parse_known_args(list(argv))
    cli.refuse_unknown(unknown, [*known, *every], method)
    file = cli.one_file(given.config)
    if not file:
        raise ConfigError("--config: expected a sweep file, such as jobs/sweeps/weight_budget_demo.yaml")
    flags = {key: value for key, value in vars(given).items() if "." in key}
    return SweepCommand(read(Path(file), read_yaml(file), flags), given.dry_run, given.resume)


def read(file: Path, content: Mapping[str, Any], flags: Mapping[str, Any]) -> Sweep:
    """A sweep from the content of its file and the flags, which override it.

    Raises:
        ConfigError: the content or a flag is invalid.
    """
    own = ("sweep", "grid", "distributions")
    known = cfg.fields_of("sweep", SweepConfig)
    settings: dict[str, Any] = {}
    mine = flatten({"sweep": content.get("sweep")}) | {k: v for k, v in flags.items() if k.startswith("sweep.")}
    for key, value in mine.items():
        if key not in known:
            raise ConfigError(f"{key}: no such field{nearest(key, known)}")
        hint, spec = known[key]
        settings[key.split(".")[1]] = convert(key, value, hint, spec.metadata["bounds"])
    settings_ = SweepConfig(**settings)
    name = settings_.name or file.stem
    if any(ch in name for ch in "/\\\0\n") or name in (".", "..") or len(name.encode()) > 200:
        raise ConfigError(f"sweep.name: got {name!r}, expected a short name without slashes that can name a folder")
    valid = dict.fromkeys([*own, *(key.split(".")[0] for key in cfg.schema())])
    for section in content:
        if section not in valid:
            raise ConfigError(f"{section}: no such section{nearest(str(section), valid)}")
    common = flatten({key: value for key, value in content.items() if key not in own})
    grid, distributions = _grid(content.get("grid")), _distributions(content.get("distributions"))
    for key in (*grid, *distributions):
        if key in common or (key in grid and key in distributions):
            raise ConfigError(f"{key}: given twice in {file}: as a value for all trials and as a varied field")
    for key, value in flags.items():
        if not key.startswith("sweep."):
            common[key] = value
        replaced = "recipe" if key == "sweep.recipe" else key
        grid.pop(replaced, None)
        distributions.pop(replaced, None)
    if "recipe" in grid and settings_.recipe is not None:
        raise ConfigError(f"sweep.recipe: given twice in {file}: as a value for all trials and as a varied field")
    if not grid and not distributions and settings_.seeds == 1:
        raise ConfigError(f"grid: {file} varies nothing; expected lists of values, such as rotation.weight: [0, 1]")
    if "tracking.run_name" in common:
        raise ConfigError("tracking.run_name: not allowed in a sweep, whose trials are named after their configuration")
    if common.get("train.stop_after") is not None:
        raise ConfigError("train.stop_after: not allowed in a sweep; for a shorter budget set train.epochs")
    if settings_.seeds > 1 and ("train.seed" in grid or "train.seed" in distributions):
        raise ConfigError(f"sweep.seeds: got {settings_.seeds}, expected 1: {file} already varies train.seed")
    draws = settings_.samples if distributions else 1
    count = draws * settings_.seeds * math.prod(map(len, grid.values()))
    if count > MOST:
        raise ConfigError(f"grid: {file} expands to {count} configurations, expected at most {MOST}")
    common.setdefault("tracking.experiment", name)
    return Sweep(name, file, settings_, common, grid, distributions)


def _axes(section: str, content: Any) -> dict[str, Any]:
    """The mapping of dotted fields in ``grid`` or ``distributions``."""
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{section}: got {content!r}, expected dotted fields, such as rotation.weight")
    axes = {str(key): value for key, value in content.items()}
    known = {"recipe", *itertools.chain.from_iterable(cfg.schema(name) for name in METHODS)}
    for key in axes:
        if key not in known:
            raise ConfigError(f"{section}.{key}: no such field{nearest(key, known)}")
        if key.startswith(NOT_IDENTITY) or (key in MAY_CHANGE and key != "data.root"):
            raise ConfigError(f"{section}.{key}: cannot be varied, because it does not affect what a run computes")
    return axes


def _grid(content: Any) -> dict[str, list[Any]]:
    axes = _axes("grid", content)
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"grid.{key}: got {values!r}, expected a list of values")
        if key == "recipe" and not all(isinstance(value, str) for value in values):
            raise ConfigError(f"grid.recipe: got {values}, expected a list of files")
    if content is not None and not axes:
        raise ConfigError("grid: got an empty section, expected lists of values, such as rotation.weight: [0, 1]")
    return axes


_KINDS = {"uniform": 2, "log_uniform": 2, "integer": 2, "choice": 1}


def _distributions(content: Any) -> dict[str, tuple[str, list[Any]]]:
    result = {}
    for key, spec in _axes("distributions", content).items():
        expected = (
            f"distributions.{key}: got {spec!r}, expected one of {', '.join(_KINDS)}, such as {{uniform: [0.1, 3]}}"
        )
        if key == "recipe" or not isinstance(spec, dict) or len(spec) != 1:
            raise ConfigError(expected)
        ((kind, values),) = spec.items()
        if kind not in _KINDS or not isinstance(values, list) or len(values) < _KINDS[kind]:
            raise ConfigError(expected)
        if kind != "choice":
            hint = int if kind == "integer" else float
            numbers = [convert(f"distributions.{key}", value, hint, {}) for value in values]
            lowest = "two numbers, the smaller first" + (", both above 0" if kind == "log_uniform" else "")
            if len(numbers) != 2 or numbers[0] >= numbers[1] or (kind == "log_uniform" and numbers[0] <= 0):
                raise ConfigError(f"distributions.{key}: got {values}, expected {lowest}")
            values = numbers
        result[key] = (kind, values)
    return result


def draw(key: str, sample: int, kind: str, values: Sequence[Any]) -> Any:
    """Draw number ``sample`` (0-based) of a field: a function of these two alone, so that adding draws keeps the earlier ones."""
    digest = hashlib.blake2b(f"{key}/{sample}".encode(), digest_size=8).digest()
    u = int.from_bytes(digest, "little") / 2**64
    if kind == "choice":
        return values[int(u * len(values))]
    low, high = values
    if kind == "integer":
        return low + int(u * (high - low + 1))
    number = low + u * (high - low) if kind == "uniform" else math.exp(math.log(low) + u * math.log(high / low))
    return min(max(float(f"{number:.4g}"), low), high)


def expand(sweep: Sweep) -> Iterator[Point]:
    """All points, each once, in the order of the file; a baseline precedes the points that it is compared with.

    Raises:
        ConfigError: a value is invalid for its field, or conflicts with another field.
    """
    settings, seen, recipes = sweep.settings, set(), _recipes(sweep)
    samples = range(settings.samples if sweep.distributions else 1)
    for sample, *point in itertools.product(samples, *sweep.grid.values()):
        axes = dict(zip(sweep.grid, point, strict=True))
        axes |= {key: draw(key, sample, *spec) for key, spec in sweep.distributions.items()}
        recipe = axes.pop("recipe", settings.recipe)
        fields = {**recipes[recipe], **sweep.common, **axes}
        built = cfg.build(fields if recipe else {**recommended(fields), **fields})
        if built.tracking.uri == OFF:
            raise ConfigError("tracking.uri: got off, expected a store: the sweep's report is read from it")
        if built.train.budget is not None:
            raise ConfigError(f"train.budget: got {built.train.budget:g}, expected none in a sweep: set train.epochs")
        on = [f"{name}.weight" for name in built.active()]
        # A label distinguishes a baseline from the point it belongs to, and one recipe from another.
        shown = [*axes, *(on if settings.baseline else ())]
        more = {"recipe": Path(str(recipe)).stem} if "recipe" in sweep.grid else {}
        for offset in range(settings.seeds):
            config = cfg.replace(built, {"train.seed": built.train.seed + offset})
            plain = cfg.replace(config, dict.fromkeys(WEIGHTS, 0.0))
            for variant in (plain, config) if settings.baseline else (config,):
                variant = canonical(variant)
                digest = cfg.fingerprint(variant)
                if digest not in seen:
                    seen.add(digest)
                    yield Point(variant, _label(variant, shown, more))


def _recipes(sweep: Sweep) -> dict[str | None, dict[str, Any]]:
    """The recipes of a sweep by name; None stands for the defaults."""
    key = "grid.recipe" if "recipe" in sweep.grid else "sweep.recipe"
    found: dict[str | None, dict[str, Any]] = {}
    for name in sweep.grid.get("recipe", [sweep.settings.recipe]):
        beside = sweep.file.parent / str(name)
        found[name] = {} if name is None else load_recipe(beside if os.path.exists(beside) else name, key)
    # The cluster is divided into equal slots, and all results go to one place.
    asked = [{k: v for k, v in (recipe | sweep.common).items() if k.startswith(SHARED)} for recipe in found.values()]
    for other in asked[1:]:
        for field in sorted(asked[0].keys() | other.keys()):
            ours, theirs = asked[0].get(field, "nothing"), other.get(field, "nothing")
            if ours != theirs:
                raise ConfigError(
                    f"{field}: got {ours} and {theirs} from the recipes, expected one value for all trials: "
                    f"set it in {sweep.file} or by a flag"
                )
    return found


def _label(config: Config, axes: Sequence[str], more: dict[str, str]) -> str:
    """The varied fields with their values in this configuration, without fields of inactive tasks."""
    values = cfg.flat(config) | more
    off = [name for name in TASKS if name not in config.active()]
    shown = [
        f"{key}={values[key]:.12g}" if isinstance(values[key], float) else f"{key}={values[key]}"
        for key in dict.fromkeys([*more, *axes])
        if key != "train.seed" and (key.split(".")[0] not in off or key.endswith(".weight"))
    ]
    return " ".join(shown) or config.method.name
