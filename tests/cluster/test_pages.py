"""The pages about clusters: what they tell to type is understood by the programs that they name."""

import re
import shlex
import warnings
from pathlib import Path

import pytest

from tests.cluster.files import PAGES, ROOT, parsed, shellcheck

pytestmark = pytest.mark.cluster
page = pytest.mark.parametrize("file", PAGES, ids=lambda file: file.stem)


def commands(file):
    """The command lines in the code of a page, with continued lines joined; those in a table's or a sentence's code are not."""
    text = file.read_text().replace("\\\n", " ")
    text = re.sub(r"^```(?!bash)\w+\n.*?^```$", "", text, flags=re.M | re.S)  # of YAML, for example
    fenced = re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S)
    lines = [*re.findall(r"^    (.*)$", text, re.M), *"".join(fenced).splitlines()]
    return [" ".join(line.split()) for line in lines]


@page
def test_jobs_get_fields_that_exist(file):
    found = 0
    for line in commands(file):
        line = line.replace("RECIPE", "jobs/recipes/byol_fashion_mnist_sample.yaml").split(" #")[0]
        if here := re.search(
            r"(?:python (?:/opt/rotssl/)?jobs/|cluster/slurm/)(pretrain|ablate)\.(?:py|sbatch) (.*)", line
        ):
            arguments = [str(ROOT / word) if word.startswith("jobs/") else word for word in shlex.split(here[2])]
            flags = [word for word in arguments if word not in ("--smoke", "--dry-run")]
            parsed(f"{here[1]}.py", flags)
            found += 1
    # The commands of the first are in the manifests; the other starts no run.
    assert found or file.stem in ("kubernetes", "watching")


@page
def test_ray_knows_its_commands(file):
    with warnings.catch_warnings(action="ignore"):
        from ray.scripts.scripts import cli
    for line in commands(file):
        for here in re.finditer(r"(?:^|exec head )ray (?!--version)(.*)", line):
            words = shlex.split(here[1])
            command, context = cli, None
            while hasattr(command, "commands"):
                context = command.make_context("ray", [], parent=context, resilient_parsing=True)
                name = words.pop(0)
                command = command.get_command(context, name)
                assert command is not None, f"ray {here[1]}"
            command.make_context(name, words, parent=context)


@page
def test_files_and_folders_exist(file):
    text = file.read_text()
    for path in re.findall(r"(?<![\w/.-])cluster/[\w./-]+[\w]", text):
        made = path == "cluster/.env" or path.endswith("overlays/mine")
        assert made or (ROOT / path).exists(), path
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (file.parent / target).exists(), target
    for name in re.findall(r"`(components|services|overlays|base)/?([\w/.-]*)`", text):
        assert (ROOT / "cluster" / "kubernetes" / Path(*name)).exists(), name


@page
def test_the_shell_understands_the_lines(file):
    shellcheck("# shellcheck disable=SC1091,SC2034,SC2154,SC2155\n" + "\n".join(commands(file)) + "\n")
