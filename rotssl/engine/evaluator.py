"""Evaluation during training: what is measured and when. A failed evaluation does not fail the run."""

import logging
import time

import numpy as np
import torch
from torch import Tensor, nn

from rotssl.base import distributed
from rotssl.base.precision import HALF
from rotssl.config import ResolvedConfig
from rotssl.data.augment import Augment
from rotssl.data.datasets import Splits
from rotssl.engine.recorder import SHARE
from rotssl.engine.runtime import RunFailed, Runtime
from rotssl.evaluation import hits
from rotssl.evaluation.measure import Features, Measure, bank_of, encode_share, measures

log = logging.getLogger(__name__)


class Evaluator:
    """Measures a run's encoder on validation or, if nothing is held out, once at the end on test.

    Args:
        config: resolved.
        splits: the images.
        augment: provides the normalisation.
        layout: memory format of the images.
        precision: that the run trains in. bf16 is taken for validation as well; fp16 may overflow, and test is used only once.
        runtime: environment that this runs in.

    Attributes:
        spent: seconds that evaluations have taken in this start.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        splits: Splits,
        augment: Augment,
        layout: torch.memory_format,
        precision: str,
        runtime: Runtime,
    ) -> None:
        self.config, self.splits, self.augment, self.layout, self.runtime = config, splits, augment, layout, runtime
        self.precision = "bf16" if precision == "bf16" and splits.test is None else "fp32"
        self.prefix = "" if splits.test is None else "test/"
        self.queries = splits.test or splits.validation  # None without labels
        self.bank = bank_of(splits.train, config.evaluation.bank)
        self._trained = self.spent = self._latest = 0.0

    @property
    def neighbours(self) -> int:
        """How many kNN has."""
        return min(self.config.evaluation.knn_k, len(self.bank))

    def wanted(self, epoch: int) -> set[str]:
        """Names of the accuracies that are due after an epoch (0-based)."""
        every, last = self.config.evaluation.knn_every, epoch + 1 == self.config.train.epochs
        names = {f"{self.prefix}knn/top1"} | ({f"{self.prefix}linear/top1"} if self._probes(epoch) else set())
        if every == 0 or self.queries is None:
            return set()
        between = self.splits.test is None  # the test split is used only once
        return names if last or (between and every != "auto" and (epoch + 1) % every == 0) else set()

    def due(self, epoch: int, seconds: float, saving: float = 0.0) -> bool:
        """Whether to evaluate after an epoch (0-based); every worker must call it after each.

        With ``evaluation.knn_every auto`` also where evaluations and checkpoints take no more than ``SHARE`` of the time, with
        this evaluation and that at the end, going by the last one; the first epoch of a start shows how long that is.

        Args:
            epoch: 0-based.
            seconds: that its training took.
            saving: seconds that checkpoints have held up this start.
        """
        self._trained += seconds
        if self.config.evaluation.knn_every != "auto" or self.queries is None or self.splits.test is not None:
            return bool(self.wanted(epoch))
        affordable = self.spent + 2 * self._latest + saving <= SHARE * self._trained and self.runtime.rank == 0
        agreed = distributed.mean(torch.tensor(float(affordable), device=self.runtime.device))  # rank 0 decides
        return bool(self.wanted(epoch)) or float(agreed) > 0

    def _probes(self, epoch: int) -> bool:
        return self.config.evaluation.linear and epoch + 1 == self.config.train.epochs

    def evaluate(self, encoder: nn.Module, epoch: int, skipped: int = 0) -> dict[str, float]:
        """The measures after an epoch (0-based), on rank 0; every worker must call it.

        Measures that fail, usually for lack of memory, are left out with a warning, so that the training is not lost.

        Args:
            encoder: the encoder.
            epoch: 0-based.
            skipped: steps of the epoch that were skipped, for the message of an error.

        Raises:
            RunFailed: features are not finite.
        """
        started = time.perf_counter()
        try:
            return self._evaluate(encoder, epoch, skipped)
        finally:
            self._latest = time.perf_counter() - started
            self.spent += self._latest

    def _evaluate(self, encoder: nn.Module, epoch: int, skipped: int) -> dict[str, float]:
        assert self.queries is not None
        sets, device = (self.splits.train, self.queries), self.runtime.device
        chosen = self.bank, np.arange(len(self.queries))
        shares, finite, reason = list[Tensor](), True, ""
        try:
            shares = [
                encode_share(encoder, part, self.augment, device, self.layout, HALF.get(self.precision), chosen=which)
                for part, which in zip(sets, chosen, strict=True)
            ]
            # By rows: a mask of all features would take as much memory as the features themselves.
            finite = all(bool(share.sum(1).isfinite().all()) for share in shares)
        except Exception as error:  # of any kind, see the docstring
            reason = _in_a_line(error)
        # If one worker fails, all skip the evaluation: the others would wait for its share.
        if reason := distributed.first_nonempty(reason, device):
            self._give_back()
            if self.runtime.rank == 0:
                log.warning("epoch %d could not be evaluated (%s); the run continues", epoch + 1, reason)
            return {}
        if float(distributed.mean(torch.tensor(float(finite), device=device))) < 1:
            why = f"the encoder's features are no longer finite (optim.lr {self.config.optim.lr:g})"
            many = (
                f"{skipped} {'step' if skipped == 1 else 'steps'} of epoch {epoch + 1} skipped for non-finite gradients"
            )
            raise RunFailed(f"{many}, and {why}" if skipped else why)
        both = zip(sets, chosen, strict=True)
        labels = (torch.from_numpy(part.labels)[torch.from_numpy(which)].to(device) for part, which in both)
        bank, queries = map(Features, shares, labels)
        return self._measure(bank, queries, epoch)

    def _measure(self, bank: Features, queries: Features, epoch: int) -> dict[str, float]:
        kind = torch.bfloat16 if self.config.evaluation.knn_bf16 else torch.float32
        found, right = dict[str, float](), dict[str, Tensor]()
        how = self.config.evaluation.knn_k, self.config.evaluation.knn_temperature
        for name, measure in measures(bank, queries, self._probes(epoch), kind, right, how).items():
            value, reason = self._attempt(measure)
            if not reason:
                found[self.prefix + name] = value
                continue
            if self.runtime.rank == 0:
                log.warning("%s could not be measured (%s); the run continues", self.prefix + name, reason)
            self._give_back()
        if self.runtime.rank != 0:
            return {}
        if right and epoch + 1 == self.config.train.epochs:
            try:
                hits.save(right, self.config.run_dir)
            except Exception as error:  # as above
                log.warning("%s could not be written (%s); the run continues", hits.FILE, _in_a_line(error))
        return found

    def _attempt(self, measure: Measure) -> tuple[float, str]:
        """A measure's value, or why it has none; the same reason on all workers.

        Of several workers, each tries alone first.

        Raises:
            Exception: an error that only shows when they measure together; the others would wait for this one.
        """
        alone, reason = distributed.world_size() == 1, ""
        try:
            if alone:
                return measure.compute(), ""
            with distributed.alone():
                measure.trial()
        except Exception as error:  # of any kind, see evaluate()
            reason = _in_a_line(error)
        if alone or (reason := distributed.first_nonempty(reason, self.runtime.device)):
            return 0.0, reason
        return measure.compute(), ""

    def _give_back(self) -> None:
        """Free the GPU memory held by an error; called after its handler, because the traceback holds it."""
        if self.runtime.device.type == "cuda":
            torch.cuda.empty_cache()


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
