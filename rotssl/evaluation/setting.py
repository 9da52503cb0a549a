"""What an evaluation measures: the encoder of a run, and the images that it is measured on, as any process can read them."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from rotssl import __version__
from rotssl.base.paths import at
from rotssl.config import ResolvedConfig
from rotssl.config.fields import ConfigError
from rotssl.config.resolved import ResolvedData
from rotssl.data import datasets, likeness
from rotssl.data.again import check_there, images_of
from rotssl.data.augment import Augment
from rotssl.data.images import ImageSet, in_shades
from rotssl.data.record import Record
from rotssl.evaluation import cards
from rotssl.models.networks import network_of

log = logging.getLogger(__name__)
Loaded = tuple[ResolvedConfig, nn.Module, ImageSet, ImageSet, Augment, torch.device]


@dataclass(frozen=True)
class Setting:
    """What an evaluation measures; can be sent to another process.

    Attributes:
        config: of the run.
        folder: address of the run's folder.
        network: student or teacher.
        epoch: of the run's end, 1-based.
        other: the data section of another set than the run's, or None.
    """

    config: ResolvedConfig
    folder: str
    network: str
    epoch: int
    other: ResolvedData | None = None

    def images(self, say: Callable[[str], None] = lambda line: None) -> tuple[ImageSet, ImageSet]:
        """The training images, and the test images.

        Args:
            say: called with a line for each kind of likeness between the two.

        Raises:
            ConfigError: a set is missing, is not that of the run, has no labels, or test has classes that train lacks.
            DataError: an image cannot be read.
        """
        data, holdout = self.other or self.config.data, self.config.evaluation.holdout
        check_there(data.root, moved=self.other is None)
        if self.other is not None:
            datasets.inspect(data, holdout)
        test = datasets.load_test(data)
        splits = images_of(self.config, at(self.folder)) if self.other is None else datasets.load(data, holdout)
        if self.other is not None and self._own(splits):
            raise ConfigError(f"data.root: {data.root} has the run's own images; leave --data.name and --data.root out")
        check_labels(splits.train, test, splits.classes, data.name)
        for line in likeness.between(splits.train, test, "test"):
            say(line)
        if not self.gray:
            return splits.train, test
        try:
            return in_shades(splits.train), in_shades(test)
        except ValueError as error:
            raise ConfigError(
                f"data.name: got {data.name}, but {error}, and the run's are in shades of grey"
            ) from error

    def facts(self, bank: int, train: ImageSet, test: ImageSet) -> dict[str, object]:
        """What the cards of all protocols say: of the encoder, and of the images, of which so many are the bank."""
        config, side = self.config, self.config.data.image_size
        reduced = ", in shades of grey" if self.gray else ""
        return {
            "network": self.network,
            "run": config.tracking.run_name,
            "method": config.method.name,
            "epoch": self.epoch,
            "features": "encoder",
            "view": f"whole image{reduced}, resized to {side} x {side}, normalised as in pretraining",
            "bn": "running statistics",
            "precision": "fp32",
            "data": (self.other or config.data).name,
            "bank": "train, without what is held out for validation",
            "bank_images": bank,
            "bank_digest": cards.digest(train),
            "query_split": "test",
            "query_images": len(test),
            "query_digest": cards.digest(test),
            "rotssl": __version__,
        }

    def _own(self, splits: datasets.Splits) -> bool:
        """Whether these are the run's own images."""
        try:
            before = Record.read(at(self.folder))
        except ValueError as error:
            log.warning("%s; the images are not compared with those of the run", error)
            return False
        return (
            splits.record is not None
            and before is not None
            and splits.record.same(before, self.config.data.limit is not None)
        )

    @property
    def gray(self) -> bool:
        """Whether the run's images are in shades of grey: others are then reduced to them, as its export reduces pictures."""
        return len(datasets.normalization(self.config.data.name)[0]) == 1

    def loaded(self, train: ImageSet, test: ImageSet, device: torch.device) -> Loaded:
        """The encoder and these images on a device: the arguments of ``Subject``.

        Raises:
            ConfigError: the encoder cannot be read.
        """
        config = self.config
        layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
        encoder: nn.Module = network_of(at(self.folder), self.network, self.epoch).encoder
        encoder = encoder.to(device, memory_format=layout)  # type: ignore[call-overload]
        augment = Augment(config.views, config.data.image_size, *datasets.normalization(config.data.name), 0)
        return config, encoder, train, test, augment, device


def check_labels(train: ImageSet, test: ImageSet, classes: Sequence[str], name: str) -> None:
    """Check that a set can be learned from and asked about.

    Raises:
        ConfigError: it has no labels, or test has classes that train lacks.
    """
    if train.labels is None or test.labels is None:
        raise ConfigError(f"data.name: {name} has no labels, which every protocol needs")
    missing = sorted(set(test.labels.tolist()) - set(train.labels.tolist()))
    if missing:
        named = classes[missing[0]] if missing[0] < len(classes) else str(missing[0])
        raise ConfigError(
            f"data.name: {len(missing)} classes of test are not in train of {name} ({named}); expected the same classes"
        )
