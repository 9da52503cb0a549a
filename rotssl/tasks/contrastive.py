"""Images of one class attract each other: Khosla et al. 2020 (arXiv 2004.11362), and what accuracy means without a classifier."""

import torch
from torch import Tensor

from rotssl.base import distributed
from rotssl.base.precision import exact
from rotssl.methods.losses import similarity


def supervised_contrastive(
    z: Tensor, labels: Tensor, everyone: Tensor, all_labels: Tensor, offset: int, temperature: float
) -> Tensor:
    """The supervised contrastive loss, L_sup_out (eq. 2), summed over local anchors; anchors without a positive add nothing.

    Of an anchor i it is the mean, over the other rows p of its class, of -log(exp(z_i z_p / tau) / sum over rows a but i of
    exp(z_i z_a / tau)).

    Args:
        z: L2-normalised anchors, (N, D), float32 or wider.
        labels: their classes, (N,).
        everyone: the rows of all workers, (M, D), of which ``z`` is rows offset to offset + N.
        all_labels: their classes, (M,); those below 0 are of no image, and left out.
        offset: see ``everyone``; at least one row of an image is beside each anchor.
        temperature: tau > 0.

    Returns:
        A scalar.
    """
    logits = similarity(z, everyone) / temperature
    itself = torch.arange(offset, offset + len(z), device=z.device)[:, None]
    positive = ((labels[:, None] == all_labels) & (all_labels >= 0)).scatter(1, itself, False)
    left_out = (all_labels < 0).expand_as(positive).scatter(1, itself, True)
    each = logits.masked_fill(left_out, float("-inf")).log_softmax(1).masked_fill(~positive, 0.0)
    return -(each.sum(1) / positive.sum(1).clamp(min=1) * (labels >= 0)).sum()


def with_positives(all_labels: Tensor, classes: int) -> Tensor:
    """Number of rows that have another one of their class, from the classes (M,) of all rows, those of no image below 0."""
    counts = (all_labels[:, None] == torch.arange(classes, device=all_labels.device)).sum(0)
    return torch.where(counts > 1, counts, 0).sum()


@torch.no_grad()
def nearest_mean(z: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Number of local rows whose class has the nearest mean, over the rows of all *other* images of all workers.

    The rows of an image itself do not count: its other view, which may have the same angle, would give the answer away. So where
    the rows do not tell the classes, the share of right answers is 1 / classes on average, whatever the number of images.

    Args:
        z: rows of the G views of b images, (G, b, D).
        labels: their classes, (G, b).
        classes: number of classes.

    Returns:
        A scalar, int64.
    """
    each = (labels[..., None] == torch.arange(classes, device=z.device)).to(z.dtype)
    with exact(z):  # products in half precision would make equal what is close together
        own, own_count = torch.einsum("gbk,gbd->bkd", each, z), each.sum(0)
        sums = distributed.all_reduce(torch.cat([own.sum(0), own_count.sum(0)[:, None]], 1))
        others, count = sums[:, :-1] - own, sums[:, -1] - own_count
        means = others / count.clamp(min=1)[..., None]
        # The nearest mean has the largest z m - |m|^2 / 2.
        scores = torch.einsum("gbd,bkd->gbk", z, means) - means.square().sum(-1) / 2
    return (scores.masked_fill(count < 0.5, float("-inf")).argmax(-1) == labels).sum()
