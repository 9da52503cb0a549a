"""One cell of gpu.py's queue, in a process of its own: gpu_cells.py SPEC RESULT, both as gpu.py makes them."""

import importlib
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

from gpu_cell import Cell, NotHere, TimeUp


def needs(cell: Cell) -> None:
    """See that the packages are here.

    Raises:
        NotHere: one is not.
    """
    for name in cell.needs:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise NotHere(f"needs {name}, which cannot be imported here ({error})") from error


def run(cell: Cell) -> None:
    """What the cell's kind does."""
    needs(cell)
    if cell.kind in ("speed", "profile", "lightly"):
        import gpu_speed as kinds
    else:
        import gpu_runs as kinds  # type: ignore[no-redef]
    getattr(kinds, cell.kind)(cell)


def follow() -> None:
    """End with the runner, however that ends: a cell left alone would take its time from the next call's."""
    sys.stdin.read()
    os.killpg(os.getpgid(0), signal.SIGKILL)


def main() -> int:
    """Run the cell; its result says how it went."""
    threading.Thread(target=follow, daemon=True).start()
    cell = Cell(json.loads(sys.argv[1]), Path(sys.argv[2]))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(cell)
    except NotHere as error:
        cell.tell("not run", str(error))
    except TimeUp as error:
        cell.tell("cut", str(error))
    except KeyboardInterrupt:
        cell.tell("cut")
        return 1
    except BaseException as error:  # whatever it is, the next cell runs
        traceback.print_exc()
        cell.tell("failed", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}")
    else:
        cell.tell("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
