"""Run the notebooks of docs/notebooks and keep what they show.

    python scripts/notebooks.py                # all of them, anew; needs nbclient and ipykernel, which the extra `dev` has

Each runs in an empty folder, which its outputs then name /home/you.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "docs" / "notebooks"
HOME = "/home/you"


def executed(path: Path, folder: str) -> Any:
    """The notebook with the outputs that it has when it runs in a folder.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raises an error.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return notebook


def cleaned(notebook: Any, folder: str) -> str:
    """The notebook as text, without times and without the folder that it ran in."""
    for cell in notebook.cells:
        cell.metadata.clear()
        cell.get("outputs", [])[:] = [output for output in cell.get("outputs", []) if not _is_empty(output)]
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    for place, shown in (
        (os.path.realpath(folder), HOME),
        (folder, HOME),
        (str(Path(sys.executable).parent), ".venv/bin"),
    ):
        text = text.replace(place, shown)
    return text


def _is_empty(output: Any) -> bool:
    """Whether an output shows nothing, as a progress bar does at its end."""
    return output.output_type == "display_data" and output.data.get("text/html") == ""


def main() -> int:
    """Run them all; returns the exit code."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        with tempfile.TemporaryDirectory(prefix="rotssl-notebook-") as folder:
            path.write_text(cleaned(executed(path, folder), folder))
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
