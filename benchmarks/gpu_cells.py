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

# Where the function of a kind is.
MODULES = {
    "pytest": "gpu_runs",
    "ray": "gpu_runs",
    "speed": "gpu_speed",
    "profile": "gpu_speed",
    "lightly": "gpu_speed",
    "levers": "gpu_levers",
    "decode": "gpu_decode",
    "equal_minutes": "gpu_train",
    "train": "gpu_train",
}


def needs(cell: Cell) -> None:
    """See that the modules are here.

    Raises:
        NotHere: one is not.
    """
    for name in cell.needs:
        try:
            importlib.import_module(name)
        except (ImportError, OSError) as error:  # OSError: a library in it is for another Python
            why = (str(error).splitlines() or [""])[0][:200]
            raise NotHere(f"needs {name}, which cannot be imported here ({why})") from error


def run(cell: Cell) -> None:
    """What the cell's kind does."""
    needs(cell)
    getattr(importlib.import_module(MODULES[cell.kind]), cell.kind)(cell)


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
