"""An encoder, labelled training and test images, and the protocols that measure one on the others, in one process."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rotssl.base.precision import exact_float32
from rotssl.config import ResolvedConfig
from rotssl.config.evaluating import FinetuneOptions, SgdOptions
from rotssl.config.fields import ConfigError
from rotssl.data.augment import Augment
from rotssl.data.images import ImageSet, Pixels
from rotssl.evaluation import corruptions, fewshot, sgd, subsets
from rotssl.evaluation.cards import Result
from rotssl.evaluation.collapse import effective_rank
from rotssl.evaluation.hits import top1
from rotssl.evaluation.knn import Vote, knn_hits, knn_hits_of
from rotssl.evaluation.linear import Probe, fit_probe, held_out, linear_hits
from rotssl.evaluation.measure import bank_of, encode_share
from rotssl.evaluation.plan import Number
from rotssl.evaluation.sgd import Batches, Classifier, Recipe


class Bench:
    """Measures one encoder on one data set.

    Args:
        config: of the run.
        encoder: (B, 3, S, S) -> (B, D), on the device.
        train: images with labels that the protocols learn from.
        test: images with labels that are classified.
        augment: provides side and normalisation of the images.
        device: of the encoder.
        say: called with a line about anything that takes time.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        encoder: nn.Module,
        train: ImageSet,
        test: ImageSet,
        augment: Augment,
        device: torch.device,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        assert train.labels is not None and test.labels is not None
        self.config, self.encoder, self.train, self.test, self.augment = config, encoder, train, test, augment
        self.device, self.say = device, say
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

    @functools.cached_property
    def bank(self) -> Tensor:
        """Features of the training images that others are compared with."""
        return self.encode(self.train, self.chosen)

    @functools.cached_property
    def bank_labels(self) -> Tensor:
        """Their labels."""
        return self.known[torch.from_numpy(self.chosen).to(self.device)]

    @functools.cached_property
    def queries(self) -> Tensor:
        """Features of the test images."""
        return self.encode(self.test)

    @functools.cached_property
    def probe(self) -> Probe | None:
        """The linear probe; None if a feature is not finite."""
        return fit_probe(self.bank, self.bank_labels) if bool(self.bank.isfinite().all()) else None

    def features(self, index: np.ndarray) -> Tensor:
        """Features of some training images."""
        if len(self.chosen) == len(self.train):
            return self.bank[torch.from_numpy(index).to(self.device)]
        return self.encode(self.train, index)

    def measure(self, numbers: Sequence[Number]) -> list[Result]:
        """Measure numbers of one protocol.

        Raises:
            ConfigError: the images are not enough for it.
        """
        each: dict[str, Callable[[Number], Result]] = {
            "linear": self._linear,
            "semi": self._semi,
            "sgd": self._sgd,
            "finetune": self._finetune,
            "fewshot": self._fewshot,
            "robustness": self._robustness,
        }
        with torch.no_grad(), exact_float32():
            protocol = numbers[0].protocol
            return list(self._knn(numbers)) if protocol == "knn" else [each[protocol](number) for number in numbers]

    def _knn(self, numbers: Sequence[Number]) -> Iterable[Result]:
        given = self.bank, self.bank_labels, self.queries, self.asked
        rank: dict[str, float] = {"feature/effective_rank": effective_rank(self.queries)}
        for distance in ("cosine", "euclidean"):
            ours = [number for number in numbers if number.settings["distance"] == distance]
            if not ours:
                continue
            votes = [Vote(number.settings["k"], number.settings.get("temperature", 1.0)) for number in ours]
            for number, hits in zip(ours, knn_hits_of(*given, votes, euclidean=distance == "euclidean"), strict=True):
                plain = rank if number.key == "knn/top1" else {}
                facts = {"neighbours": min(number.settings["k"], len(self.bank))}
                yield Result(number, {number.key: top1(hits), **plain}, {number.name: hits}, facts)

    def _linear(self, number: Number) -> Result:
        return self._scored(number, self._judged(self.queries))

    def _judged(self, rows: Tensor) -> Tensor | None:
        """Which test images the linear probe classifies correctly; None if features are not finite."""
        if self.probe is None or not bool(rows.isfinite().all()):
            return None
        return self.probe.classes(rows) == self.asked

    def _semi(self, number: Number) -> Result:
        index, facts, files = self._part(number)
        labels = self.known[torch.from_numpy(index).to(self.device)]
        return self._scored(number, linear_hits(self.features(index), labels, self.queries, self.asked), facts, files)

    @staticmethod
    def _scored(
        number: Number, hits: Tensor | None, facts: dict[str, Any] | None = None, files: dict[str, str] | None = None
    ) -> Result:
        kept = {} if hits is None else {number.name: hits}
        return Result(number, {number.key: top1(hits)}, kept, facts or {}, files or {})

    def _part(self, number: Number) -> tuple[np.ndarray, dict[str, Any], dict[str, str]]:
        """The training images that a number has labels of, what the card says of them, and their list."""
        assert self.train.labels is not None
        share, seed, labels = number.settings["share"], number.settings["split_seed"], self.train.labels
        index = subsets.subset(labels, share, seed)
        facts = {"labelled_images": len(index), "split": subsets.digest(index, labels)}
        name = f"split_{subsets.percent(share)}_seed{seed}.txt"
        return index, facts, {} if share == 1 else {name: subsets.listing(index, labels)}

    def _sgd(self, number: Number) -> Result:
        options = SgdOptions(**number.settings)
        recipe, rates = sgd.linear_recipe(options)
        cached, everything = recipe.scale is None, np.arange(len(self.train))

        def made(rate: float, index: np.ndarray) -> Classifier:
            ours = dataclasses.replace(recipe, lr=rate)
            network = self._classifier(None if cached else self.encoder, options.seed, frozen=True)
            if not cached:
                return sgd.fit(network, self._views(self.train.take(index), ours, options.seed), ours)
            labels = self.known[torch.from_numpy(index).to(self.device)]
            return sgd.fit(network, sgd.feature_batches(self.features(index), labels, ours, options.seed), ours)

        rate = self._rate(number, rates, everything, made, lambda net, rows: net.head(self.features(rows)))
        recipe = dataclasses.replace(recipe, batch_size=min(recipe.batch_size, len(self.train)))
        hits = self._hits(made(rate, everything).head(self.queries))
        return self._scored(number, hits, self._trained(recipe, rates, rate))

    def _finetune(self, number: Number) -> Result:
        given = {key: value for key, value in number.settings.items() if key not in ("share", "split_seed")}
        options = FinetuneOptions(**given)
        index, facts, files = self._part(number)
        recipe = sgd.finetune_recipe(options, number.settings["share"], len(index))

        def made(rate: float, rows: np.ndarray, seed: int = 0) -> Classifier:
            ours = dataclasses.replace(recipe, lr=rate * options.head_lr, encoder_lr=rate)
            network = self._classifier(self.encoder, seed, frozen=False)
            return sgd.fit(network, self._views(self.train.take(rows), ours, seed), ours)

        rate = self._rate(number, options.lr, index, made, lambda net, rows: self.encode(self.train, rows, network=net))
        hits = []
        for seed in range(options.seeds):
            self.say(f"{number.name}: rate {rate:g}, training {seed + 1} of {options.seeds}")
            hits.append(self._hits(self.encode(self.test, network=made(rate, index, seed))))
        values = torch.tensor([top1(each) for each in hits], dtype=torch.float64)
        metrics = {number.key: float(values.mean())}
        if len(hits) > 1:
            metrics[f"{number.name}/deviation"] = float(values.std())
        facts |= self._trained(recipe, options.lr, rate) | {"top1_by_seed": values.tolist()}
        kept = {f"{number.name}/seed{i}": each for i, each in enumerate(hits) if each is not None}
        return Result(number, metrics, kept, facts, files)

    def _hits(self, logits: Tensor) -> Tensor | None:
        """Which test images have their largest logit at their class; None if the training diverged."""
        return logits.argmax(1) == self.asked if bool(logits.isfinite().all()) else None

    def _classifier(self, encoder: nn.Module | None, seed: int, frozen: bool) -> Classifier:
        made = Classifier(encoder, self.queries.shape[1], self.classes, seed, frozen)
        return made.to(self.device)

    def _views(self, data: ImageSet, recipe: Recipe, seed: int) -> Batches:
        return sgd.view_batches(self.config, data, self.augment, recipe, seed, self.device)

    def _rate(
        self,
        number: Number,
        rates: Sequence[float],
        index: np.ndarray,
        made: Callable[[float, np.ndarray], Classifier],
        logits: Callable[[Classifier, np.ndarray], Tensor],
    ) -> float:
        """The best of some rates on a fifth of each class of the training images with these indices."""
        labels = self.known[torch.from_numpy(index).to(self.device)]
        apart = held_out(labels).cpu().numpy()

        def loss_of(rate: float) -> float:
            self.say(f"{number.name}: trying rate {rate:g}")
            found = logits(made(rate, index[~apart]), index[apart])
            return float(F.cross_entropy(found, self.known[torch.from_numpy(index[apart]).to(self.device)]))

        return sgd.best_rate(rates, loss_of)

    @staticmethod
    def _trained(recipe: Recipe, rates: Sequence[float], rate: float) -> dict[str, Any]:
        crops = (
            "whole images"
            if recipe.scale is None
            else f"random crops of {recipe.scale[0]:g} to {recipe.scale[1]:g} and flips"
        )
        chosen = "one rate" if len(rates) == 1 else "one in five of the training images, by class"
        frozen = "running statistics, frozen" if recipe.encoder_lr == 0 else "batch statistics in training"
        return {
            **{"epochs": recipe.epochs, "batch_size": recipe.batch_size, "weight_decay": recipe.weight_decay},
            **{"rates_tried": list(rates), "rate": rate, "chosen_on": chosen},
            **{"augmentation": crops, "bn": frozen, "source": recipe.source},
        }

    def _fewshot(self, number: Number) -> Result:
        how = number.settings
        asked = how["ways"], how["shots"], how["queries"], how["episodes"], how["seed"]
        labels = self.bank_labels.cpu().numpy(), self.asked.cpu().numpy()
        if not bool(self.bank.isfinite().all() and self.queries.isfinite().all()):
            return self._scored(number, None)
        try:
            found = fewshot.episodes(self.bank, labels[0], self.queries, labels[1], *asked)
        except ValueError as error:
            raise ConfigError(f"fewshot.ways: got {how['ways']}, but {error}") from error
        mean, half = fewshot.interval(found)
        return Result(number, {number.key: mean, f"{number.name}/interval": half}, {number.name: found})

    def _robustness(self, number: Number) -> Result:
        how = number.settings
        self.say(number.name)

        def change(pixels: Pixels, first: int) -> Pixels:
            if "angle" in how:
                return corruptions.turned(pixels, how["angle"])
            return corruptions.corrupted(pixels, how["corruption"], how["severity"], how["noise_seed"], first)

        rows = self.encode(self.test, change=change)
        knn = knn_hits(self.bank, self.bank_labels, rows, self.asked, k=how["k"], temperature=how["temperature"])
        linear, base = self._judged(rows), number.name.removesuffix("/knn")
        found = {number.name: knn} | ({} if linear is None else {f"{base}/linear": linear})
        return Result(number, {number.key: top1(knn), f"{base}/linear/top1": top1(linear)}, found)


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
