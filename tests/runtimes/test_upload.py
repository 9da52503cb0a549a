"""What `ray job submit --working-dir .` uploads: all of the code and little else, packed by Ray's own functions."""

import os
import subprocess
import zipfile

import pytest

from tests.programs import ROOT

pytestmark = pytest.mark.system
LIMIT = 8_000_000  # bytes
LEFT_OUT = ".venv/lib", ".git", "results/rotssl/run", "data", "mlruns", "site", "docs", "tests", "benchmarks/results"


@pytest.fixture
def checkout(tmp_path):
    """A clean copy of the files that git has, and what work leaves beside them: each too large by itself."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    folder = tmp_path / "checkout"
    subprocess.run(["git", "-C", ROOT, "checkout-index", "--all", f"--prefix={folder}/"], check=True)
    for name in LEFT_OUT:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "large").write_bytes(os.urandom(LIMIT + 1))
    (folder / "mlflow.db").write_bytes(os.urandom(LIMIT + 1))
    return folder


def test_the_upload_of_a_job_is_small(checkout, tmp_path):
    from ray._private.runtime_env.packaging import create_package

    create_package(str(checkout), tmp_path / "upload.zip", include_gitignore=True)
    assert (tmp_path / "upload.zip").stat().st_size < LIMIT
    packed = set(zipfile.ZipFile(tmp_path / "upload.zip").namelist())
    asked = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "rotssl", "jobs", "cluster"], check=True, capture_output=True, text=True
    )
    assert set(asked.stdout.split()) <= packed
    assert not [name for name in packed if name.endswith(("/large", ".db")) or name.startswith(("docs/", "tests/"))]
