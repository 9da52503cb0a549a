"""Reading and writing of recipes: YAML files of sections."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rotssl.base.paths import AnyPath
from rotssl.config import sections
from rotssl.config.fields import ConfigError, nearest
from rotssl.config.identity import flat_dict, to_dict
from rotssl.config.methods import METHODS
from rotssl.config.sections import Config, schema
from rotssl.config.tasks import TASKS


class _Loader(yaml.SafeLoader):
    """A YAML loader that rejects duplicate keys, of which YAML silently keeps the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.composer.ComposerError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value)
        return node


def read_yaml(path: str | AnyPath, key: str = "--config") -> dict[str, Any]:
    """The mapping in a YAML file; empty if the file is empty.

    Args:
        path: path of the file.
        key: field or flag that named the file, for the message.

    Raises:
        ConfigError: the file can't be read, is not YAML, or is not a mapping.
    """
    try:
        content = yaml.load((Path(path) if isinstance(path, str) else path).read_bytes().decode(), _Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}: {path} is not a text file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{key}: {path}{where}: not valid YAML ({getattr(error, 'problem', None) or 'bad character'})"
        ) from error
    except ValueError as error:  # for example a date of 2020-99-99
        raise ConfigError(f"{key}: {path}: not valid YAML ({error})") from error
    except RecursionError as error:
        raise ConfigError(f"{key}: {path} is nested too deeply") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{key}: got {type(content).__name__} in {path}, expected sections such as 'train:'")
    return content


def flatten(content: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted overrides from sections, some of which may be empty.

    Raises:
        ConfigError: an entry is not a section.
    """
    for section, fields in content.items():
        if not isinstance(fields, dict | None):
            raise ConfigError(
                f"{section}: got {fields!r}, expected a section with fields below it{nearest(str(section), _sections())}"
            )
    return flat_dict({section: fields or {} for section, fields in content.items()})


def load_recipe(path: str | AnyPath, key: str = "--config") -> dict[str, Any]:
    """Dotted overrides from a YAML file of sections.

    Args:
        path: path of the file.
        key: field or flag that named the file, for the message.

    Raises:
        ConfigError: see ``read_yaml`` and ``flatten``.
    """
    return flatten(read_yaml(path, key))


def recommended(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a run without a recipe has beside the defaults: those that its method's registry entry recommends.

    A given field replaces its own. A given weight replaces a share of the same task, and conversely; a weight of 0, and another
    mode of rotation, all of the task's fields. ``rotation.mode extra`` alone is the paper's recipe, with its weight for the
    method. Encoders of timm have views of one size, since only convolutional networks were measured. With ``views.split 2`` no
    projector is told angles, which it could not be.

    Args:
        given: dotted overrides.
    """
    spec = METHODS.get(str(given.get("method.name", sections.Config().method.name)))
    if spec is None:  # build() names the known ones
        return {}
    fields = {key: value for key, value in spec.recommended.items() if key not in given}
    if str(given.get("encoder.name")).startswith("timm/"):
        fields.pop("views.size_start", None)
    if str(given.get("views.split", 1)) == "2":
        fields.pop("rotation.conditioned", None)
    for task in TASKS:
        weight = given.get(f"{task}.weight")
        if weight is not None or f"{task}.share" in given:
            fields = {key: value for key, value in fields.items() if key not in (f"{task}.weight", f"{task}.share")}
        other = task == "rotation" and given.get("rotation.mode", "in_place") != "in_place"
        if other or str(weight) in ("0", "0.0"):
            fields = {key: value for key, value in fields.items() if not key.startswith(f"{task}.")}
    papers = {"rotation.weight": spec.paper_weight, "rotation.head_on": "projector"}
    if (
        given.get("rotation.mode") == "extra"
        and spec.paper_weight
        and not {"rotation.weight", "rotation.share"} & given.keys()
    ):
        fields |= {key: value for key, value in papers.items() if key not in given}
    return fields


def _sections() -> list[str]:
    return list(dict.fromkeys(key.split(".")[0] for key in schema()))


def dump(config: Config) -> str:
    """The configuration as a recipe."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)
