"""How much of a run's time do evaluations and checkpoints take where training costs next to nothing?

    python benchmarks/between_epochs.py [--epochs N] [--quick] [--output FOLDER]

A step computes once and then costs nothing: it returns what the first one did. What is left of the training is the loader, so no
device can be faster. Networks, states, evaluations and checkpoints are real. Runs evaluate and save after every epoch, or by
``evaluation.knn_every auto`` and ``train.save_every auto``. These have so many epochs that what is done in any case, after the
first epoch and after the last one, takes some 4% of the training. One network is small and is evaluated; the other one has a
checkpoint of the size of a ResNet-18 with a teacher, and is not. Writes benchmarks/results/between_epochs_DATE.md.
"""

import argparse
import datetime
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import RESULTS, command, commit, machine, trainer

from rotssl.runs import checkpoint

IMAGES = {"data.name": "fashion-mnist-sample", "data.limit": 320, "data.image_size": 16, "train.batch_size": 16}
TRIED = 50  # epochs of a first run, which shows what the others will take
# What is trained, and how many images it has.
NETWORKS: dict[str, dict[str, Any]] = {
    "small encoder, kNN and probe": {"encoder.name": "small"},
    "ResNet-18, not evaluated": {"encoder.name": "resnet18", "evaluation.knn_every": 0},
}
OFTEN: dict[str, dict[str, Any]] = {
    "after every epoch": {},
    "auto": {"evaluation.knn_every": "auto", "train.save_every": "auto"},
}


def free(engine: Any) -> None:
    """Take a step, and let all others cost nothing."""
    engine.parallel.train()
    logs = {key: value.detach() for key, value in engine.step(*next(engine.batches(0))).items()}
    engine.step = lambda images, ctx: logs


def measure(fields: Mapping[str, Any], epochs: int) -> dict[str, float]:
    """A run to its end: its epochs and seconds, and what evaluations and checkpoints took of these."""
    counts = {"evaluations": 0, "checkpoints": 0}
    with tempfile.TemporaryDirectory(prefix="rotssl-between-") as work:
        given = {
            **IMAGES,
            "optim.warmup_epochs": 1,
            **fields,
            "train.epochs": epochs,
            "storage.path": work,
            "tracking.uri": "off",
        }
        engine = trainer({**given, "scaling.num_workers": 0})
        free(engine)
        evaluate, save = engine.evaluate, checkpoint.save

        def counted(epoch: int, skipped: int = 0) -> Any:
            counts["evaluations"] += 1
            return evaluate(epoch, skipped)

        def saved(state: dict[str, Any], folder: Any) -> None:
            counts["checkpoints"] += 1
            save(state, folder)

        engine.evaluate, checkpoint.save = counted, saved
        try:
            started = time.perf_counter()
            engine.run()
            wall = time.perf_counter() - started
        finally:
            checkpoint.save = save
        newest = next(checkpoint.latest(engine.config.run_dir))
        file = engine.config.run_dir / checkpoint.place(newest) / checkpoint.FILE
        found = {"epochs": epochs, "wall": wall, "training": engine.recorder.trained, **counts}
        found |= {"evaluating": engine.evaluator.spent, "saving": engine.recorder.saving}
        return found | {"megabytes": file.stat().st_size / 1e6}


def main() -> None:
    """Run all, and write what they show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, help="of the runs by auto")
    parser.add_argument("--quick", action="store_true", help="few epochs, and no file")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = []
    for network, fields in NETWORKS.items():
        tried = measure({**OFTEN["auto"], **fields}, TRIED)
        must = 25 * (tried["evaluating"] + tried["saving"])  # in seconds of training
        epochs = TRIED if args.quick else args.epochs or max(TRIED, round(must * TRIED / tried["training"]))
        for often, how in OFTEN.items():
            found = measure({**how, **fields}, epochs if often == "auto" else 10)
            share = (found["evaluating"] + found["saving"]) / found["wall"]
            rows.append(
                f"| {network} | {found['megabytes']:.1f} | {often} | {found['epochs']} | {found['evaluations']} | "
                f"{found['checkpoints']} | {found['wall']:.1f} | {found['training']:.1f} | {found['evaluating']:.2f} | "
                f"{found['saving']:.2f} | {share:.1%} |"
            )
            print(rows[-1], flush=True)
    lines = [
        f"# Evaluations and checkpoints where a step costs nothing, {datetime.date.today()}",
        "",
        f"Command: `{command()}`, commit {commit()}.",
        f"Machine: {machine()}; shared with others. BYOL with rotation in place on fashion-mnist-sample,",
        f"{IMAGES['data.limit']} images of {IMAGES['data.image_size']} pixels, "
        f"{IMAGES['train.batch_size']} a step, one process, one thread. Steps compute "
        "nothing after the first one.",
        "",
        "| network | MB a checkpoint | evaluated and saved | epochs | evaluations | checkpoints | wall, s | training, s | "
        "evaluations, s | waiting for checkpoints, s | both, of the wall time |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        "What is neither training, evaluations nor checkpoints is the journal, averages and FLOPs of an epoch, which do not",
        "depend on the device. Of a checkpoint, training waits for the copy and, if it is not yet on disk, for the one before.",
        "After the first epoch and the last one both are done in any case: a shorter run spends a larger share on these.",
    ]
    print("\n".join(lines))
    if not args.quick:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / f"between_epochs_{datetime.date.today()}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
