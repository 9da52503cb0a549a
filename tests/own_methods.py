"""Methods from outside the package, for the tests: packages that are not installed, only found on the path."""

import os
from contextlib import contextmanager
from pathlib import Path

from rotssl.config.methods import METHODS
from tests.programs import ROOT

EXAMPLE = ROOT / "docs" / "examples" / "align_uniform"


def installed(folder, name, **points):
    """A folder for the path with what an installed package leaves of its entry points, and of nothing else."""
    info = Path(folder) / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = "".join(f"{key} = {value}\n" for key, value in points.items())
    (info / "entry_points.txt").write_text(f"[rotssl.methods]\n{lines}")
    return str(folder)


def with_example(folder):
    """The environment of a program that finds the example's package, as if it were installed."""
    here = installed(folder, "align_uniform", align_uniform="align_uniform:SPEC")
    return os.environ | {"PYTHONPATH": os.pathsep.join([here, str(EXAMPLE), str(ROOT)])}


@contextmanager
def forgotten():
    """METHODS as a new process has them; what the body adds is forgotten at its end."""
    kept = dict(METHODS.data), dict(METHODS.sources), set(METHODS.added), METHODS._broken
    METHODS._broken = None
    try:
        yield METHODS
    finally:
        METHODS.data, METHODS.sources, METHODS.added, METHODS._broken = kept
