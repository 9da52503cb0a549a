"""How much of a loss's gradient is signal: its mean over batches against its spread, and how losses agree."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rotssl.base import rng
from rotssl.base.precision import HALF, autocast
from rotssl.base.step import StepContext
from rotssl.engine.gradients import encoder_gradients
from rotssl.engine.trainer import Trainer


@dataclass(frozen=True)
class Signal:
    """Signal and noise of each loss's gradient at the encoder's weights, for batches of one size.

    With gradients g_1 ... g_n of n batches and their mean m, s^2 = sum |g_i - m|^2 / (n - 1) is an unbiased estimate of the trace
    of a batch's covariance, and |m|^2 - s^2 / n one of |E g|^2. Their ratio is the SNR of one batch. It does not depend on a
    loss's weight, and for a loss that is a mean over images it grows in proportion to the batch.

    Attributes:
        batches: n.
        snr: of each loss, (|m|^2 - s^2 / n) / s^2; below 0 if no signal is seen; None if the gradient is 0.
        norm: of each loss, |m|.
        cosine: of each pair of losses, of their expected gradients: the inner product of the means, less what their common
            batches add to it, over the root of both unbiased squares; None if no signal of one of them is seen.
        batch_cosine: of each pair, the mean over batches of the cosine of the two gradients, as ``TASK/grad_cosine``.
    """

    batches: int
    snr: dict[str, float | None]
    norm: dict[str, float]
    cosine: dict[str, float | None]
    batch_cosine: dict[str, float | None]


class Spread:
    """Means and inner products of the deviations of gradients, one batch after the other (Welford's way), in double precision.

    It holds one vector per loss, however many batches there are.
    """

    def __init__(self) -> None:
        self.count = 0
        self.means: dict[str, Tensor] = {}
        self.products: dict[tuple[str, str], float] = {}  # sums of the products of deviations from the mean
        self.cosines: dict[tuple[str, str], list[float]] = {}

    def add(self, gradients: dict[str, Tensor]) -> None:
        """Take in the flat gradients of one batch, by loss.

        Raises:
            ValueError: they are of other losses than those before.
        """
        wide = {name: gradient.detach().double() for name, gradient in gradients.items()}
        if not self.means:
            self.means = {name: torch.zeros_like(gradient) for name, gradient in wide.items()}
        if wide.keys() != self.means.keys():
            raise ValueError(f"gradients of {', '.join(wide)} after those of {', '.join(self.means)}")
        self.count += 1
        apart = {name: gradient - self.means[name] for name, gradient in wide.items()}
        for pair in itertools.combinations_with_replacement(wide, 2):
            one, two = pair
            share = (self.count - 1) / self.count
            self.products[pair] = self.products.get(pair, 0.0) + share * float(apart[one] @ apart[two])
            lengths = float(wide[one].norm() * wide[two].norm())
            if one != two and lengths > 0:
                self.cosines.setdefault(pair, []).append(float(wide[one] @ wide[two]) / lengths)
        for name, deviation in apart.items():
            self.means[name] += deviation / self.count

    def signal(self) -> Signal:
        """What the batches so far say.

        Raises:
            ValueError: there are fewer than two.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} batches have no spread")
        spread = {pair: total / (self.count - 1) for pair, total in self.products.items()}
        square = {
            (one, two): float(self.means[one] @ self.means[two]) - noise / self.count
            for (one, two), noise in spread.items()
        }
        names = list(self.means)
        snr = {n: square[n, n] / spread[n, n] if spread[n, n] > 0 else None for n in names}
        pairs = list(itertools.combinations(names, 2))
        cosine = {
            " and ".join(pair): square[pair] / math.sqrt(square[pair[0], pair[0]] * square[pair[1], pair[1]])
            if min(square[name, name] for name in pair) > 0
            else None
            for pair in pairs
        }
        seen = {" and ".join(pair): self.cosines.get(pair, []) for pair in pairs}
        batch_cosine = {pair: math.fsum(found) / len(found) if found else None for pair, found in seen.items()}
        norms = {name: float(mean.norm()) for name, mean in self.means.items()}
        return Signal(self.count, snr, norms, cosine, batch_cosine)


def measured(run: Trainer, batches: int, epoch: int) -> Signal:
    """Signal and noise of the losses of a run in its present state, over batches like its own; the state is left as it is.

    The encoder trains as in a step (BatchNorm of the batch), but no step is taken: all gradients are at the same weights. Views
    and angles are drawn anew, so that none has been seen in training; sides and weights are those of the epoch. Batches whose
    losses are others than the first one's, because a task ends within the epoch, are passed over. Of more batches than the epoch
    has, the same images meet again, in other views. In place of fp16, whose small gradients need a scale, float32 is used.

    Args:
        run: of one process, with its state restored.
        batches: number of batches, at least 2.
        epoch: 0-based; after the last one, that one.
    """
    run.parallel.train()
    kept = {name: value.detach().clone() for name, value in run.model.named_buffers()}
    spread, seed = Spread(), run.augment.seed
    half = HALF.get(run.precision)
    try:
        for images, ctx in _fresh(run, min(epoch, run.config.train.epochs - 1)):
            with torch.no_grad():
                views = run.augment(images, ctx).map(lambda view: view.contiguous(memory_format=run.layout))
            with run.model.balance.pause():
                with autocast(run.runtime.device, None if half == torch.float16 else half):
                    out = run.model(views, ctx)
                gradients = encoder_gradients(out.parts, run.model.encoder)
            if not spread.means or gradients.keys() == spread.means.keys():
                spread.add(gradients)
            if spread.count == batches:
                break
    finally:
        run.augment.seed = seed
        with torch.no_grad():
            for name, value in run.model.named_buffers():
                value.copy_(kept[name])
    return spread.signal()


def _fresh(run: Trainer, epoch: int) -> Iterator[tuple[Tensor, StepContext]]:
    """The batches of an epoch with other draws, again and again, each at a step in which all tasks work."""
    every = math.lcm(*(task.config.every for _, task in run.model.named_tasks()))
    for again in itertools.count():
        run.augment.seed = rng.key(run.config.train.seed, "signal", again) >> 1
        for images, ctx in run.batches(epoch):
            yield images, replace(ctx, seed=run.augment.seed, step=ctx.step - ctx.step % every)
