"""Features in the plane, and the nearest of them."""

import importlib.util

import torch
from torch import Tensor
from torch.nn import functional as F


def pca(features: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """The two principal components, in float64. Each axis points to its largest loading, so that all calls draw the same map.

    Args:
        features: (N, D), D at least 2.

    Returns:
        Coordinates (N, 2), and the share of the variance along each axis.
    """
    centred = features.double() - features.double().mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    axes = vectors[:, -2:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    shares = (values[-2:].flip(0) / values.sum().clamp(min=1e-30)).clamp(min=0)
    return (centred @ axes).float(), (float(shares[0]), float(shares[1]))


def umap(features: Tensor) -> Tensor | None:
    """UMAP's coordinates (N, 2) of features (N, D) by cosine (McInnes et al., arXiv 1802.03426); None if it is not installed."""
    if importlib.util.find_spec("umap") is None or len(features) < 16:
        return None
    from umap import UMAP

    return torch.from_numpy(UMAP(metric="cosine", random_state=0, n_jobs=1).fit_transform(features.cpu().numpy()))


def nearest(queries: Tensor, bank: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The nearest rows of a bank by cosine, the nearest first.

    Args:
        queries: features (Q, D).
        bank: features (N, D).
        count: k, at most N.

    Returns:
        Cosines and indices, (Q, k) each.
    """
    cosines = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    found = cosines.topk(count, dim=1)
    return found.values, found.indices
