"""What `ray job submit --working-dir .` uploads: all of the code and little else, packed by Ray's own function."""

import os
import shutil
import subprocess
import zipfile

import pytest

from tests.programs import ROOT

pytestmark = pytest.mark.system
LIMIT = 8_000_000  # bytes
LEFT_OUT = ".venv/lib", ".git", "results/rotssl/run", "data", "mlruns", "site", "docs", "tests", "benchmarks/results"


@pytest.fixture
def ours():
    """The files that git knows."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], check=True, capture_output=True, text=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture
def checkout(tmp_path, ours):
    """A clean copy of them, and what work leaves beside them: each too large by itself."""
    folder = tmp_path / "checkout"
    for name in ours:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    noise = os.urandom(LIMIT + 1)
    for name in LEFT_OUT:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "large").write_bytes(noise)
    (folder / "mlflow.db").write_bytes(noise)
    return folder


def test_the_upload_of_a_job_is_small(checkout, ours, tmp_path):
    from ray._private.runtime_env.packaging import create_package

    create_package(str(checkout), tmp_path / "upload.zip", include_gitignore=True)
    packed = set(zipfile.ZipFile(tmp_path / "upload.zip").namelist())
    assert not [name for name in packed if name.endswith(("/large", ".db")) or name.startswith(("docs/", "tests/"))]
    assert (tmp_path / "upload.zip").stat().st_size < LIMIT
    assert {name for name in ours if name.startswith(("rotssl/", "jobs/", "cluster/"))} <= packed
