"""Somebody who follows the page about Slurm in a checkout of their own."""

import json
import re
import shutil
import sys

from tests.programs import ROOT

PAGE = ROOT / "docs" / "clusters" / "slurm.md"


def blocks():
    """The page's blocks, which are indented or fenced, by the title of their section."""
    found = {}
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.M)[1:]:
        title, body = section.split("\n", 1)
        both = re.findall(r"((?:^    [^\n]*\n)+)|^```\w+\n(.*?)^```$", body, re.M | re.S)
        found[title] = [re.sub("^    ", "", indented, flags=re.M) or fenced for indented, fenced in both]
    return found


class Stranger:
    """Somebody with an account, in a checkout of their own."""

    def __init__(self, slurm, checkout):
        for name in ("cluster", "jobs", "rotssl"):
            shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        self.slurm, self.checkout = slurm, checkout
        # `make setup` has been done elsewhere.
        self.env = {"VENV": sys.prefix, "PYTHONPATH": str(checkout)}

    def types(self, block, job="", more=""):
        """Type a block of the page, with a number in place of JOB; returns what it prints."""
        command = block.rstrip().replace("JOB", job) + more
        return self.slurm("bash", "-euc", command, env=self.env, cwd=self.checkout)

    def submits(self, block, more=""):
        """Type a block that submits a job; returns its number."""
        return re.fullmatch(r"Submitted batch job (\d+)\s*", self.types(block, more=more))[1]

    def log(self, job):
        file = self.checkout / f"rotssl-{job}.log"
        return file.read_text() if file.exists() else ""

    def run(self, name):
        return self.checkout / "results" / "rotssl" / name

    def status(self, name):
        return json.loads((self.run(name) / "run.json").read_text())["status"]
