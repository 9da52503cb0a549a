"""A linear classifier on frozen features: multinomial logistic regression, its L2 penalty chosen on a part of the bank."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from rotssl.base import heartbeat
from rotssl.evaluation.hits import top1
from rotssl.evaluation.protocol import LINEAR_GRADIENT, LINEAR_HELD_OUT, LINEAR_ITERATIONS, LINEAR_L2

HISTORY = 50  # with 10, fits of 5,000 features took 1.5 times as many passes
CONSTANT = 1e-5  # a spread below this share of a dimension's largest value is rounding


@torch.no_grad()
def linear_hits(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor) -> Tensor | None:
    """Which queries a linear classifier, fitted to the bank, classifies correctly.

    Deterministic: the held-out part is fixed, and every fit has a unique optimum. The queries do not affect any choice.

    Args:
        bank: features with known labels, (N, D), N of at least 2.
        bank_labels: (N,) int64.
        queries: (M, D).
        query_labels: (M,) int64.

    Returns:
        (M,) bool; None if a feature is not finite.
    """
    bank, queries = bank.float(), queries.float()
    if not (bank.isfinite().all() and queries.isfinite().all()):
        return None
    mean, spread = bank.mean(0), bank.std(0, correction=0)
    # Dividing by infinity removes a constant dimension; dividing by its rounding error could make a query's value explode.
    spread = spread.masked_fill(spread <= CONSTANT * bank.abs().amax(0), math.inf)
    weights = _fit_with_best_l2((bank - mean) / spread, bank_labels)
    return logits((queries - mean) / spread, weights).argmax(1) == query_labels


def linear_top1(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor) -> float:
    """Share of the queries that ``linear_hits`` says are classified correctly; nan if a feature is not finite."""
    return top1(linear_hits(bank, bank_labels, queries, query_labels))


def logits(features: Tensor, weights: Tensor) -> Tensor:
    """Logits of features (N, D) with weights (C, D + 1), whose last column is the bias: (N, C)."""
    # Contiguous (C, D): with strides or transposed, the product for the gradient takes ten times as long on a CPU.
    return F.linear(features, weights[:, :-1].contiguous(), weights[:, -1])


def fit(features: Tensor, labels: Tensor, l2: float, start: Tensor) -> Tensor:
    """Minimise the mean cross-entropy + l2 / 2 x |weights without bias|^2, even if gradients are disabled.

    Args:
        features: (N, D) float32, standardised.
        labels: (N,) int64, below C.
        l2: strength of the penalty.
        start: initial weights, (C, D + 1), whose last column is the bias; the optimum does not depend on them.

    Returns:
        The weights, (C, D + 1).
    """
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=LINEAR_ITERATIONS,
        tolerance_grad=LINEAR_GRADIENT,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(features, weights), labels) + l2 / 2 * weights[:, :-1].square().sum()
        loss.backward()
        heartbeat.beat()
        return loss

    optimizer.step(objective)  # enables gradients
    return weights.detach()


def _fit_with_best_l2(bank: Tensor, labels: Tensor) -> Tensor:
    """Weights fitted to the whole bank, with the penalty that has the lowest cross-entropy on a held-out part of it.

    Cross-entropy rather than accuracy, which on a few hundred images is too coarse to distinguish neighbours in the grid.
    """
    order = labels.argsort(stable=True)  # by class, so that each contributes its share
    held_out = torch.arange(len(order), device=order.device) % LINEAR_HELD_OUT == 0
    held, rest = order[held_out], order[~held_out]
    features, known = bank[rest], labels[rest]
    weights = bank.new_zeros(int(labels.max()) + 1, bank.shape[1] + 1)
    best, chosen = math.inf, LINEAR_L2[0]
    for l2 in LINEAR_L2:  # each fit starts from the previous one, which is close
        candidate = fit(features, known, l2, weights)
        loss = float(F.cross_entropy(logits(bank[held], candidate), labels[held]))
        if loss >= best:  # smaller penalties only overfit more
            break
        best, chosen, weights = loss, l2, candidate
    return fit(bank, labels, chosen, weights)
