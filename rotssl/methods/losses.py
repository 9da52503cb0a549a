"""Losses as pure functions of tensors. D is the embedding dimension, B the local and G the global batch.

Losses whose terms are statistics of the global batch take ``total``, which sums a tensor over all workers with gradient; the
default is the sum of one worker.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rotssl.base.precision import exact, full_precision


def one_worker(x: Tensor) -> Tensor:
    """The sum over a single worker."""
    return x


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of all rows, (B, D) and (N, D) -> (B, N), in full precision even under autocast."""
    with exact(a):
        return full_precision(a) @ full_precision(b).T


class _Normalize(torch.autograd.Function):
    """Rows divided by their norms, whose gradient is four operations in place of the thirteen of F.normalize.

    It has no second derivative.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
        unit: Tensor = x / norm
        ctx.save_for_backward(unit, norm)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        unit, norm = ctx.saved_tensors
        along = (grads[0] * unit).sum(-1, keepdim=True)
        inwards: Tensor = torch.addcmul(grads[0], unit, along, value=-1)
        return inwards.div_(norm)


def normalize(x: Tensor) -> Tensor:
    """L2-normalised rows, (..., D) -> (..., D), as F.normalize but for norms of 1e-12 and below; a row of zeros stays zero."""
    return _Normalize.apply(x)  # type: ignore[no-any-return]


def byol_regression(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared distance of the L2-normalised vectors, 2 - 2 cos, averaged over the batch.

    BYOL, Grill et al. 2020 (arXiv 2006.07733), eq. 2. No gradient reaches the target.

    Args:
        prediction: predictor outputs of one view, (B, D).
        target: teacher projections of another view, (B, D).

    Returns:
        A scalar in [0, 4].
    """
    return _squared_distance(prediction, target) / len(prediction)


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Negative cosine similarity, averaged over the batch; no gradient reaches the target.

    SimSiam, Chen and He 2021 (arXiv 2011.10566), eq. 1.

    Args:
        prediction: predictor outputs of one view, (B, D).
        target: projections of another view, (B, D).

    Returns:
        A scalar in [-1, 1].
    """
    return _squared_distance(prediction, target) / (2 * len(prediction)) - 1


def _squared_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Sum over rows of 2 - 2 cos: of vectors of norm 1 that is their squared distance."""
    a, b = (normalize(full_precision(x)) for x in (prediction, target.detach()))
    return F.mse_loss(a, b, reduction="sum")


def nt_xent(
    a: Tensor,
    b: Tensor,
    all_a: Tensor,
    all_b: Tensor,
    offset: int,
    temperature: float,
    removed: Tensor | None = None,
) -> Tensor:
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
        removed: which images (columns) are no negatives of a local image (row), bool (B, G); none of an image to itself.

    Returns:
        The scalar mean over the local anchors.
    """
    size = a.shape[0]
    own = torch.arange(offset, offset + size, device=a.device)
    logits = similarity(torch.cat([a, b]), torch.cat([all_a, all_b])) / temperature
    total = all_a.shape[0]
    itself = torch.cat([own, own + total])
    logits = logits.scatter(1, itself[:, None], float("-inf"))
    if removed is not None:
        logits = logits.masked_fill(removed.repeat(2, 2), float("-inf"))
    return F.cross_entropy(logits, torch.cat([own + total, own]))


def info_nce(
    query: Tensor, key: Tensor, negatives: Tensor, temperature: float, removed: Tensor | None = None
) -> Tensor:
    """Cross-entropy of finding each query's key among the negatives.

    MoCo, He et al. 2020 (arXiv 1911.05722), eq. 1.

    Args:
        query: L2-normalised, (B, D).
        key: L2-normalised positives, (B, D); no gradient reaches them.
        negatives: L2-normalised keys of other images, (K, D).
        temperature: tau > 0.
        removed: which keys (columns) are no negatives of a query (row), bool (B, K).

    Returns:
        The scalar mean over the queries.
    """
    positive = (full_precision(query) * full_precision(key.detach())).sum(1, keepdim=True)
    others = similarity(query, negatives.detach())
    if removed is not None:
        others = others.masked_fill(removed, float("-inf"))
    logits = torch.cat([positive, others], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def sinkhorn(scores: Tensor, epsilon: float, iterations: int, total: Callable[[Tensor], Tensor] = one_worker) -> Tensor:
    """Codes: soft assignments of samples to prototypes, with all prototypes used equally over the global batch.

    SwAV, Caron et al. 2020 (arXiv 2006.09882), eq. 3 to 5, in the order of the official code: each iteration gives the
    prototypes equal mass, then the samples.

    Args:
        scores: cosines of this worker's samples with the prototypes, (B, K).
        epsilon: entropy regularisation; the smaller, the sharper the codes.
        iterations: of Sinkhorn-Knopp.
        total: sum over all workers.

    Returns:
        (B, K), rows that sum to 1, never in half precision.
    """
    # Double precision, since exp(-2 / epsilon) leaves the range of single precision at an epsilon of 0.02.
    code = ((scores.double() - 1) / epsilon).exp()
    for _ in range(iterations):
        code = code / total(code.sum(0))
        code = code / code.sum(1, keepdim=True)
    return code.to(full_precision(scores).dtype)


def swapped_prediction(scores: Tensor, code: Tensor, temperature: float) -> Tensor:
    """Cross-entropy between the code of one view and the prediction from another.

    SwAV, Caron et al. 2020 (arXiv 2006.09882), eq. 2.

    Args:
        scores: cosines of one view's embeddings with the prototypes, (B, K).
        code: of another view, (B, K), rows that sum to 1.
        temperature: tau > 0.

    Returns:
        The scalar mean over the batch; ln K if the prediction is uniform.
    """
    return cross_entropy(code, F.log_softmax(full_precision(scores) / temperature, dim=1))


def barlow_twins(a: Tensor, b: Tensor, off_diagonal: float, total: Callable[[Tensor], Tensor] = one_worker) -> Tensor:
    """Squared distance of the cross-correlation matrix from the identity.

    Barlow Twins, Zbontar et al. 2021 (arXiv 2103.03230), eq. 1 and 2: the sum over the diagonal of (1 - c_ii)^2, plus lambda x
    the sum over all others of c_ij^2. Statistics are of the global batch.

    Args:
        a: outputs for one view, (B, D).
        b: outputs for the other view, (B, D).
        off_diagonal: lambda.
        total: sum over all workers.
    """
    count = total(full_precision(a).new_full((), len(a)))  # filled on the device, without a host sync

    def standardized(x: Tensor) -> Tensor:
        x = full_precision(x)
        x = x - total(x.sum(0)) / count
        return x / torch.sqrt(total(x.square().sum(0)) / count + 1e-5)

    c = total(similarity(standardized(a).T, standardized(b).T)) / count
    diagonal = c.diagonal()
    return (diagonal - 1).square().sum() + off_diagonal * (c.square().sum() - diagonal.square().sum())


def vicreg(
    a: Tensor,
    b: Tensor,
    weights: tuple[float, float, float],
    total: Callable[[Tensor], Tensor] = one_worker,
) -> Tensor:
    """Invariance, variance and covariance terms.

    VICReg, Bardes, Ponce and LeCun 2022 (arXiv 2105.04906), eq. 1 to 6, as in the official code (main_vicreg.py), which differs
    from the paper in two factors: the squared distance is a mean over dimensions as well (the paper sums them), and the variance
    terms of the two views are averaged (the paper adds them). Statistics are of the global batch, divided by G - 1.

    Args:
        a: outputs for one view, (B, D).
        b: outputs for the other view, (B, D).
        weights: lambda (invariance), mu (variance), nu (covariance).
        total: sum over all workers.
    """
    a, b = full_precision(a), full_precision(b)
    count, dim = total(a.new_full((), len(a))), a.shape[1]
    variance = covariance = a.new_zeros(())
    for x in (a, b):
        centred = x - total(x.sum(0)) / count
        c = total(similarity(centred.T, centred.T)) / (count - 1)
        diagonal = c.diagonal()
        variance = variance + F.relu(1 - torch.sqrt(diagonal + 1e-4)).mean() / 2
        covariance = covariance + (c.square().sum() - diagonal.square().sum()) / dim
    return weights[0] * F.mse_loss(a, b) + weights[1] * variance + weights[2] * covariance


def dino_cross_entropy(
    student: Tensor, teacher: Tensor, center: Tensor, temperature: float, teacher_temperature: float
) -> Tensor:
    """Cross-entropy between the teacher's centred and sharpened distribution and the student's.

    DINO, Caron et al. 2021 (arXiv 2104.14294), eq. 1 to 3. No gradient reaches the teacher.

    Args:
        student: outputs for one view, (B, K).
        teacher: the teacher's outputs for another view, (B, K).
        center: (K,).
        temperature: of the student.
        teacher_temperature: of the teacher.

    Returns:
        The scalar mean over the batch.
    """
    return cross_entropy(dino_target(teacher, center, teacher_temperature), dino_prediction(student, temperature))


def dino_target(teacher: Tensor, center: Tensor, temperature: float) -> Tensor:
    """The teacher's centred and sharpened distribution, without gradient; (B, K) -> (B, K)."""
    return F.softmax((full_precision(teacher.detach()) - center) / temperature, dim=1)


def dino_prediction(student: Tensor, temperature: float) -> Tensor:
    """Logarithms of the student's distribution, (B, K) -> (B, K)."""
    return F.log_softmax(full_precision(student) / temperature, dim=1)


def cross_entropy(target: Tensor, prediction: Tensor) -> Tensor:
    """Mean cross-entropy of distributions (B, K) and logarithms of distributions (B, K)."""
    return -(target * prediction).sum(1).mean()
