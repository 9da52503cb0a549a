"""The notebooks, and the blocks of Python in the documentation: they run, and what is stored is fit to show."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.programs import ROOT, without_ray

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
WORDS = {"first_run": ("finished", "epoch 3/3", "right for", "no such field"), "sweep": ("simsiam", "rotation")}


def outputs(cells):
    """What the cells show, each as text."""
    for cell in cells:
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error", output
            assert output.get("name") != "stderr", output
            yield json.dumps(output, ensure_ascii=False)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_stored_notebook_is_small_and_shows_what_it_did(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(cell["outputs"] for cell in code[1:]), "run scripts/notebooks.py"
    shown = "".join(outputs(cells))
    assert all(word in shown for word in WORDS[path.stem])
    assert path.stat().st_size < 300_000 and not re.search(r"/tmp/|/root/|[Ww]arning:", shown)


def test_all_notebooks_are_linked():
    assert {path.stem for path in NOTEBOOKS} == set(WORDS)
    for path in NOTEBOOKS:
        assert f"(notebooks/{path.name})" in (ROOT / "docs" / "python.md").read_text()


@pytest.mark.exhaustive
@pytest.mark.system
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import notebooks

    for name in set(os.environ) - set(without_ray()):
        monkeypatch.delenv(name)
    shown = "".join(outputs(notebooks.executed(path, str(tmp_path)).cells))
    assert all(word in shown for word in WORDS[path.stem])


@pytest.mark.exhaustive
@pytest.mark.system
@pytest.mark.parametrize("page", ["python", "own_method"])
def test_the_blocks_of_a_page_run(page, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / f"{page}.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    file = tmp_path / "page.py"
    file.write_text("\n".join(blocks))
    env = without_ray() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(file)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stdout
