"""An encoder with labelled training and test images, and the tasks of an evaluation (crew.py): what can be done on its own."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rotssl.base.precision import exact_float32
from rotssl.config import ResolvedConfig
from rotssl.config.evaluating import FinetuneOptions, SgdOptions
from rotssl.data.augment import Augment
from rotssl.data.images import ImageSet, Pixels
from rotssl.evaluation import corruptions, sgd
from rotssl.evaluation.crew import Task
from rotssl.evaluation.knn import knn_hits
from rotssl.evaluation.linear import Probe, held_out
from rotssl.evaluation.measure import bank_of, encode_share
from rotssl.evaluation.plan import Number
from rotssl.evaluation.sgd import Batches, Classifier, Recipe


class Subject:
    """What is measured, and on what.

    Args:
        config: of the run.
        encoder: (B, 3, S, S) -> (B, D), on the device.
        train: images with labels that the protocols learn from.
        test: images with labels that are classified.
        augment: provides side and normalisation of the images.
        device: of the encoder.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        encoder: nn.Module,
        train: ImageSet,
        test: ImageSet,
        augment: Augment,
        device: torch.device,
    ) -> None:
        assert train.labels is not None and test.labels is not None
        self.config, self.encoder, self.train, self.test, self.augment = config, encoder, train, test, augment
        self.device = device
        self.layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
        self.chosen = bank_of(train, config.evaluation.bank)
        self.known, self.asked = (torch.from_numpy(labels).to(device) for labels in (train.labels, test.labels))
        self.classes = 1 + int(max(self.known.max(), self.asked.max()))

    def encode(
        self,
        data: ImageSet,
        chosen: np.ndarray | None = None,
        change: Callable[[Pixels, int], Pixels] | None = None,
        network: nn.Module | None = None,
    ) -> Tensor:
        """What a network, by default the encoder, makes of images, see ``encode_share``."""
        network = self.encoder if network is None else network
        return encode_share(network, data, self.augment, self.device, self.layout, chosen=chosen, change=change)

    def work(self, task: Task) -> Any:
        """Do a task; tensors in its arguments may be on another device."""
        args = [x.to(self.device) if isinstance(x, Tensor) else x for x in task.args]
        with torch.no_grad(), exact_float32():
            return getattr(self, task.name)(*args)

    @functools.cached_property
    def width(self) -> int:
        """Number of features of an image."""
        return self.encode(self.test, np.arange(1)).shape[1]

    @functools.cached_property
    def bank_labels(self) -> Tensor:
        """Labels of the training images that others are compared with."""
        return self.known[torch.from_numpy(self.chosen).to(self.device)]

    def encoded(self, split: str, chosen: np.ndarray) -> Tensor:
        """A task: features of images of ``train`` or ``test``, (B, D)."""
        return self.encode(self.train if split == "train" else self.test, chosen)

    def sgd_loss(self, number: Number, rate: float, rows: Tensor | None) -> float:
        """A task: the loss on a held-out fifth of a linear classifier by SGD; rows are the features of train, if given."""
        index, apart = self._divided(np.arange(len(self.train)))
        head = self._linear_by_sgd(number, rate, index, rows)
        return self._loss(head(self._frozen(rows, "train", apart)), apart)

    def sgd_hits(self, number: Number, rate: float, rows: Tensor | None, queries: Tensor | None) -> Tensor | None:
        """A task: the hits of a linear classifier by SGD; the features are as in ``sgd_loss``."""
        head = self._linear_by_sgd(number, rate, np.arange(len(self.train)), rows)
        return self._hits(head(self._frozen(queries, "test", np.arange(len(self.test)))))

    def _frozen(self, rows: Tensor | None, split: str, index: np.ndarray) -> Tensor:
        """Features of images of a split, of all of whose images they are given if they are known."""
        return self.encoded(split, index) if rows is None else rows[torch.from_numpy(index).to(self.device)]

    def _linear_by_sgd(self, number: Number, rate: float, index: np.ndarray, rows: Tensor | None) -> nn.Module:
        options = SgdOptions(**number.settings)
        ours = dataclasses.replace(sgd.linear_recipe(options)[0], lr=rate)
        network = self._classifier(self.encoder if rows is None else None, options.seed, frozen=True)
        if rows is None:
            return sgd.fit(network, self._views(self.train.take(index), ours, options.seed), ours).head
        where = torch.from_numpy(index).to(self.device)
        batches = sgd.feature_batches(rows[where], self.known[where], ours, options.seed)
        return sgd.fit(network, batches, ours).head

    @staticmethod
    def tuning(number: Number, images: int = 0) -> tuple[FinetuneOptions, Recipe]:
        """The options of fine-tuning, and the recipe for a part of so many images."""
        given = {key: value for key, value in number.settings.items() if key not in ("share", "split_seed")}
        options = FinetuneOptions(**given)
        return options, sgd.finetune_recipe(options, number.settings["share"], images)

    def finetune_loss(self, number: Number, rate: float, index: np.ndarray) -> float:
        """A task: the loss on a held-out fifth of a part of train, after fine-tuning on the rest of it."""
        rows, apart = self._divided(index)
        network = self._fine_tuned(number, rate, rows, 0, len(index))
        return self._loss(self.encode(self.train, apart, network=network), apart)

    def finetune_hits(self, number: Number, rate: float, index: np.ndarray, seed: int) -> Tensor | None:
        """A task: the hits after fine-tuning on a part of train."""
        return self._hits(self.encode(self.test, network=self._fine_tuned(number, rate, index, seed, len(index))))

    def _fine_tuned(self, number: Number, rate: float, rows: np.ndarray, seed: int, images: int) -> Classifier:
        """A network trained on some training images; ``images`` is the size of the part, which the recipe depends on."""
        options, recipe = self.tuning(number, images)
        ours = dataclasses.replace(recipe, lr=rate * options.head_lr, encoder_lr=rate)
        network = self._classifier(self.encoder, seed, frozen=False)
        return sgd.fit(network, self._views(self.train.take(rows), ours, seed), ours)

    def changed(self, number: Number, bank: Tensor, probe: Probe | None) -> tuple[Tensor, Tensor | None]:
        """A task: the hits of kNN and of the probe on changed test images."""
        how = number.settings

        def change(pixels: Pixels, first: int) -> Pixels:
            if "angle" in how:
                return corruptions.turned(pixels, how["angle"])
            return corruptions.corrupted(pixels, how["corruption"], how["severity"], how["noise_seed"], first)

        rows = self.encode(self.test, change=change)
        knn = knn_hits(bank, self.bank_labels, rows, self.asked, k=how["k"], temperature=how["temperature"])
        return knn, self.judged(rows, None if probe is None else probe.to(self.device))

    def judged(self, rows: Tensor, probe: Probe | None) -> Tensor | None:
        """Which test images a linear probe classifies correctly; None if features are not finite."""
        if probe is None or not bool(rows.isfinite().all()):
            return None
        return probe.classes(rows) == self.asked

    def _hits(self, logits: Tensor) -> Tensor | None:
        """Which test images have their largest logit at their class; None if the training diverged."""
        return logits.argmax(1) == self.asked if bool(logits.isfinite().all()) else None

    def _classifier(self, encoder: nn.Module | None, seed: int, frozen: bool) -> Classifier:
        made = Classifier(encoder, self.width, self.classes, seed, frozen)
        return made.to(self.device)

    def _views(self, data: ImageSet, recipe: Recipe, seed: int) -> Batches:
        return sgd.view_batches(self.config, data, self.augment, recipe, seed, self.device)

    def _divided(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Training images without a fifth of each class, and that fifth, which chooses a rate."""
        apart = held_out(self.known[torch.from_numpy(index).to(self.device)]).cpu().numpy()
        return index[~apart], index[apart]

    def _loss(self, logits: Tensor, index: np.ndarray) -> float:
        """The cross-entropy on some training images."""
        return float(F.cross_entropy(logits, self.known[torch.from_numpy(index).to(self.device)]))
