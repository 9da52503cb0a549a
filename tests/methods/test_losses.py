"""Every loss against its paper, written out number by number, and against lightly's; in value and gradient."""

import math

import pytest
import torch
from lightly.loss import (
    BarlowTwinsLoss,
    DINOLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    SwaVLoss,
    VICRegLoss,
)
from torch.nn import functional as F

from rotssl.base import distributed
from rotssl.methods.losses import (
    barlow_twins,
    byol_regression,
    dino_cross_entropy,
    info_nce,
    negative_cosine,
    normalize,
    nt_xent,
    sinkhorn,
    swapped_prediction,
    vicreg,
)
from tests.methods.papers import (
    CENTER,
    LAMBDA,
    NEGATIVES,
    WEIGHTS,
    barlow,
    barlow_paper,
    byol_paper,
    dino,
    dino_paper,
    grads,
    moco,
    moco_paper,
    random,
    simclr,
    simclr_paper,
    simsiam_paper,
    sinkhorn_paper,
    swav,
    swav_of_two,
    swav_paper,
    unit,
    variance_covariance,
    vectors,
    vicreg_code,
    vicreg_paper,
)


def moco_lightly(a, b):
    loss = NTXentLoss(0.2, memory_bank_size=(len(NEGATIVES), 5))
    loss.memory_bank.bank = NEGATIVES.clone()
    return loss(a, b.detach())


def dino_lightly(a, b):
    """Its diagonal (the same view on both sides) is left out, so that each view stands beside an empty other one."""
    loss = DINOLoss(5, teacher_temp=0.25, student_temp=0.5)
    loss.center = CENTER.view(1, 1, -1)
    return loss([b.detach()], [torch.zeros_like(a), a])


LOSSES = {
    "byol": (byol_regression, byol_paper, lambda a, b: 2 + 2 * NegativeCosineSimilarity()(a, b.detach())),
    "simsiam": (negative_cosine, simsiam_paper, lambda a, b: NegativeCosineSimilarity()(a, b.detach())),
    "simclr": (simclr, simclr_paper, NTXentLoss(0.2)),
    "mocov2": (moco, moco_paper, moco_lightly),
    "swav": (swav_of_two, swav_paper, lambda a, b: SwaVLoss()([a.tanh(), b.tanh()], [])[0]),
    "barlow": (barlow, barlow_paper, BarlowTwinsLoss(LAMBDA)),
    "vicreg": (variance_covariance, vicreg_code, VICRegLoss(*WEIGHTS)),
    "dino": (dino, dino_paper, dino_lightly),
}


every = pytest.mark.parametrize("name", LOSSES)


@every
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("reference", ["paper", "lightly"])
def test_each_loss_is_the_published_one_in_value_and_gradient(name, seed, reference):
    ours, paper, lightly = LOSSES[name]
    a, b = vectors(seed=seed)
    loss, theirs = ours(a, b), (paper if reference == "paper" else lightly)(a, b)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, theirs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grads(loss, a, b), grads(theirs, a, b), rtol=1e-8, atol=1e-10)


@every
def test_pairs_matter_and_the_order_of_the_batch_does_not(name):
    loss, (a, b), order = LOSSES[name][0], vectors(), torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(loss(a[order], b[order]), loss(a, b))
    assert abs(loss(a[order], b) - loss(a, b)) > 1e-3


@pytest.mark.parametrize("name", ["byol", "simsiam", "simclr", "mocov2"])
def test_lengths_are_ignored(name):
    loss, (a, b) = LOSSES[name][0], vectors()
    torch.testing.assert_close(loss(7 * a, 0.1 * b), loss(a, b))


@pytest.mark.parametrize("name", ["byol", "simsiam", "mocov2", "dino"])
def test_no_gradient_reaches_the_target(name):
    a, b = vectors()
    LOSSES[name][0](a, b).backward()
    assert b.grad is None
    assert a.grad.abs().sum() > 0


HALF = {
    "byol": byol_regression,
    "simsiam": negative_cosine,
    "simclr": lambda a, b: nt_xent(a, b, a, b, 0, 0.2),
    "mocov2": lambda a, b: info_nce(a, b, NEGATIVES.to(a.dtype), 0.2),
    "sinkhorn": lambda a, b: sinkhorn(a.clamp(-1, 1), 0.05, 3),
    "swav": lambda a, b: swapped_prediction(a.clamp(-1, 1), sinkhorn(b.clamp(-1, 1), 0.05, 3), 0.1),
    "barlow": barlow,
    "vicreg": variance_covariance,
    "dino": lambda a, b: dino_cross_entropy(a, b, CENTER.to(torch.promote_types(a.dtype, torch.float32)), 0.3, 0.2),
}


@pytest.mark.parametrize("name", HALF)
def test_half_precision_is_widened_before_anything_is_computed(name):
    a, b = (view.detach().bfloat16() for view in vectors())
    loss = HALF[name](a, b)
    assert loss.dtype == torch.float32
    exact = HALF[name](a.double(), b.double())
    if name == "mocov2":  # its negatives were rounded as well
        exact = info_nce(a.double(), b.double(), NEGATIVES.bfloat16().double(), 0.2)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)


# --- one by one ---------------------------------------------------------------------------------------------------------


def test_byol_is_zero_for_equal_directions_and_four_for_opposite_ones():
    p, _ = vectors()
    assert byol_regression(p, 3 * p).item() == pytest.approx(0, abs=1e-12)
    assert byol_regression(p, -p).item() == pytest.approx(4)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("count", [2, 6])
def test_nt_xent_at_other_temperatures_and_counts(temperature, count):
    a, b = vectors(count)
    torch.testing.assert_close(simclr(a, b, temperature), simclr_paper(a, b, temperature))
    torch.testing.assert_close(simclr(a, b, temperature), simclr(b, a, temperature))


def test_nt_xent_of_ranks_averages_to_that_of_the_whole_batch_in_value_and_gradient():
    a, b = vectors()
    whole = simclr(a, b)
    unit_a, unit_b = unit(a, b)
    parts = [nt_xent(unit_a[i : i + 2], unit_b[i : i + 2], unit_a, unit_b, i, 0.2) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts) / 3, whole)
    torch.testing.assert_close(grads(sum(parts) / 3, a, b), grads(whole, a, b))
    assert len({part.item() for part in parts}) == 3


def test_nt_xent_stays_finite_at_a_tiny_temperature():
    a, b = vectors()
    loss = simclr(a.float(), b.float(), 1e-3)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(grad).all() for grad in grads(loss, a, b))


def test_swav_with_local_views_and_a_queue_is_lightly_s():
    scores = [view.requires_grad_() for view in random(5, 6, 4).tanh()]
    queue = list(random(2, 9, 4, seed=5).tanh())
    loss, (theirs,) = swav(*scores, queue=queue), SwaVLoss()(scores[:2], scores[2:], queue)
    torch.testing.assert_close(loss, theirs)
    torch.testing.assert_close(grads(loss, *scores), grads(theirs, *scores))
    assert abs(loss - swav(*scores)) > 1e-2  # the queue does matter
    assert abs(loss - swav(*scores[:3], queue=queue)) > 1e-2  # and so do local views


@pytest.mark.parametrize("epsilon", [0.05, 0.5])
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_is_the_paper_s(epsilon, iterations):
    scores = random(8, 5).tanh()
    code = sinkhorn(scores, epsilon, iterations)
    torch.testing.assert_close(code, sinkhorn_paper(scores, epsilon, iterations))
    torch.testing.assert_close(code.sum(1), torch.ones(8, dtype=torch.float64))


def test_codes_use_all_prototypes_alike_after_many_iterations():
    scores = random(12, 4).tanh() * 0.3 + torch.tensor([0.5, 0.0, 0.0, -0.5])  # all samples like the first
    few, many = (sinkhorn(scores, 0.1, iterations).sum(0) for iterations in (1, 200))
    torch.testing.assert_close(many, torch.full((4,), 3.0, dtype=torch.float64))
    assert (few - 3).abs().max() > 0.05


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_codes_are_finite_at_the_smallest_epsilon(kind):
    # Opposite directions on purpose: exp(-2 / 0.003) is 1e-290.
    scores = F.normalize(random(16, 3), dim=1) @ torch.cat([torch.eye(3), -torch.eye(3)]).double().T
    scores[0], scores[1] = 1.0, -1.0
    code = sinkhorn(scores.to(kind), 0.003, 3)
    torch.testing.assert_close(code.sum(1), torch.ones(16))
    assert code.max() > 0.99


def test_swapped_prediction_is_ln_k_for_a_uniform_prediction():
    code = sinkhorn(random(6, 7).tanh(), 0.05, 3)
    assert swapped_prediction(torch.full((6, 7), 0.3), code, 0.1).item() == pytest.approx(math.log(7))


def decorrelated():
    """Eight samples of seven outputs with mean 0, variance 1 (biased) and no correlation: a Hadamard matrix's columns."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    return torch.kron(two, torch.kron(two, two))[:, 1:]


def test_barlow_twins_of_known_correlations():
    x, diagonal = decorrelated(), 7
    assert barlow(x, x).item() == pytest.approx(0, abs=1e-8)
    assert barlow(x, 5 * x + 3).item() == pytest.approx(0, abs=1e-8)
    assert barlow(x, -x).item() == pytest.approx(4 * diagonal, rel=1e-4)
    assert barlow(x, x.roll(1, 1)).item() == pytest.approx(diagonal * (1 + LAMBDA), rel=1e-4)
    assert barlow(x[:, :1].repeat(1, 7), x[:, :1].repeat(1, 7)).item() == pytest.approx(LAMBDA * 42, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: x, 0),
        (lambda x: 3 * x, 0),  # only too small a deviation costs
        (lambda x: x * 0.5, WEIGHTS[1] * (1 - math.sqrt(0.25 * 8 / 7 + 1e-4))),
        (lambda x: x * 0, WEIGHTS[1] * 0.99),
        (lambda x: x[:, :1].repeat(1, 7), WEIGHTS[2] * 2 * 6 * (8 / 7) ** 2),  # the same output seven times
    ],
)
def test_vicreg_of_known_covariances(change, expected):
    x = change(decorrelated())
    assert variance_covariance(x, x).item() == pytest.approx(expected, abs=1e-9)


def test_vicreg_s_invariance_is_the_mean_square():
    x = decorrelated()
    assert variance_covariance(x, x + 2).item() == pytest.approx(WEIGHTS[0] * 4)


def test_vicreg_differs_from_the_paper_by_the_two_stated_factors():
    a, b = vectors()
    dim = a.shape[1]
    same = vicreg(a, b, (dim * WEIGHTS[0], 2 * WEIGHTS[1], WEIGHTS[2]))
    torch.testing.assert_close(same, vicreg_paper(a, b, WEIGHTS))
    for without in range(2):
        weights = [value * (without != i) for i, value in enumerate((dim * WEIGHTS[0], 2 * WEIGHTS[1]))]
        assert abs(vicreg(a, b, (*weights, WEIGHTS[2])) - same) > 0.1


# --- several workers ----------------------------------------------------------------------------------------------------


def shares(name, rank, world):
    """The loss of a rank's rows, the gradient of weights that all ranks share, and the codes of its rows."""
    weights = random(5, 5, seed=3).requires_grad_()
    a, b = ((view @ weights)[len(view) // world * rank :][: len(view) // world] for view in random(2, 8, 5, seed=4))
    code = torch.zeros(())
    if name == "barlow":
        loss = barlow_twins(a, b, LAMBDA, distributed.total)
    elif name == "vicreg":
        loss = vicreg(a, b, WEIGHTS, distributed.total)
    else:
        code = sinkhorn(b.detach().tanh(), 0.05, 3, distributed.total)
        loss = swapped_prediction(a.tanh(), code, 0.1)
    # What DDP does with the ranks' gradients:
    return distributed.mean(loss).item(), distributed.mean(*grads(loss, weights)).numpy(), code.numpy()


def share_of_rank(name):
    return shares(name, distributed.rank(), distributed.world_size())


@pytest.mark.parametrize("name", ["barlow", "vicreg", "swav"])
def test_statistics_of_the_global_batch_give_two_workers_the_gradient_of_one(pool, name):
    loss, grad, code = shares(name, 0, 1)
    (first, grad_first, code_first), (second, grad_second, code_second) = pool.run(share_of_rank, name)
    assert first == second == pytest.approx(loss, rel=1e-12)
    for other in (grad_first, grad_second):
        torch.testing.assert_close(torch.from_numpy(other), torch.from_numpy(grad), rtol=1e-9, atol=1e-12)
    if name == "swav":
        codes = torch.cat([torch.from_numpy(code_first), torch.from_numpy(code_second)])
        torch.testing.assert_close(codes, torch.from_numpy(code))


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3)])
def test_rows_of_norm_1_and_their_gradient_are_those_of_torch(shape):
    x = torch.randn(shape, dtype=torch.double)
    x[..., 0, :] = 0
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = torch.randn(shape, dtype=torch.double)
    for rows, made in ((found, normalize(found)), (expected, F.normalize(expected, dim=-1))):
        (made * weights).sum().backward()
        assert torch.isfinite(rows.grad).all()
    torch.testing.assert_close(normalize(found), F.normalize(x, dim=-1))
    torch.testing.assert_close(found.grad, expected.grad)
