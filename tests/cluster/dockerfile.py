"""A Dockerfile's stages and lines, and what a .dockerignore leaves of a folder; as much of both as ours use."""

import os
import re
from dataclasses import dataclass, field

SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


@dataclass
class Stage:
    """A stage: its base, the instructions in it, and the values that they see."""

    name: str
    base: str
    lines: list[tuple[str, str]] = field(default_factory=list)
    values: dict[str, str] = field(default_factory=dict)


def expanded(text, values):
    """Text with its ${NAME} and $NAME replaced; unknown ones stay, for the shell."""
    return re.sub(r"\$\{?(\w+)\}?", lambda found: values.get(found[1], found[0]), text)


def stages(text, **arguments):
    """The stages of a Dockerfile by name, the last one also as ``""``, with build arguments applied."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.M)
    whole, found = {}, {}
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if not line.strip():
            continue
        word, rest = line.split(None, 1)
        if word == "FROM":
            base, _, name = expanded(rest, whole).partition(" AS ")
            above = found.get(base)
            current = Stage(name, base, [], dict(above.values) if above else {"PATH": SYSTEM_PATH})
            found[name] = found[""] = current
        elif word == "ARG":
            name, _, default = rest.partition("=")
            (current.values if found else whole)[name] = arguments.get(name, default)
        elif word == "ENV":
            for name, value in re.findall(r"(\w+)=(\S+)", expanded(rest, current.values)):
                current.values[name] = value
        else:
            current.lines.append((word, expanded(rest, current.values) if word != "RUN" else rest))
    return found


def ignored(path, patterns):
    """Whether a .dockerignore leaves a path out: the last pattern that matches it, or a folder above it, decides."""
    out = False
    parts = path.split("/")
    above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    for pattern in patterns:
        wanted, plain = pattern.startswith("!"), pattern.lstrip("!").strip("/")
        regex = re.escape(plain).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(regex, part) for part in above):
            out = not wanted
    return out


def patterns_of(file):
    """The patterns of a .dockerignore."""
    return [line for line in file.read_text().splitlines() if line and not line.startswith("#")]


def context(root, patterns):
    """The files below a folder that are sent to the builder."""
    for folder, below, files in os.walk(root):
        inside = os.path.relpath(folder, root)
        paths = {name: os.path.normpath(os.path.join(inside, name)) for name in (*below, *files)}
        below[:] = [name for name in below if not ignored(paths[name], patterns)]
        yield from (paths[name] for name in files if not ignored(paths[name], patterns))
