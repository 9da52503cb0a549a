"""A short form of `make fuzz`."""

import subprocess
import sys

import pytest

from tests.programs import ROOT


@pytest.mark.system
@pytest.mark.exhaustive
def test_made_up_input_is_refused_in_a_line_or_used(tmp_path):
    counts = ["--configs", "1000", "--folders", "60", "--runs", "60"]
    script = [sys.executable, str(ROOT / "scripts" / "fuzz.py"), *counts]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0 and "| damaged runs | 60 |" in done.stdout, done.stdout + done.stderr
