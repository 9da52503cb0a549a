"""What fuzz.py makes up: configurations, recipes, sweep files, image folders, and damages of a run's folder."""

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from hypothesis import strategies as st
from PIL import Image

from rotssl.config import schema
from rotssl.config.methods import METHODS

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=12),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.lists(st.one_of(st.integers(-3, 3), st.text(max_size=3)), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from(
        ["auto", "none", "null", "NaN", "1e999", "-0", "0x10", "1_000", "true", "../..", "\0", "é", "\ud800"]
    ),
)


def values(hint: Any, bounds: dict[str, float]) -> st.SearchStrategy[Any]:
    """Values of a field's type, mostly within its bounds."""
    low = bounds.get("ge", bounds.get("gt", -2))
    high = bounds.get("le", bounds.get("lt", max(64, 2 * low)))
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is tuple:
        return st.lists(st.floats(low, high, width=16), min_size=1, max_size=4).map(sorted)
    plain = {
        bool: st.booleans(),
        int: st.integers(math.ceil(low), math.floor(high)),
        float: st.floats(low, high),
        str: st.sampled_from(["small", "resnet18", "run", "off", "/tmp/x", "a b"]),
        type(None): st.none(),
    }
    return plain[hint] if hint in plain else st.one_of([values(option, bounds) for option in get_args(hint)])


def _field(method: str) -> st.SearchStrategy[tuple[str, Any]]:
    known = schema(method)

    def of(key: str) -> st.SearchStrategy[tuple[str, Any]]:
        hint, spec = known[key]
        value = (
            values(hint, spec.metadata["bounds"]) if key != "encoder.name" else st.sampled_from(["small", "resnet18"])
        )
        chosen = st.integers(0, 19).map(lambda n: JUNK if n == 0 else st.just(spec.default) if n < 6 else value)
        return st.tuples(st.just(key), chosen.flatmap(lambda strategy: strategy))

    return st.sampled_from(sorted(known.keys() - {"method.name", "data.name"})).flatmap(of)


def _configuration(method: str) -> st.SearchStrategy[dict[str, Any]]:
    given = st.lists(_field(method), max_size=6).map(dict)
    return given.map(lambda fields: {**fields, "method.name": method})


configurations = st.sampled_from(sorted(METHODS)).flatmap(_configuration)


def _nested(fields: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in fields.items():
        section, leaf = key.split(".")
        found.setdefault(section, {})[leaf] = value
    return found


def _text(content: Any) -> bytes:
    try:
        return yaml.safe_dump(content, allow_unicode=True).encode()
    except UnicodeEncodeError:
        return b"\xff"


def _damaged(content: bytes, cut: float, extra: bytes) -> bytes:
    place = int(cut * len(content))
    return content[:place] + extra + content[place:]


_recipe = configurations.map(_nested).map(_text)
recipes = st.one_of(
    _recipe,
    st.builds(
        _damaged,
        _recipe,
        st.floats(0, 1),
        st.sampled_from([b"\n", b": ", b"- ", b"{", b"&a *a", b"!!python/x", b"\x00"]),
    ),
    st.binary(max_size=60),
)

_axes = st.lists(_field("byol"), max_size=3).map(lambda pairs: {key: [value, value] for key, value in pairs})
_odd = st.dictionaries(
    st.sampled_from(["rotation.weight", "recipe", "train.seed", "x", "train.epochs"]), JUNK, max_size=2
)
sweeps = st.builds(
    lambda grid, odd, sweep, fields: _text({"grid": {**grid, **odd}, "sweep": sweep, **_nested(fields)}),
    _axes,
    _odd,
    st.one_of(
        st.none(),
        st.dictionaries(st.sampled_from(["name", "seeds", "recipe", "samples", "scheduler"]), JUNK, max_size=2),
    ),
    _configuration("byol"),
)

_NAMES = [
    "train",
    "val",
    "test",
    "Train",
    "validation",
    "ant",
    "bee",
    "cow",
    ".hidden",
    "__MACOSX",
    "n01440764",
    "a b",
    "ü",
    "0",
]
_ENDS = [".png", ".jpg", ".JPEG", ".tif", ".webp", ".gif", ".txt", "", ".png.part"]


def _picture(mode: str, side: int, form: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (side, max(1, side // 2)), 7).save(file, form)
    return file.getvalue()


_pictures = st.one_of(
    st.builds(_picture, st.sampled_from(["RGB", "L", "P", "RGBA", "1"]), st.integers(1, 40), st.just("PNG")),
    st.builds(_picture, st.sampled_from(["I", "F", "I;16", "RGB"]), st.integers(1, 40), st.just("TIFF")),
    st.builds(_picture, st.sampled_from(["RGB", "L", "CMYK"]), st.integers(1, 40), st.just("JPEG")),
)
_contents = st.one_of(
    _pictures,
    _pictures,
    st.builds(lambda content, cut: content[: int(cut * len(content))], _pictures, st.floats(0, 1)),
    st.builds(_damaged, _pictures, st.floats(0, 1), st.binary(min_size=1, max_size=8)),
    st.binary(max_size=40),
)
_paths = st.builds(
    lambda parts, number, end: "/".join([*parts, f"{number}{end}"]),
    st.lists(st.sampled_from(_NAMES), max_size=3),
    st.integers(0, 9),
    st.sampled_from(_ENDS + [".png"] * 8),
)
folders = st.dictionaries(_paths, _contents, max_size=16)


def plant(root: Path, files: dict[str, bytes]) -> None:
    """Write files; one whose folder is a file, or the other way round, is left out."""
    for name, content in files.items():
        path = root / name
        if any(parent.is_file() for parent in path.parents) or path.is_dir():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


DAMAGES = ("remove", "empty", "cut", "flip", "noise", "folder", "append", "swap", "zeros", "value", "link")
damages = st.lists(
    st.tuples(st.sampled_from(DAMAGES), st.floats(0, 1), st.floats(0, 1), JUNK),
    min_size=1,
    max_size=3,
)


def damage(folder: Path, kind: str, which: float, where: float, junk: Any) -> str:
    """Damage a file of a run's folder; returns what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    path = files[min(len(files) - 1, int(which * len(files)))]
    content = path.read_bytes()
    if kind == "value" and path.suffix in (".json", ".jsonl"):
        content = _another_value(content, where, junk)
    place = int(where * max(0, len(content) - 1))
    changed = {
        "empty": b"",
        "cut": content[:place],
        "flip": content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :] if content else b"",
        "noise": bytes((31 * i + place) % 256 for i in range(len(content))),
        "append": content + b"\0{garbage",
        "zeros": bytes(len(content)),
        "value": content,
    }
    if kind in changed:
        path.write_bytes(changed[kind])
    elif kind == "swap":
        other = files[min(len(files) - 1, int(where * len(files)))]
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    else:
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to("nowhere")
    return f"{kind} {path.relative_to(folder)} at {where:.3g} ({junk!r})"


def _another_value(content: bytes, where: float, junk: Any) -> bytes:
    """The lines of JSON with one of their values replaced."""
    lines = content.splitlines() if content.count(b"\n}") == 0 else [content]
    try:
        found = [json.loads(line) for line in lines]
    except ValueError:  # damaged before
        return content
    if not found:
        return content
    chosen = found[int(where * len(found)) % len(found)]
    if isinstance(chosen, dict) and chosen:
        key = sorted(chosen)[int(where * 997) % len(chosen)]
        chosen[key] = junk
    return b"\n".join(json.dumps(line).encode() for line in found) + b"\n"


def fresh(template: Path, target: Path) -> Path:
    """A copy of a folder."""
    shutil.copytree(template, target)
    return target
