"""Made-up input by the thousand: what cannot be used must be refused in one line, and never be believed.

    python scripts/fuzz.py [--configs 10000] [--folders 1000] [--runs 1000] [--seed 0]

Configurations, recipes and sweep files build or are refused, and what builds is the same again when it is read back. Folders of
files load or are refused. The folder of a small run is damaged and the run is started again: it must end with the weights of an
undamaged one, or with one line and the exit code 1 or 2. The first example that does otherwise is made as small as possible, and
shown; exit code 1.
"""

import argparse
import contextlib
import io
import itertools
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_kinds as kinds
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis.strategies import SearchStrategy

from rotssl import config as cfg
from rotssl import lifecycle
from rotssl.commands import EXIT_OK, pretrain, run_command
from rotssl.config import sweep
from rotssl.config.fields import ConfigError
from rotssl.config.recipes import dump, load_recipe, recommended
from rotssl.data import datasets
from rotssl.data.images import DataError

SMALL = {
    "data.name": "synthetic",
    "data.limit": 64,
    "data.image_size": 16,
    "encoder.name": "small",
    "method.hidden_dim": 16,
    "method.out_dim": 8,
    "train.batch_size": 32,
    "train.epochs": 3,
    "evaluation.knn_every": 0,
    "evaluation.linear": False,
    "scaling.num_workers": 0,
    "tracking.uri": "off",
    "tracking.run_name": "run",
}


def refused(error: Exception) -> str:
    """The outcome of a refusal, whose message is what a command prints as one line."""
    assert str(error).strip(), "an empty message"
    return "refused"


def configuration(fields: dict[str, Any]) -> str:
    """Build, resolve, and read back."""
    try:
        built = cfg.build(fields)
        resolved = cfg.resolve(built, 32, 5000)
    except ConfigError as error:
        return refused(error)
    assert cfg.from_dict(cfg.to_dict(resolved)) == resolved, "reading it back gives another"
    assert cfg.fingerprint(cfg.from_dict(cfg.to_dict(resolved))) == cfg.fingerprint(resolved)
    assert recommended(fields).keys().isdisjoint(fields)
    return "accepted"


def recipe(content: bytes, folder: Path) -> str:
    """Read, build, write, and read back."""
    path = folder / "recipe.yaml"
    path.write_bytes(content)
    try:
        built = cfg.build(load_recipe(path))
    except ConfigError as error:
        return refused(error)
    try:
        path.write_text(dump(built))
    except UnicodeEncodeError:  # resolve() refuses such a path
        return "accepted"
    assert cfg.build(load_recipe(path)) == built, "reading it back gives another"
    return "accepted"


def sweep_file(content: bytes, folder: Path) -> str:
    """Read and expand."""
    path = folder / "sweep.yaml"
    path.write_bytes(content)
    try:
        command = sweep.parse(["--config", str(path)], "ablate.py", "")
        assert sum(1 for _ in itertools.islice(sweep.expand(command.sweep), 50)) > 0
    except ConfigError as error:
        return refused(error)
    return "accepted"


def images(files: dict[str, bytes], folder: Path) -> str:
    """Look at a folder, and load it."""
    with tempfile.TemporaryDirectory(dir=folder) as root:
        kinds.plant(Path(root), files)
        on_bad = "skip" if len(files) % 2 else "error"
        try:
            fields = {"data.name": "imagefolder", "data.root": root, "data.on_bad": on_bad, "data.image_size": 16}
            config = cfg.build(fields)
            info = datasets.inspect(config.data, 0.2)
            data = cfg.resolve(
                cfg.replace(config, {"train.batch_size": 2}), info.image_size, max(2, info.train_size)
            ).data
            splits = datasets.load(data, 0.2)
        except (ConfigError, DataError) as error:
            return refused(error)
        shape = splits.train.images.shape
        assert len(shape) == 4 and shape[0] > 0 and shape[1] in (1, 3), shape
    return "accepted"


class DamagedRun:
    """Starts a run again whose folder was damaged.

    Args:
        folder: for the run and its copies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, itertools.count()
        self.template = folder / "template"
        assert self.start(self.template, 2)[0] == EXIT_OK
        assert self.start(folder / "whole", None)[0] == EXIT_OK
        self.weights = self.weights_in(folder / "whole")

    @staticmethod
    def weights_in(storage: Path) -> bytes:
        """The encoder that a run left."""
        return (storage / "rotssl" / "run" / "encoder.safetensors").read_bytes()

    @staticmethod
    def start(storage: Path, stop: int | None) -> tuple[int, str]:
        """Start the run; returns the exit code and what was printed to stderr."""

        def body() -> int:
            config, _ = lifecycle.prepare(cfg.build({**SMALL, "storage.path": str(storage), "train.stop_after": stop}))
            return pretrain.pretrain(config)

        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                run_command(body)
            except SystemExit as end:
                return int(end.code or 0), err.getvalue()

    def __call__(self, damages: list[tuple[str, float, float, Any]]) -> str:
        """Damage a copy of the run's folder, and start it."""
        storage = kinds.fresh(self.template, self.folder / str(next(self.number)))
        done = [kinds.damage(storage / "rotssl" / "run", *each) for each in damages]
        code, err = self.start(storage, None)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code in (0, 1, 2) and "Traceback" not in err, (done, code, err)
        assert len(errors) == (code != EXIT_OK), (done, code, err)
        if code == EXIT_OK:
            assert self.weights_in(storage) == self.weights, (done, "other weights", err)
        return "went on, the same weights" if code == EXIT_OK else f"refused, exit code {code}"


def try_all(
    name: str, count: int, seed: int, made: SearchStrategy[Any], body: Callable[[Any], str]
) -> tuple[str, int, Counter[str], float]:
    """Run a body on so many examples; returns the row of the table."""
    seen: Counter[str] = Counter()

    def noted(example: Any) -> None:
        seen[body(example)] += 1

    phases = [Phase.generate, Phase.shrink]
    limits = settings(
        max_examples=count, deadline=None, database=None, phases=phases, suppress_health_check=list(HealthCheck)
    )
    started = time.monotonic()
    seeded(seed)(limits(given(made)(noted)))()
    return name, sum(seen.values()), seen, time.monotonic() - started


def main() -> int:
    """Make up input, print a table of what happened; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for what, count in (("configs", 10000), ("folders", 1000), ("runs", 1000), ("seed", 0)):
        parser.add_argument(f"--{what}", type=int, default=count)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| input | examples | outcome | seconds |", "|---|---|---|---|", sep="\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="rotssl-fuzz-") as scratch:
        folder = Path(scratch)
        bodies: list[tuple[str, int, SearchStrategy[Any], Callable[[Any], str]]] = [
            ("configurations", args.configs, kinds.configurations, configuration),
            ("recipes", args.configs // 4, kinds.recipes, lambda content: recipe(content, folder)),
            ("sweep files", args.configs // 10, kinds.sweeps, lambda content: sweep_file(content, folder)),
            ("image folders", args.folders, kinds.folders, lambda files: images(files, folder)),
        ]
        if args.runs:
            bodies.append(("damaged runs", args.runs, kinds.damages, DamagedRun(folder)))
        for name, count, made, body in filter(lambda each: each[1] > 0, bodies):
            row, tried, seen, seconds = try_all(name, count, args.seed, made, body)
            outcome = ", ".join(f"{number:,} {what}" for what, number in seen.most_common())
            print(f"| {row} | {tried:,} | {outcome} | {seconds:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
