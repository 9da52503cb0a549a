"""Golden losses: the first twenty steps of every method, in double precision, through the engine as it trains.

The file beside this one holds them. What does not mean to change results leaves every number as it is, to the last bit, on the
machine that it was changed on:

    python -m tests.golden           # compares with the file: exit code 1 if any number differs at all
    python -m tests.golden --renew   # writes the file anew: only with a change of results that the commit states
    python -m tests.golden --renew tico   # of one method only, such as a new one

Other processors add up in another order, so tests/engine/test_golden.py, which runs anywhere, allows for rounding.
"""

import argparse
import json
import platform
import re
import sys
import tempfile
from itertools import islice
from pathlib import Path

import torch

from rotssl.config.methods import METHODS
from tests.small_runs import PAPER, arithmetic, make_config, trainer

FILE = Path(__file__).with_suffix(".json")
STEPS = 20
FORMS = {"plain": {"rotation.weight": 0}, "in place": {}, "extra": PAPER}


def losses(folder, method: str, form: str) -> dict[str, list[float]]:
    """Loss by loss, its value at each step: real images, five epochs of four steps, at the method's own rate."""
    fields = {
        "data.name": "fashion-mnist-sample",
        "data.limit": 80,
        "train.epochs": STEPS // 4,
        "tracking.run_name": form,
    }
    fields |= {"optim.lr": METHODS[method].lr, **FORMS[form]}
    with arithmetic(torch.float64):
        run = trainer(make_config(folder, method, **fields))
        steps = islice((batch for epoch in range(run.config.train.epochs) for batch in run.batches(epoch)), STEPS)
        logs = [run.step(images, ctx) for images, ctx in steps]
    return {key: [float(log[key]) for log in logs] for key in sorted(logs[0]) if key.startswith("loss/")}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--renew",
        nargs="*",
        choices=METHODS,
        metavar="METHOD",
        help="write these methods' anew, or all",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    methods = args.renew or METHODS
    with tempfile.TemporaryDirectory() as folder:
        found = {method: {form: losses(Path(folder), method, form) for form in FORMS} for method in methods}
    golden = json.loads(FILE.read_text())
    if args.renew is not None:
        machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
        kept = {"machine": golden["machine"], "losses": golden["losses"] | found}
        whole = {"machine": machine, "losses": found}
        text = json.dumps(kept if args.renew else whole, indent=1)
        text = re.sub(r"\[[^]]*\]", lambda series: " ".join(series[0].split()), text)  # a line for each series
        FILE.write_text(text + "\n")
        print(f"wrote {FILE}")
        return 0
    other = [
        (abs(ours / theirs - 1), f"{method}, {form}, {key}, step {step + 1}: {ours!r}, not {theirs!r}")
        for method, forms in golden["losses"].items()
        for form, series in forms.items()
        for key, values in series.items()
        for step, (ours, theirs) in enumerate(zip(found[method][form][key], values, strict=True))
        if ours != theirs
    ]
    print(*(text for _, text in other[:20]), sep="\n")
    most = f", by {max(other)[0]:.1e} at most" if other else ""
    print(f"{len(other)} numbers differ from those of {golden['machine']}{most}")
    return int(bool(other))


if __name__ == "__main__":
    sys.exit(main())
