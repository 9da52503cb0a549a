"""The command line: a recipe and flags make one Config, whatever their order; every error is one line and exit code 2."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from rotssl import config as cfg
from rotssl.fields import ConfigError, describe, nearest
from rotssl.methods import METHODS

EXIT_OK, EXIT_FAILED, EXIT_BAD_CONFIG, EXIT_INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class Command:
    """What the user typed."""

    config: cfg.Config
    print_config: bool
    dry_run: bool


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ConfigErrors."""

    def error(self, message: str) -> NoReturn:
        """Raise in place of printing the usage."""
        raise ConfigError(message)


def load_recipe(path: str | Path) -> dict[str, Any]:
    """Dotted overrides from a YAML file of sections.

    Raises:
        ConfigError: the file can't be read, is not YAML, or is not a mapping of sections.
    """
    try:
        content = yaml.safe_load(Path(path).read_bytes().decode())
    except OSError as error:
        raise ConfigError(f"--config: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config: {path} is not a text file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"--config: {path}{where}: not valid YAML ({getattr(error, 'problem', None) or 'bad character'})"
        ) from error
    except ValueError as error:  # a date of 2020-99-99, say
        raise ConfigError(f"--config: {path}: not valid YAML ({error})") from error
    except RecursionError as error:
        raise ConfigError(f"--config: {path} is nested too deeply") from error
    if content is None:
        return {}
    if isinstance(content, dict):  # a section whose fields are all commented out
        content = {section: {} if fields is None else fields for section, fields in content.items()}
    if not isinstance(content, dict):
        raise ConfigError(f"--config: {path} holds {type(content).__name__}, expected sections such as 'train:'")
    for section, fields in content.items():
        if not isinstance(fields, dict):
            raise ConfigError(
                f"{section}: got {fields!r}, expected a section with fields below it{nearest(str(section), _sections())}"
            )
    return cfg.flat_dict(content)


def _sections() -> list[str]:
    return list(dict.fromkeys(key.split(".")[0] for key in cfg.schema()))


def _parser(method: str, program: str, description: str) -> Parser:
    parser = Parser(
        prog=program,
        usage="%(prog)s [--config FILE] [--section.field VALUE ...] [--print_config] [--dry-run] [--smoke]",
        description=description,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", metavar="FILE", help="recipe (YAML); flags win over it")
    parser.add_argument("--print_config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print configuration and cost, and exit"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="two steps on a few synthetic images: does this recipe run here?"
    )
    groups: dict[str, Any] = {}
    for key, (hint, spec) in cfg.schema(method).items():
        section = key.split(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(f"{section}: {method}'s" if section == "method" else section)
        default = spec.default
        text = (
            ",".join(map(str, default))
            if isinstance(default, tuple)
            else str(default).lower()
            if isinstance(default, bool)
            else default
        )
        valid = ", ".join(METHODS) if key == "method.name" else describe(hint, spec.metadata["bounds"])
        text = f"{spec.metadata['help']} [{valid}; default: {'null' if text is None else text}]".replace("%", "%%")
        groups[section].add_argument(f"--{key}", metavar="VALUE", default=argparse.SUPPRESS, help=text)
    return parser


def parse(argv: Sequence[str], program: str = "pretrain.py", description: str = "") -> Command:
    """The command that the arguments spell; ``--help`` prints and exits.

    Raises:
        ConfigError: anything wrong with flags, recipe or the values in them.
    """
    first, _ = _parser("byol", program, description).parse_known_args([a for a in argv if a not in ("-h", "--help")])
    recipes = first.config or []
    if len(recipes) > 1:
        raise ConfigError(f"--config: got {len(recipes)} recipes, expected one")
    overrides = load_recipe(recipes[0]) if recipes else {}
    method = str(getattr(first, "method.name", overrides.get("method.name", "byol")))
    # Fields of a method that is not known are judged by build(), which names the nearest one.
    parser = _parser(method if method in METHODS else "byol", program, description)
    given, unknown = parser.parse_known_args(list(argv))
    flags = {key: value for key, value in vars(given).items() if "." in key}
    if method in METHODS and unknown:
        name = unknown[0].split("=")[0]
        if not name.startswith("--"):
            raise ConfigError(f"got {unknown[0]!r}, expected flags such as --train.epochs 10")
        other = [m for m in METHODS if name[2:] in cfg.schema(m)]
        why = (
            f"; it is a field of {', '.join(other)}, not of {method}"
            if other
            else nearest(name[2:], cfg.schema(method))
        )
        raise ConfigError(f"{name[2:]}: no such field{why}")
    if given.smoke:  # flags win over it, but for those on the data
        overrides |= cfg.smoke({**overrides, **flags})
        flags = {key: value for key, value in flags.items() if not key.startswith("data.")}
    return Command(cfg.build({**overrides, **flags}), given.print_config, given.dry_run)


def run_command(body: Callable[[], int]) -> NoReturn:
    """Exit with the body's code; a ConfigError is one line to stderr and code 2, an interrupt 130."""
    try:
        code = body()
    except ConfigError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = EXIT_BAD_CONFIG
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        code = EXIT_INTERRUPTED
    sys.stdout.flush()
    sys.exit(code)
