"""The demo: BYOL on the embedded sample with rotation prediction off and on, with the same seed.

Accepts the flags of jobs/pretrain.py, for both runs.
"""

import sys
from contextlib import nullcontext

from rotssl.commands import EXIT_OK, run_command
from rotssl.commands.pretrain import pretrain
from rotssl.config import replace
from rotssl.config.cli import parse
from rotssl.config.fields import ConfigError
from rotssl.lifecycle import prepare
from rotssl.reports.curves import cost_to_reach
from rotssl.reports.terminal import convergence, show
from rotssl.runs import journal
from rotssl.runs.curve import save_convergence
from rotssl.runtimes.ray_cluster import connected


def demo() -> int:
    """Run both, then compare; returns the exit code."""
    asked = parse(sys.argv[1:], "jobs/demo.py", __doc__).config
    if asked.evaluation.knn_every in (0, "auto"):
        raise ConfigError(
            f"evaluation.knn_every: got {asked.evaluation.knn_every}, expected at least 1: the demo compares kNN"
        )
    asked = replace(asked, {"tracking.experiment": "demo", "tracking.run_name": None})
    weights = {"rotation off": 0.0, "rotation on": asked.rotation.weight}
    configs = {name: prepare(replace(asked, {"rotation.weight": weight}))[0] for name, weight in weights.items()}
    for name, config in configs.items():  # names that distinguish the two in MLflow
        run_name = f"{name.replace(' ', '-')}-{config.tracking.run_name}"
        configs[name] = replace(config, {"tracking.run_name": run_name})
    with nullcontext() if asked.scaling.num_workers == 0 else connected(asked):  # one cluster for both
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
    target = off[max(off)]["knn/top1"]
    for cost, unit in (("cost/epochs", "epochs"), ("cost/train_seconds", "s of training")):
        reached = [cost_to_reach(points, target, cost) for points in (off, on)]
        shown = ["not reached" if value is None else f"{value:.1f} {unit}" for value in reached]
        print(f"to reach rotation off's final {target:.1%}: rotation off {shown[0]}, rotation on {shown[1]}")
    print("(one seed; benchmarks/results/ has the paired comparison over several)")
    print(f"plot         {picture}")
    return EXIT_OK


if __name__ == "__main__":
    run_command(demo)
