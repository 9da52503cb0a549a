"""What a cell of gpu.py's queue knows, and how it tells what it has found."""

import json
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any


class NotHere(Exception):
    """What a cell needs is missing on this machine; the text says what."""


class TimeUp(Exception):
    """The deadline is so near that a cell should end with what it has."""


class Cell:
    """What a cell knows, and where it tells what it has found.

    Args:
        spec: as gpu.py gives it.
        told: the file that its result goes to, whole, each time that there is something new.
    """

    def __init__(self, spec: dict[str, Any], told: Path) -> None:
        self.name, self.kind, self.args = spec["name"], spec["kind"], spec["args"]
        self.cuda, self.smoke = spec["device"] == "cuda", spec["smoke"]
        self.scratch, self.output, self.archive = (Path(spec[key]) for key in ("scratch", "output", "archive"))
        self.needs, self.ends, self.told = spec["needs"], spec["ends"], told
        self.result: dict[str, Any] = {}

    @property
    def device(self) -> Any:
        """As torch has it, with its index."""
        import torch

        return torch.device("cuda", 0) if self.cuda else torch.device("cpu")

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.ends - time.time()

    def tell(self, status: str = "cut", reason: str = "", **found: Any) -> None:
        """Add to the result and write it; until it is done, a cell counts as cut short."""
        self.result |= found
        part = self.told.with_suffix(".part")
        part.write_text(json.dumps({"status": status, "reason": reason, "result": self.result}))
        part.replace(self.told)

    def finish(self) -> None:
        """Wait for the device."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()

    def cifar10(self) -> Path:
        """CIFAR-10 as a folder of JPEGs with train/ and test/; in miniature, the first few of each class.

        Raises:
            NotHere: no archive.
        """
        few = self.args.get("images") if self.smoke else None
        root = self.scratch / (f"cifar10-{few}" if few else "cifar10")
        if root.exists():
            return root
        if not self.archive.is_file():
            raise NotHere(f"{self.archive.name} is neither in the bundle nor in $ROTSSL_DATA")
        taken: Counter[str] = Counter()

        def wanted(member: tarfile.TarInfo, target: str) -> tarfile.TarInfo | None:
            parent = str(Path(member.name).parent)
            taken[parent] += member.isfile()
            skip = few is not None and member.isfile() and taken[parent] > few // 10
            return None if skip else tarfile.data_filter(member, target)

        part = root.with_suffix(".part")
        with tarfile.open(self.archive) as files:
            files.extractall(part, filter=wanted)  # noqa: S202 - wanted is tarfile.data_filter
        return part.rename(root)

    def splits(self, holdout: float = 0.1) -> Any:
        """Train and validation, or with 0 train and test."""
        from rotssl.config.sections import DataConfig
        from rotssl.data import datasets

        return datasets.load(DataConfig(name="imagefolder", root=str(self.cifar10()), image_size=32), holdout)

    def config(self, train_size: int, fields: dict[str, Any]) -> Any:
        """A resolved configuration for these images: CIFAR-10's own, though they come from JPEGs."""
        from rotssl import config as cfg

        here = {
            "data.name": "cifar10",
            "data.root": str(self.cifar10()),
            "scaling.num_workers": 0,
            "tracking.uri": "off",
        }
        runs = self.scratch / ("runs-smoke" if self.smoke else "runs")  # a miniature is no start of the real one
        here |= {"storage.path": str(runs), "tracking.experiment": self.name}
        return cfg.resolve(cfg.build({**here, **fields}), 32, train_size)

    def trainer(self, config: Any, splits: Any, show: Any = None) -> Any:
        """An engine in this process."""
        from rotssl.engine.runtime import LocalRuntime
        from rotssl.engine.trainer import Trainer
        from rotssl.runs import journal

        config.run_dir.mkdir(parents=True, exist_ok=True)
        runtime = LocalRuntime(config.run_dir, self.device, show or (lambda event: None))
        return Trainer(config, splits, runtime, journal.Journal(config.run_dir))
