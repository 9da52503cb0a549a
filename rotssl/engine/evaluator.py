"""The evaluation of a run while it trains: what is measured when, and that it costs the run nothing if it fails."""

import logging

import torch
from torch import Tensor, nn

from rotssl.base import distributed
from rotssl.config import ResolvedConfig
from rotssl.data.augment import Augment
from rotssl.data.datasets import Splits
from rotssl.data.images import ImageSet
from rotssl.engine.runtime import RunFailed, Runtime
from rotssl.evaluation.measure import encode_share, measures

log = logging.getLogger(__name__)


class Evaluator:
    """Measures a run's encoder on validation, or, where all images train, once in the end on test.

    Args:
        config: resolved.
        splits: the images.
        augment: for its normalisation.
        layout: memory format of the images.
        runtime: who runs this.
    """

    def __init__(
        self, config: ResolvedConfig, splits: Splits, augment: Augment, layout: torch.memory_format, runtime: Runtime
    ) -> None:
        self.config, self.splits, self.augment, self.layout, self.runtime = config, splits, augment, layout, runtime
        self.prefix = "" if splits.test is None else "test/"
        self.queries = splits.test or splits.validation  # None where there is nothing to evaluate by

    def wanted(self, epoch: int) -> set[str]:
        """Names of the accuracies that are due after an epoch (0-based)."""
        every, last = self.config.evaluation.knn_every, epoch + 1 == self.config.train.epochs
        names = {f"{self.prefix}knn/top1"} | ({f"{self.prefix}linear/top1"} if self._probes(epoch) else set())
        between = self.splits.test is None  # which is read once
        due = every > 0 and (last or (between and (epoch + 1) % every == 0))
        return names if due and self.queries is not None else set()

    def _probes(self, epoch: int) -> bool:
        return self.config.evaluation.linear and epoch + 1 == self.config.train.epochs

    def evaluate(self, encoder: nn.Module, epoch: int) -> dict[str, float]:
        """The measures after an epoch (0-based), on rank 0; every worker calls it.

        What fails, mostly for want of memory, is left out with a warning: what was trained is worth more.

        Raises:
            RunFailed: features are not finite.
        """
        assert self.queries is not None
        sets, device = (self.splits.train, self.queries), self.runtime.device
        shares, room, finite, reason = list[Tensor](), list[Tensor | None](), True, ""
        try:
            shares = [encode_share(encoder, part, self.augment, device, self.layout) for part in sets]
            # By rows: a mask of all features, or what isfinite makes for it, would be as large as they are.
            finite = all(bool(share.sum(1).isfinite().all()) for share in shares)
            room = [distributed.room_for_all(share) for share in shares]
        except Exception as error:  # whatever it is: see above
            reason = _in_a_line(error)
        # All workers leave it where one does: the others would wait for its share.
        if reason := distributed.first_nonempty(reason, device):
            self._give_back()
            if self.runtime.rank == 0:
                log.warning("epoch %d could not be evaluated (%s); the run goes on", epoch + 1, reason)
            return {}
        if float(distributed.mean(torch.tensor(float(finite), device=device))) < 1:
            raise RunFailed(f"the encoder's features are no longer finite (optim.lr {self.config.optim.lr:g})")
        features = [distributed.gather_to_first(share, place) for share, place in zip(shares, room, strict=True)]
        if self.runtime.rank != 0:
            return {}
        return self._measure([rows[: len(part)] for rows, part in zip(features, sets, strict=True)], sets, epoch)

    def _measure(self, features: list[Tensor], sets: tuple[ImageSet, ImageSet], epoch: int) -> dict[str, float]:
        labels = [torch.from_numpy(part.labels).to(self.runtime.device) for part in sets]
        kind = torch.bfloat16 if self.config.evaluation.knn_bf16 else torch.float32
        probe = self._probes(epoch)
        found: dict[str, float] = {}
        for name, compute in measures(features[0], labels[0], features[1], labels[1], probe, kind).items():
            try:
                found[self.prefix + name] = compute()
                continue
            except Exception as error:  # as above
                log.warning("%s could not be measured (%s); the run goes on", self.prefix + name, _in_a_line(error))
            self._give_back()
        return found

    def _give_back(self) -> None:
        """Free what an error held of a GPU's memory; after its handler, whose traceback holds it."""
        if self.runtime.device.type == "cuda":
            torch.cuda.empty_cache()


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
