"""Runs with made-up curves, and what is found in them."""

from rotssl import config as cfg
from rotssl.reports import findings
from rotssl.reports.comparison import compare_cells
from rotssl.reports.groups import cells_of, conditions, sift
from rotssl.tracking.reader import TrackedRun

PLAIN = (0.2, 0.4, 0.5, 0.6)


def run(
    finals=PLAIN, *, status="FINISHED", reason="completed", started=0, std=0.8, grows=1.0, name=None, tags=(), **fields
):
    """A run with these accuracies, None where it was not measured; ``fields`` are spelt method__name.

    An epoch takes 10 FLOPs and 2 device-seconds, twice the FLOPs and three times the seconds with rotation.
    """
    overrides = {key.replace("__", "."): value for key, value in fields.items()}
    overrides = {"rotation.weight": 0, "train.epochs": len(finals), "optim.warmup_epochs": 0} | overrides
    config = cfg.resolve(cfg.build(overrides), 28, 5000)
    on = config.rotation.weight > 0
    points = {
        epoch: {
            "cost/epochs": float(epoch),
            "cost/flops": epoch * (20.0 if on else 10.0),
            "cost/device_seconds": epoch * (6.0 if on else 2.0),
            "feature/std": std,
            "loss/ssl": grows**epoch,
        }
        | ({} if value is None else {"knn/top1": value})
        for epoch, value in enumerate(finals, 1)
    }
    params = {key: str(value) for key, value in cfg.flat(config).items() if not key.startswith(cfg.NOT_IDENTITY)}
    name = name or f"w{config.rotation.weight:g}-e{config.train.epochs}-s{config.train.seed}"
    tags = {"status_reason": reason, **dict(tags)}
    return TrackedRun(f"id-{name}-{started}", name, status, started, params, tags, points)


def compare(records, baseline=None, target=None, metric="knn/top1"):
    runs, left_out = sift(records, metric)
    cells = cells_of(runs)
    return compare_cells(cells, left_out, conditions(baseline, cells), metric, target)


def rotated(finals, seed=0, weight=1, **more):
    return run(finals, rotation__weight=weight, train__seed=seed, **more)


def shifted(by, seed=0):
    return tuple(value + by + 0.01 * seed for value in PLAIN)


def seeds(count=3):
    """Plain, and rotation that starts where plain is after an epoch and a half, 3 seeds."""
    plain = [run(shifted(0, seed), train__seed=seed) for seed in range(count)]
    return plain + [rotated((0.3, 0.5, 0.7, 0.8 + 0.01 * seed), seed) for seed in range(count)]


def row_of(found, variant, budget=4):
    (row,) = [row for row in found.rows if (row.variant, row.budget) == (variant, budget)]
    return row


LEFT = {
    "failed": (
        rotated((0.1, 0.2), train__epochs=4, status="FAILED", reason="the loss is nan"),
        "epoch 2 of 4: the loss",
    ),
    "asha": (rotated((0.1,), train__epochs=4, status="KILLED", reason="stopped by asha at epoch 1"), "stopped by asha"),
    "interrupted": (
        rotated((0.1,), train__epochs=4, status="KILLED", reason="interrupted"),
        "interrupted at epoch 1 of 4",
    ),
    "running": (rotated((0.1, 0.3), train__epochs=4, status="RUNNING", reason="running"), "still running, at epoch 2"),
    "never began": (rotated((), train__epochs=4, status="FAILED", reason="no space"), "epoch 0 of 4: no space"),
    "collapsed": (rotated((0.1, 0.1, 0.1, 0.1), std=0.02), "collapsed: feature/std 0.02"),
    "diverged": (rotated((0.1, 0.1, 0.1, 0.1), grows=10.0), "diverged: loss/ssl 1e+04 at epoch 4, 10 at epoch 1"),
    "unmeasured": (rotated((0.1, 0.1, 0.1, None)), "no knn/top1 at the last epoch"),
    "twin": (run(started=5, name="later"), "the same configuration and seed as w0-e4-s0"),
    "nan": (rotated((0.1, 0.1, 0.1, float("nan"))), "no knn/top1 at the last epoch"),
    "foreign": (TrackedRun("x", "x", "FINISHED", 1, {"lr": "1"}, {}, {}), "not a pretraining run"),
}


def budgets():
    """Plain with 2, 4 and 8 epochs, rotation with 2 and 4; one epoch of rotation costs as much as two of plain."""
    plain = {2: (0.2, 0.4), 4: PLAIN, 8: (0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7)}
    turned = {2: (0.4, 0.65), 4: (0.3, 0.5, 0.7, 0.8)}
    return [run(values) for values in plain.values()] + [rotated(values) for values in turned.values()]


def words(found):
    return " ".join(
        line for choice in found.recommendations for part in findings.headline(found, choice) for line in part
    )


def ended(final, seed=0, weight=0.0):
    return run((0.2, 0.3, 0.4, final), rotation__weight=weight, train__seed=seed)
