"""Losses as pure functions of tensors. D is the embedding dimension, B the local and G the global batch."""

import torch
from torch import Tensor
from torch.nn import functional as F


def full_precision(x: Tensor) -> Tensor:
    """Half-precision tensors as float32, others as they are: losses are never taken in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def byol_regression(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared distance of the L2-normalised vectors, 2 - 2 cos, averaged over the batch.

    BYOL, Grill et al. 2020 (arXiv 2006.07733), eq. 2. No gradient reaches the target.

    Args:
        prediction: predictor outputs of one view, (B, D).
        target: teacher projections of another view, (B, D).

    Returns:
        A scalar in [0, 4].
    """
    prediction, target = full_precision(prediction), full_precision(target.detach())
    cos = (F.normalize(prediction, dim=1) * F.normalize(target, dim=1)).sum(dim=1)
    return (2 - 2 * cos).mean()


def nt_xent(a: Tensor, b: Tensor, all_a: Tensor, all_b: Tensor, offset: int, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy over both directions.

    SimCLR, Chen et al. 2020 (arXiv 2002.05709), eq. 1. Each of the 2B local rows is an anchor; its positive is the other view of
    its image, its negatives are the other 2G - 2 rows of the global batch.

    Args:
        a: L2-normalised projections of the first view, (B, D).
        b: the same of the second view, (B, D).
        all_a: the first views of all workers, (G, D), of which ``a`` is rows offset to offset + B.
        all_b: the same of the second views.
        offset: rank x B.
        temperature: tau > 0.

    Returns:
        The scalar mean over the local anchors.
    """
    size = a.shape[0]
    own = torch.arange(offset, offset + size, device=a.device)
    with torch.autocast(
        "cuda" if a.is_cuda else "cpu", enabled=False
    ):  # which would take the product in half precision
        logits = full_precision(torch.cat([a, b])) @ full_precision(torch.cat([all_a, all_b])).T / temperature
    total = all_a.shape[0]
    itself = torch.cat([own, own + total])
    logits = logits.scatter(1, itself[:, None], float("-inf"))
    return F.cross_entropy(logits, torch.cat([own + total, own]))
