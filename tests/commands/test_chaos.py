"""A short form of `make chaos`."""

import subprocess
import sys
import tempfile

import pytest

from tests.programs import ROOT


@pytest.mark.system
@pytest.mark.exhaustive  # minutes
@pytest.mark.timeout(900)
def test_a_run_with_three_faults_ends_as_one_without():
    with tempfile.TemporaryDirectory() as folder:  # whose path is short enough for Ray's sockets
        script = [sys.executable, str(ROOT / "scripts" / "chaos.py"), "--folder", folder]
        kinds = ["--faults", "3", "--kinds", "worker,sigterm,checkpoint_bit"]
        done = subprocess.run([*script, *kinds, "--minutes", "14"], capture_output=True, text=True)
    assert done.returncode == 0 and "nothing left behind" in done.stdout, done.stdout + done.stderr
