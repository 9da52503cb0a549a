import math

import pytest
import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from torch.nn import functional as F

from rotssl.losses import byol_regression, nt_xent


def vectors(count=6, dim=5, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(count, dim, generator=gen, dtype=torch.float64).requires_grad_() for _ in range(2)]


def simclr(a, b, temperature=0.2):
    """On one worker, which has the whole batch; rows of any length."""
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    return nt_xent(a, b, a, b, 0, temperature)


def grads(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def byol_formula(prediction, target):
    """BYOL eq. 2, one image after the other."""
    total = 0.0
    for p, z in zip(prediction.tolist(), target.tolist(), strict=True):
        p_norm, z_norm = math.hypot(*p), math.hypot(*z)
        total += sum((x / p_norm - y / z_norm) ** 2 for x, y in zip(p, z, strict=True))
    return total / len(prediction)


def simclr_formula(a, b, temperature):
    """SimCLR eq. 1: -log exp(s_ij / t) / sum over k != i of exp(s_ik / t), over all 2N anchors."""
    rows = [[x / math.hypot(*row) for x in row] for row in a.tolist() + b.tolist()]
    count, total = len(a), 0.0
    for i, anchor in enumerate(rows):
        weights = [math.exp(sum(x * y for x, y in zip(anchor, row, strict=True)) / temperature) for row in rows]
        positive = weights[(i + count) % (2 * count)]
        total -= math.log(positive / (sum(weights) - weights[i]))
    return total / (2 * count)


@pytest.mark.parametrize("seed", [0, 1])
def test_byol_is_the_published_formula_in_value_and_gradient(seed):
    p, z = vectors(seed=seed)
    loss = byol_regression(p, z)
    assert loss.item() == pytest.approx(byol_formula(p, z), rel=1e-12)
    theirs = 2 + 2 * NegativeCosineSimilarity()(p, z.detach())
    torch.testing.assert_close(loss, theirs)
    torch.testing.assert_close(grads(loss, p), grads(theirs, p))


def test_byol_sends_no_gradient_to_the_target():
    p, z = vectors()
    byol_regression(p, z).backward()
    assert z.grad is None
    assert p.grad.abs().sum() > 0


def test_byol_is_zero_for_equal_directions_and_four_for_opposite_ones():
    p, _ = vectors()
    assert byol_regression(p, 3 * p).item() == pytest.approx(0, abs=1e-12)
    assert byol_regression(p, -p).item() == pytest.approx(4)


@pytest.mark.parametrize("loss", [byol_regression, simclr])
def test_losses_ignore_lengths_and_the_order_of_the_batch(loss):
    a, b = vectors()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    value = loss(a, b)
    torch.testing.assert_close(loss(7 * a, 0.1 * b), value)
    torch.testing.assert_close(loss(a[order], b[order]), value)
    assert abs(loss(a[order], b) - value) > 1e-3  # the pairs do matter


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("count", [2, 6])
def test_nt_xent_is_the_published_formula_in_value_and_gradient(temperature, count):
    a, b = vectors(count)
    loss = simclr(a, b, temperature)
    # The logits are of single precision whatever comes in, as under autocast.
    assert loss.item() == pytest.approx(simclr_formula(a, b, temperature), rel=1e-6)
    theirs = NTXentLoss(temperature)(a, b)
    torch.testing.assert_close(loss, theirs, check_dtype=False, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads(loss, a, b), grads(theirs, a, b), rtol=1e-5, atol=1e-6)


def test_nt_xent_swaps_its_views_freely():
    a, b = vectors()
    torch.testing.assert_close(simclr(a, b), simclr(b, a))


def test_nt_xent_of_ranks_averages_to_that_of_the_whole_batch():
    a, b = (F.normalize(v.detach(), dim=1) for v in vectors())
    parts = [nt_xent(a[i : i + 2], b[i : i + 2], a, b, i, 0.2) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), nt_xent(a, b, a, b, 0, 0.2))
    assert len({part.item() for part in parts}) == 3


def test_nt_xent_of_ranks_has_the_gradient_of_the_whole_batch():
    a, b = vectors()
    whole = grads(simclr(a, b), a, b)
    unit_a, unit_b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    parts = [nt_xent(unit_a[i : i + 3], unit_b[i : i + 3], unit_a, unit_b, i, 0.2) for i in (0, 3)]
    torch.testing.assert_close(grads(sum(parts) / 2, a, b), whole, rtol=1e-5, atol=1e-7)


def test_nt_xent_stays_finite_at_a_tiny_temperature():
    a, b = vectors()
    loss = simclr(a.float(), b.float(), 1e-3)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(grad).all() for grad in grads(loss, a, b))
