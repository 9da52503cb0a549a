"""Measures of collapse: how evenly the features are spread, and over how many directions."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from rotssl.base import distributed


def feature_std(z: Tensor) -> Tensor:
    """sqrt(d) x the mean over dimensions of the standard deviation of L2-normalised rows; (..., B, d) -> scalar.

    1 if the directions are spread evenly over the sphere, 0 at collapse. SimSiam, Chen and He 2021 (arXiv 2011.10566), fig. 2.
    """
    return math.sqrt(z.shape[-1]) * F.normalize(z.float(), dim=-1).std(dim=-2).mean()


def effective_rank(features: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values; (N, D), with the rows of all workers -> 1 to min(N, D).

    RankMe, Garrido et al. 2023 (arXiv 2210.02885), eq. 1.
    """
    x = features.double()
    # From the smaller Gram matrix, in float64: the singular values of 50,000 x 2048 features take seconds on a GPU.
    rows = int(distributed.all_reduce(torch.tensor(len(x), device=x.device)))
    alone = distributed.world_size() == 1
    gram = x @ x.T if alone and rows < x.shape[1] else distributed.all_reduce(x.T @ x)
    values = torch.linalg.eigvalsh(gram)[-rows:].clamp_min(0).sqrt()
    share = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))
