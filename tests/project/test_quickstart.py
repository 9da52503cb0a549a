"""The quickstart, as a reader types it: all of its blocks, one after the other, in one shell."""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.programs import ROOT, without_ray

LEFT_OUT = (".git", ".venv", "results", "site", "benchmarks", "tests", "__pycache__", ".*_cache", "*.egg-info")


def blocks():
    """The shell blocks of the page."""
    return re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs" / "quickstart.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def checkout(tmp_path):
    """A copy of the checkout, whose .venv has the packages of this one: `make setup` then finds its work done."""
    if shutil.which("make") is None:
        pytest.skip("no make here")
    folder = tmp_path / "rotssl"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / ".venv")], check=True)
    (packages,) = (folder / ".venv").glob("lib/python*/site-packages")
    (packages / "tests.pth").write_text(f"{folder}\n{sysconfig.get_path('purelib')}\n")
    (folder / ".venv" / ".installed").touch()
    return folder


def test_all_commands_of_the_page_are_in_its_shell_blocks():
    text = (ROOT / "docs" / "quickstart.md").read_text()
    assert len(blocks()) >= 7
    assert set(re.findall(r"^```(\w*)$", text, re.MULTILINE)) == {"bash", ""}
    assert not re.search(r"^    \S", text.replace("".join(blocks()), ""), re.MULTILINE)


@pytest.mark.exhaustive
@pytest.mark.system
@pytest.mark.timeout(600)
def test_the_quickstart_runs(checkout):
    env = {key: value for key, value in without_ray().items() if key not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")}
    done = subprocess.run(
        ["bash", "-e", "-c", "\n".join(blocks())], cwd=checkout, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "stopped after epoch 1 of 2 as requested" in done.stdout
    assert "resuming after epoch 1" in done.stderr + done.stdout
    assert "torch.Size([8, " in done.stdout
    for path in (
        "rotssl/rotated/encoder.safetensors",
        "rotssl/plain/metrics.jsonl",
        "report-rotssl/report.html",
        "views.png",
    ):
        assert (Path(checkout) / "results" / path).exists(), path
