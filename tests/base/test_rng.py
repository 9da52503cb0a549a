"""Random draws as a function of their keys and positions."""

import numpy as np
import pytest
import torch
from scipy import stats

from rotssl.base import rng


def test_the_generator_is_splitmix64():
    # First outputs for seed 0 of the reference implementation (prng.di.unimi.it/splitmix64.c).
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert rng.bits(0, np.arange(3), 1)[:, 0].tolist() == expected
    assert rng.bits(0, np.arange(1), 3)[0].tolist() == expected


def test_any_key_and_position_agrees_with_splitmix64_written_out():
    mask, key = 2**64 - 1, 0xDEADBEEFCAFEF00D
    for n in (0, 1, 77, 2**40):
        z = (key + (n + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
        assert rng.bits(key, np.array([n]), 1).item() == z
        assert rng.uniform(key, np.array([n]), 1).item() == (z >> 11) / 2**53


@pytest.mark.parametrize("draw", [rng.bits, rng.uniform])
@pytest.mark.parametrize("draws", [1, 5])
def test_a_draw_depends_on_its_position_alone(draw, draws):
    whole = draw(rng.key(3, 1, "crop"), np.arange(64), draws)
    assert whole.shape == (64, draws)
    for ranks in (2, 4):
        parts = [draw(rng.key(3, 1, "crop"), part, draws) for part in np.split(np.arange(64), ranks)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    odd = np.array([63, 5, 5, 0])
    np.testing.assert_array_equal(draw(rng.key(3, 1, "crop"), odd, draws), whole[odd])


def test_keys_tell_seed_epoch_and_purpose_apart():
    parts = [(seed, epoch, purpose) for seed in (0, 1, 11) for epoch in (0, 1, 11) for purpose in ("crop", "flip")]
    keys = [rng.key(*part) for part in parts]
    assert len(set(keys)) == len(parts)
    assert keys == [rng.key(*part) for part in parts]
    assert all(0 <= key < 2**64 for key in keys)
    # Fixed for good: another value here means that no earlier run can be repeated.
    assert rng.key(0, 0, "order") == 0xC15B26E64667D632


def test_uniform_numbers_are_uniform_and_independent():
    x = rng.uniform(rng.key("uniform"), np.arange(20000), 4)
    assert np.unique(x).size == x.size  # a position shares no draw with another
    assert x.min() >= 0
    assert x.max() < 1
    for column in x.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    # Between draws of a position, between neighbouring positions, between epochs, between seeds: 20,000 pairs each.
    assert np.abs(np.corrcoef(x.T) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(x[:-1, 0], x[1:, 0])[0, 1]) < 0.03
    for first, second in (((0, 0, "crop"), (0, 1, "crop")), ((0, 0, "crop"), (1, 0, "crop"))):
        a, b = (rng.uniform(rng.key(*parts), np.arange(20000), 1)[:, 0] for parts in (first, second))
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.03


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_a_permutation_holds_everything_once(size):
    assert sorted(rng.permutation(rng.key(0, 0, "order"), size)) == list(range(size))


def test_permutations_differ_by_epoch_and_seed_and_repeat_exactly():
    orders = {
        (seed, epoch): rng.permutation(rng.key(seed, epoch, "order"), 1000) for seed in (0, 1) for epoch in (0, 1)
    }
    for (name, order), (other, second) in ((a, b) for a in orders.items() for b in orders.items()):
        # Two unrelated orders of 1,000 agree in one place on average.
        assert (order == second).sum() == 1000 if name == other else (order == second).sum() < 10
    np.testing.assert_array_equal(orders[0, 1], rng.permutation(rng.key(0, 1, "order"), 1000))


def test_every_place_of_a_permutation_is_uniform():
    firsts = np.array([rng.permutation(rng.key(seed, "order"), 5)[[0, 4]] for seed in range(2000)])
    for column in firsts.T:
        assert stats.chisquare(np.bincount(column, minlength=5)).pvalue > 1e-3


def test_seeded_draws_the_same_and_leaves_the_global_generator_untouched():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with rng.seeded(0, "encoder"):
        first = torch.rand(4)
    with rng.seeded(0, "method"):
        other = torch.rand(4)
    assert torch.equal(torch.rand(3), expected)
    with rng.seeded(0, "encoder"):
        assert torch.equal(torch.rand(4), first)
    assert not torch.equal(first, other)


def test_seeded_puts_the_generator_back_after_an_error():
    before = torch.random.get_rng_state()
    with pytest.raises(KeyError), rng.seeded(0, "encoder"):
        torch.rand(4)
        raise KeyError
    assert torch.equal(torch.random.get_rng_state(), before)
