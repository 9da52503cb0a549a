"""The files of cluster/, for their tests: programs that read them, versions that they state, command lines in them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rotssl.config import cli, sweep

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
DOCKERFILE = CLUSTER / "image" / "Dockerfile"
PAGES = sorted((ROOT / "docs" / "clusters").glob("*.md"))


def program(name):
    """The path of a program of the extra ``cluster``; the test is skipped without it."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    return found or pytest.skip(f"{name} is not installed: pip install '.[cluster]'")


def output(*command, **options):
    """What a program prints, if it ends well."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def stated(file, pattern):
    """The one value of a pattern's group in a file."""
    (value,) = set(re.findall(pattern, Path(file).read_text(), re.M))
    return value


def ray_version():
    """The Ray of the image."""
    return stated(DOCKERFILE, r"^ARG RAY_VERSION=(.+)$")


def parsed(script, arguments):
    """The Config of a command line of jobs/pretrain.py, or the Sweep of one of jobs/ablate.py."""
    if script == "pretrain.py":
        return cli.parse(arguments).config
    assert script == "ablate.py"
    return sweep.parse(arguments, "jobs/ablate.py", "").sweep


def shellcheck(text, *, shell="bash"):
    """Shellcheck's objections, and bash's."""
    output(program("shellcheck"), f"--shell={shell}", "-", input=text)
    output("bash", "-n", input=text)


def without_login():
    """The environment without variables that the programs here read."""
    words = ("RAY_", "MLFLOW_", "PG", "AWS_", "UV_")
    return {key: value for key, value in os.environ.items() if not key.startswith(words)}
