"""The demo: BYOL on the embedded sample with rotation prediction off and on, same seed, two curves.

Takes the flags of jobs/pretrain.py for both runs.
"""

import sys

from rotssl import journal
from rotssl.cli import EXIT_OK, parse, run_command
from rotssl.config import replace
from rotssl.launch import prepare, pretrain
from rotssl.ray_runtime import connected
from rotssl.reporting.convergence import cost_to_reach
from rotssl.reporting.pictures import save_convergence
from rotssl.reporting.tables import convergence, show


def demo() -> int:
    """Run both, then compare; returns the exit code."""
    asked = parse(sys.argv[1:], "jobs/demo.py", __doc__).config
    asked = replace(asked, {"tracking.experiment": "demo", "tracking.run_name": None})
    configs = {
        "rotation off": prepare(replace(asked, {"rotation.weight": 0.0}))[0],
        "rotation on": prepare(asked)[0],
    }
    with connected(asked):  # one cluster for both
        for config in configs.values():
            code = pretrain(config)
            if code != EXIT_OK:
                return code
    curves = {name: journal.read(config.run_dir) for name, config in configs.items()}
    off, on = curves.values()
    picture = configs["rotation on"].run_dir.parent / "demo.png"
    save_convergence(
        curves, picture, title=f"{asked.method.name.upper()} on {asked.data.name}, seed {asked.train.seed}"
    )
    show(convergence("kNN top-1 on validation", list(curves), list(curves.values())))
    last = off[max(off)]
    for cost, unit in (("cost/epochs", "epochs"), ("cost/train_seconds", "s of training")):
        reached = cost_to_reach(on, last["knn/top1"], cost)
        ours = "not reached" if reached is None else f"{reached:.0f} {unit}"
        print(f"to reach {last['knn/top1']:.1%}: rotation off {last[cost]:.0f} {unit}, rotation on {ours}")
    print("(one seed; benchmarks/results/ has the paired comparison over several)")
    print(f"plot         {picture}")
    return EXIT_OK


if __name__ == "__main__":
    run_command(demo)
