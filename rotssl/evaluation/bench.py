"""An encoder, labelled training and test images, and the protocols that measure one on the others.

What takes long is done as tasks of a crew (crew.py); searches, probes and episodes are computed where the bench is.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rotssl.base.precision import exact_float32
from rotssl.config import ResolvedConfig
from rotssl.config.evaluating import SgdOptions
from rotssl.config.fields import ConfigError
from rotssl.data.augment import Augment
from rotssl.data.images import ImageSet
from rotssl.evaluation import fewshot, sgd, subsets
from rotssl.evaluation.cards import Result
from rotssl.evaluation.collapse import effective_rank
from rotssl.evaluation.crew import Crew, Here, Task
from rotssl.evaluation.hits import top1
from rotssl.evaluation.knn import Vote, knn_hits_of
from rotssl.evaluation.linear import Probe, fit_probe
from rotssl.evaluation.measure import BATCH
from rotssl.evaluation.plan import Number
from rotssl.evaluation.sgd import Recipe
from rotssl.evaluation.subject import Subject

PIECES = 4  # of a set that is encoded, for each worker: one that is slower leaves some to the others


class Bench(Subject):
    """Measures one encoder on one data set; the first arguments are those of ``Subject``.

    Args:
        say: called with a line about anything that takes time, unless there is a crew, which says them itself.
        crew: does the tasks; None: this process.
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
        crew: Crew | None = None,
    ) -> None:
        super().__init__(config, encoder, train, test, augment, device)
        self.crew = crew or Here(self.work, say)

    def _rows(self, split: str, chosen: np.ndarray) -> Tensor:
        """Features of images of ``train`` or ``test``, by the crew."""
        # Whole batches: what a batch is encoded with does not depend on who encodes it.
        each = BATCH * -(-len(chosen) // (BATCH * (PIECES * self.crew.count if self.crew.count > 1 else 1)))
        tasks = [Task("encoded", (split, chosen[i : i + each])) for i in range(0, len(chosen), each)]
        return torch.cat([part.to(self.device) for part in self.crew.run(tasks)])

    @functools.cached_property
    def bank(self) -> Tensor:
        """Features of the training images that others are compared with."""
        return self._rows("train", self.chosen)

    @functools.cached_property
    def queries(self) -> Tensor:
        """Features of the test images."""
        return self._rows("test", np.arange(len(self.test)))

    @functools.cached_property
    def probe(self) -> Probe | None:
        """The linear probe; None if a feature is not finite."""
        return self._probe(self.bank, self.bank_labels)

    def features(self, index: np.ndarray) -> Tensor:
        """Features of some training images."""
        if len(self.chosen) == len(self.train):
            return self.bank[torch.from_numpy(index).to(self.device)]
        return self._rows("train", index)

    def measure(self, numbers: Sequence[Number]) -> list[Result]:
        """Measure numbers of one protocol.

        Raises:
            ConfigError: the images are not enough for it.
        """
        several: dict[str, Callable[[Sequence[Number]], Iterable[Result]]] = {
            "knn": self._knn,
            "sgd": self._sgd,
            "finetune": self._finetune,
            "robustness": self._robustness,
        }
        each: dict[str, Callable[[Number], Result]] = {
            "linear": self._linear,
            "semi": self._semi,
            "fewshot": self._fewshot,
        }
        with torch.no_grad(), exact_float32():
            protocol = numbers[0].protocol
            if protocol in several:
                return list(several[protocol](numbers))
            return [each[protocol](number) for number in numbers]

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
        return self._probed(number, self.probe)

    def _semi(self, number: Number) -> Result:
        index, facts, files = self._part(number)
        probe = self._probe(self.features(index), self.known[torch.from_numpy(index).to(self.device)])
        return self._probed(number, probe, facts, files)

    @staticmethod
    def _probe(features: Tensor, labels: Tensor) -> Probe | None:
        return fit_probe(features, labels) if bool(features.isfinite().all()) else None

    def _probed(
        self,
        number: Number,
        probe: Probe | None,
        facts: dict[str, Any] | None = None,
        files: dict[str, str] | None = None,
    ) -> Result:
        """What a linear probe says of the test images, and how its penalty was chosen."""
        own: dict[str, Any] = {}
        if probe is not None:
            chosen = "one in five of the training images, by class"
            own = {"penalties_tried": list(probe.tried), "penalty": probe.l2, "chosen_on": chosen}
        return self._scored(number, self.judged(self.queries, probe), {**(facts or {}), **own}, files)

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

    def _sgd(self, numbers: Sequence[Number]) -> Iterable[Result]:
        for number in numbers:
            recipe, rates = sgd.linear_recipe(SgdOptions(**number.settings))
            everything = np.arange(len(self.train))
            # Without augmentation features are computed once, else by each task.
            rows = self.crew.share(self.features(everything)) if recipe.scale is None else None
            key = number.key
            rate = self._rates([number], {key: rates}, "sgd_loss", {key: rows})[key]
            queries = self.crew.share(self.queries) if rows is not None else None
            (hits,) = self.crew.run([Task("sgd_hits", (number, rate, rows, queries))])
            recipe = dataclasses.replace(recipe, batch_size=min(recipe.batch_size, len(self.train)))
            yield self._scored(number, hits, self._trained(recipe, rates, rate))

    def _finetune(self, numbers: Sequence[Number]) -> Iterable[Result]:
        parts = {number.key: self._part(number) for number in numbers}
        tried = {number.key: self.tuning(number)[0].lr for number in numbers}
        chosen = self._rates(numbers, tried, "finetune_loss", {key: part[0] for key, part in parts.items()})
        trainings = [(number, seed) for number in numbers for seed in range(self.tuning(number)[0].seeds)]
        tasks = []
        for number, seed in trainings:
            rate, seeds = chosen[number.key], self.tuning(number)[0].seeds
            title = f"{number.name}: rate {rate:g}, training {seed + 1} of {seeds}"
            tasks.append(Task("finetune_hits", (number, rate, parts[number.key][0], seed), title))
        found = self.crew.run(tasks)
        for number in numbers:
            index, facts, files = parts[number.key]
            hits = [each for (other, _), each in zip(trainings, found, strict=True) if other is number]
            recipe = self.tuning(number, len(index))[1]
            facts = facts | self._trained(recipe, tried[number.key], chosen[number.key])
            yield self._tuned(number, hits, facts, files)

    def _rates(
        self,
        numbers: Sequence[Number],
        rates: Mapping[str, Sequence[float]],
        name: str,
        given: Mapping[str, Any],
    ) -> dict[str, float]:
        """The best of each number's rates, by its key.

        Args:
            numbers: of one protocol.
            rates: of each, by its key; of one rate, no loss is asked for.
            name: of the task that returns the loss with a rate.
            given: what the task gets beside the number and the rate, by the number's key.
        """
        pairs = [(number, rate) for number in numbers for rate in rates[number.key] if len(rates[number.key]) > 1]
        found = self.crew.run(
            [
                Task(name, (number, rate, given[number.key]), f"{number.name}: trying rate {rate:g}")
                for number, rate in pairs
            ]
        )
        losses = {(number.key, rate): loss for (number, rate), loss in zip(pairs, found, strict=True)}
        return {n.key: sgd.best_rate({r: losses.get((n.key, r), 0.0) for r in rates[n.key]}) for n in numbers}

    @staticmethod
    def _tuned(number: Number, hits: Sequence[Tensor | None], facts: dict[str, Any], files: dict[str, str]) -> Result:
        """The mean over the hits of several trainings."""
        values = torch.tensor([top1(each) for each in hits], dtype=torch.float64)
        metrics = {number.key: float(values.mean())}
        if len(hits) > 1:
            metrics[f"{number.name}/deviation"] = float(values.std())
        kept = {f"{number.name}/seed{i}": each for i, each in enumerate(hits) if each is not None}
        return Result(number, metrics, kept, facts | {"top1_by_seed": values.tolist()}, files)

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
            found, queries = fewshot.episodes(self.bank, labels[0], self.queries, labels[1], *asked)
        except ValueError as error:
            raise ConfigError(f"fewshot.ways: got {how['ways']}, but {error}") from error
        mean, half = fewshot.interval(found)
        facts = {} if queries == how["queries"] else {"queries": queries, "queries_asked": how["queries"]}
        return Result(number, {number.key: mean, f"{number.name}/interval": half}, {number.name: found}, facts)

    def _robustness(self, numbers: Sequence[Number]) -> Iterable[Result]:
        given = [self.crew.share(x) for x in (self.bank, self.probe)]
        found = self.crew.run([Task("changed", (number, *given), number.name) for number in numbers])
        for number, (knn, linear) in zip(numbers, found, strict=True):
            base = number.name.removesuffix("/knn")
            kept = {number.name: knn} | ({} if linear is None else {f"{base}/linear": linear})
            yield Result(number, {number.key: top1(knn), f"{base}/linear/top1": top1(linear)}, kept)
