"""A linear classifier on frozen features: multinomial logistic regression, its L2 penalty chosen on a part of the bank.

Each worker keeps its share of the bank. The first one takes the steps; in each it tells the others its weights, and all sum their
gradients.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from rotssl.base import distributed, heartbeat
from rotssl.evaluation.hits import top1
from rotssl.evaluation.protocol import LINEAR_GRADIENT, LINEAR_HELD_OUT, LINEAR_ITERATIONS, LINEAR_L2

HISTORY = 50  # with 10, fits of 5,000 features took 1.5 times as many passes
CONSTANT = 1e-5  # a spread below this share of a dimension's largest value is rounding
CHUNK_BYTES = 256 << 20  # of logits at a time


@torch.no_grad()
def linear_hits(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    held: Tensor | None = None,
    iterations: int = LINEAR_ITERATIONS,
) -> Tensor | None:
    """Which queries a linear classifier, fitted to the bank, classifies correctly.

    Deterministic: the held-out part is fixed, and every fit has a unique optimum. The queries do not affect any choice.

    Args:
        bank: this worker's share of the features with known labels, (N, D), of all workers at least 2.
        bank_labels: (N,) int64.
        queries: this worker's share, (M, D).
        query_labels: (M,) int64.
        held: which images of this share choose the penalty, (N,) bool; None: those of ``held_out`` for these labels.
        iterations: most of a fit.

    Returns:
        (M,) bool; None if a feature of any worker is not finite.
    """
    bank, queries = bank.float(), queries.float()
    bad = ~(bank.isfinite().all() & queries.isfinite().all())
    if distributed.largest(bad.int()):
        return None
    return fit_probe(bank, bank_labels, held, iterations).classes(queries) == query_labels


@dataclass(frozen=True)
class Probe:
    """A fitted linear classifier: of features minus ``mean`` in units of ``spread``, each (D,), with ``weights`` (C, D + 1).

    ``l2`` is the strength of its penalty, ``tried`` are those that were tried, in their order.
    """

    mean: Tensor
    spread: Tensor
    weights: Tensor
    l2: float
    tried: tuple[float, ...]

    def to(self, device: torch.device) -> "Probe":
        """The same on a device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in ("mean", "spread", "weights")})

    def classes(self, features: Tensor) -> Tensor:
        """The most probable class of each row, (M, D) -> (M,) int64."""
        return logits((features.float() - self.mean) / self.spread, self.weights).argmax(1)


@torch.no_grad()
def fit_probe(bank: Tensor, labels: Tensor, held: Tensor | None = None, iterations: int = LINEAR_ITERATIONS) -> Probe:
    """The classifier of ``linear_hits``, fitted to a bank of finite features; the arguments are as there."""
    bank = bank.float()
    mean = _total(bank.sum(0, dtype=torch.float64)) / _count(bank)
    squares = torch.zeros_like(mean)
    for part in bank.split(1 << 14):  # a part at a time, for they become float64
        squares += (part - mean).square().sum(0)
    spread = (_total(squares) / _count(bank)).sqrt()
    largest = distributed.largest(bank.abs().amax(0) if len(bank) else bank.new_zeros(bank.shape[1]))
    # Dividing by infinity removes a constant dimension; dividing by its rounding error could make a query's value explode.
    mean, spread = mean.float(), spread.float()
    spread = spread.masked_fill(spread <= CONSTANT * largest, math.inf)
    held = held_out(labels) if held is None else held
    return Probe(mean, spread, *_fit_with_best_l2((bank - mean) / spread, labels, held, iterations))


def _total(x: Tensor) -> Tensor:
    return distributed.all_reduce(x.clone())


def _count(rows: Tensor) -> int:
    """Rows of all workers."""
    return int(distributed.all_reduce(torch.tensor(len(rows), device=rows.device)))


def held_out(labels: Tensor) -> Tensor:
    """Which images of a bank choose the penalty, (N,) bool: of each class its share."""
    order = labels.argsort(stable=True)
    found = torch.zeros_like(labels, dtype=torch.bool)
    found[order] = torch.arange(len(order), device=order.device) % LINEAR_HELD_OUT == 0
    return found


def linear_top1(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor) -> float:
    """Share of the queries that ``linear_hits`` says are classified correctly; nan if a feature is not finite."""
    return top1(linear_hits(bank, bank_labels, queries, query_labels))


def logits(features: Tensor, weights: Tensor) -> Tensor:
    """Logits of features (N, D) with weights (C, D + 1), whose last column is the bias: (N, C)."""
    # Contiguous (C, D): with strides or transposed, the product for the gradient takes ten times as long on a CPU.
    return F.linear(features, weights[:, :-1].contiguous(), weights[:, -1])


def fit(features: Tensor, labels: Tensor, l2: float, start: Tensor, iterations: int = LINEAR_ITERATIONS) -> Tensor:
    """Minimise the mean cross-entropy + l2 / 2 x |weights without bias|^2, even if gradients are disabled.

    Args:
        features: this worker's share, (N, D) float32, standardised.
        labels: (N,) int64, below C.
        l2: strength of the penalty.
        start: initial weights, (C, D + 1), whose last column is the bias; the optimum does not depend on them.
        iterations: most of them.

    Returns:
        The weights, (C, D + 1), the same on all workers.
    """
    weights = start.clone().requires_grad_()
    count = _count(features)
    if distributed.rank() > 0:
        while _told(weights):
            with torch.enable_grad():
                _cross_entropy(features, labels, weights, count)
            weights.grad = None
        return weights.detach()
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=iterations,
        tolerance_grad=LINEAR_GRADIENT,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        _told(weights)
        optimizer.zero_grad()
        loss = _cross_entropy(features, labels, weights, count)
        penalty = l2 / 2 * weights[:, :-1].square().sum()
        penalty.backward()
        heartbeat.beat()
        return loss + penalty.detach()

    optimizer.step(objective)  # enables gradients
    _told(weights, on=False)
    return weights.detach()


def _told(weights: Tensor, on: bool = True) -> bool:
    """Give the first worker's weights to the others, in place; returns whether it goes on.

    The steps of L-BFGS depend on comparisons, which must not turn out otherwise on a worker that rounds otherwise.
    """
    found = distributed.from_rank(torch.cat([weights.new_tensor([on]), weights.detach().flatten()]), 0)
    with torch.no_grad():
        weights.copy_(found[1:].view_as(weights))
    return bool(found[0])


def _cross_entropy(features: Tensor, labels: Tensor, weights: Tensor, count: int) -> Tensor:
    """The mean over so many images of all workers, with its gradient in ``weights.grad``, if they have one."""
    loss = features.new_zeros(())
    chunk = max(1, CHUNK_BYTES // (4 * len(weights)))
    for rows, known in zip(features.split(chunk), labels.split(chunk), strict=True):
        part = F.cross_entropy(logits(rows, weights), known, reduction="sum") / count
        if weights.requires_grad:
            part.backward()
        loss += part.detach()
    if distributed.world_size() > 1 and weights.requires_grad:
        weights.grad = torch.zeros_like(weights) if weights.grad is None else weights.grad
        distributed.all_reduce(weights.grad)
    return distributed.all_reduce(loss)


def _fit_with_best_l2(
    bank: Tensor, labels: Tensor, held: Tensor, iterations: int
) -> tuple[Tensor, float, tuple[float, ...]]:
    """Weights fitted to the whole bank, with the penalty that has the lowest cross-entropy on a held-out part of it.

    The penalty and those that were tried come with them.

    Cross-entropy rather than accuracy, which on a few hundred images is too coarse to distinguish neighbours in the grid.
    """
    features, known = bank[~held], labels[~held]
    apart, theirs = bank[held], labels[held]
    classes = 1 + int(distributed.largest(labels.amax() if len(labels) else labels.new_tensor(0)))
    weights = bank.new_zeros(classes, bank.shape[1] + 1)
    best, chosen, tried = math.inf, LINEAR_L2[0], list[float]()
    for l2 in LINEAR_L2:  # each fit starts from the previous one, which is close
        tried.append(l2)
        candidate = fit(features, known, l2, weights, iterations)
        loss = float(distributed.from_rank(_cross_entropy(apart, theirs, candidate, _count(apart)), 0))
        if loss >= best:  # smaller penalties only overfit more
            break
        best, chosen, weights = loss, l2, candidate
    return fit(bank, labels, chosen, weights, iterations), chosen, tuple(tried)
