"""The losses as functions of two views, ours and the papers' (one number after the other), for the tests."""

import math

import torch
from torch.nn import functional as F

from rotssl.methods.losses import (
    barlow_twins,
    dino_cross_entropy,
    info_nce,
    nt_xent,
    sinkhorn,
    swapped_prediction,
    vicreg,
)

LAMBDA, WEIGHTS = 0.3, (25.0, 15.0, 2.0)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vectors(count=6, dim=5, seed=0):
    return [view.requires_grad_() for view in random(2, count, dim, seed=seed)]


def grads(loss, *inputs):
    return torch.autograd.grad(loss, inputs, materialize_grads=True)  # zeros where none arrives


NEGATIVES = F.normalize(random(7, 5, seed=10), dim=1)
CENTER = random(5, seed=11)


def unit(*views):
    return [F.normalize(view, dim=1) for view in views]


# --- ours, as functions of two views of any length ---------------------------------------------------------------------


def simclr(a, b, temperature=0.2):
    """On one worker, which has the whole batch."""
    a, b = unit(a, b)
    return nt_xent(a, b, a, b, 0, temperature)


def moco(a, b):
    return info_nce(*unit(a, b), NEGATIVES, 0.2)


def swav(*scores, high=2, queue=None):
    """All pairs of a view and another one of the first ``high``, whose codes are balanced with the queue's."""
    terms = []
    for j in range(high):
        seen = scores[j].detach() if queue is None else torch.cat([scores[j].detach(), queue[j]])
        code = sinkhorn(seen, 0.05, 3)[: len(scores[j])]
        terms += [swapped_prediction(scores[i], code, 0.1) for i in range(len(scores)) if i != j]
    return torch.stack(terms).mean()


def swav_of_two(a, b):
    return swav(a.tanh(), b.tanh())  # from -1 to 1, as cosines are


def barlow(a, b):
    return barlow_twins(a, b, LAMBDA)


def variance_covariance(a, b):
    return vicreg(a, b, WEIGHTS)


def dino(a, b):
    return dino_cross_entropy(a, b, CENTER, 0.5, 0.25)


# --- the papers, one number after the other ----------------------------------------------------------------------------


def dot(x, y):
    return sum(p * q for p, q in zip(x, y, strict=True))


def unit_rows(x):
    return [[value / dot(row, row).sqrt() for value in row] for row in x]


def mean_of(values):
    values = list(values)
    return sum(values) / len(values)


def softmax_of(row):
    return [value.exp() / sum(other.exp() for other in row) for value in row]


def byol_paper(prediction, target):
    pairs = zip(unit_rows(prediction), unit_rows(target.detach()), strict=True)
    return mean_of(sum((x - y) ** 2 for x, y in zip(p, z, strict=True)) for p, z in pairs)


def simsiam_paper(prediction, target):
    pairs = zip(prediction, target.detach(), strict=True)
    return mean_of(-dot(p, z) / (dot(p, p).sqrt() * dot(z, z).sqrt()) for p, z in pairs)


def simclr_paper(a, b, temperature=0.2):
    """Eq. 1: -log exp(s_ij / t) / sum over k != i of exp(s_ik / t), over all 2N anchors."""
    rows, count = unit_rows(torch.cat([a, b])), len(a)

    def term(i):
        weights = [(dot(rows[i], row) / temperature).exp() for row in rows]
        return -(weights[(i + count) % (2 * count)] / (sum(weights) - weights[i])).log()

    return mean_of(term(i) for i in range(2 * count))


def moco_paper(a, b):
    def term(query, key):
        positive, *others = [(dot(query, k) / 0.2).exp() for k in (key, *NEGATIVES)]
        return -(positive / (positive + sum(others))).log()

    return mean_of(map(term, unit_rows(a), unit_rows(b.detach())))


def sinkhorn_paper(scores, epsilon, iterations):
    """Eq. 3 to 5: Q = Diag(u) exp(C'Z / epsilon) Diag(v) with marginals 1/K and 1/B; the codes are its columns times B."""
    batch, prototypes = scores.shape
    mass = [[math.exp(score / epsilon) for score in row] for row in scores.tolist()]
    v = [1.0] * batch
    for _ in range(iterations):
        u = [1 / prototypes / sum(mass[b][k] * v[b] for b in range(batch)) for k in range(prototypes)]
        v = [1 / batch / sum(mass[b][k] * u[k] for k in range(prototypes)) for b in range(batch)]
    codes = [[batch * u[k] * mass[b][k] * v[b] for k in range(prototypes)] for b in range(batch)]
    return torch.tensor(codes, dtype=torch.float64)


def swav_paper(a, b):
    """Eq. 1 and 2."""

    def direction(scores, other):
        codes = sinkhorn_paper(other.detach(), 0.05, 3)
        return mean_of(-dot(q, [p.log() for p in softmax_of(row / 0.1)]) for row, q in zip(scores, codes, strict=True))

    return mean_of([direction(a.tanh(), b.tanh()), direction(b.tanh(), a.tanh())])


def barlow_paper(a, b):
    """Eq. 1 and 2; epsilon as in the BatchNorm of the official code."""

    def standardized(column):
        centred = [value - mean_of(column) for value in column]
        return [value / (mean_of(x * x for x in centred) + 1e-5).sqrt() for value in centred]

    left, right = ([standardized(column) for column in view.T] for view in (a, b))
    loss = 0.0
    for i, x in enumerate(left):
        for j, y in enumerate(right):
            c = dot(x, y) / len(a)
            loss = loss + ((1 - c) ** 2 if i == j else LAMBDA * c**2)
    return loss


def vicreg_paper(a, b, weights):
    """Eq. 1 to 6."""
    dim = a.shape[1]
    distance = mean_of(dot(x - y, x - y) for x, y in zip(a, b, strict=True))
    variance = covariance = 0.0
    for view in (a, b):
        centred = [[value - mean_of(column) for value in column] for column in view.T]
        c = [[dot(x, y) / (len(a) - 1) for y in centred] for x in centred]
        variance = variance + mean_of((1 - (c[i][i] + 1e-4).sqrt()).clamp(min=0) for i in range(dim))
        covariance = covariance + sum(c[i][j] ** 2 for i in range(dim) for j in range(dim) if i != j) / dim
    return weights[0] * distance + weights[1] * variance + weights[2] * covariance


def vicreg_code(a, b):
    """The official code: a mean over dimensions where the paper has a sum, and half of the paper's variance."""
    return vicreg_paper(a, b, (WEIGHTS[0] / a.shape[1], WEIGHTS[1] / 2, WEIGHTS[2]))


def dino_paper(a, b):
    """H(P_t, P_s), eq. 1 to 3."""

    def term(student, teacher):
        return -dot(softmax_of((teacher - CENTER) / 0.25), [p.log() for p in softmax_of(student / 0.5)])

    return mean_of(map(term, a, b.detach()))
