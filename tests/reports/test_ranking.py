"""The order of variants over the seeds that they share."""

import random

import pytest

from rotssl.reports.ranking import rank


@pytest.mark.parametrize("seed", range(6))
def test_the_ranking_depends_on_values_alone_and_no_lead_is_negative(seed):
    gen = random.Random(seed)
    for _ in range(40):
        finals = {
            name: {s: gen.random() for s in range(5) if gen.random() < 0.7} for name in ("plain", "a", "b", "c", "d")
        }
        if not any(finals.values()):
            continue
        found = rank(finals, ["plain"])
        assert found.seeds and all(set(found.seeds) <= set(finals[name]) for name in found.order)
        assert list(found.means) == sorted(found.means, reverse=True)
        assert set(found.order) | {name for name, _ in found.unranked} == set(finals)
        names, swapped = list(finals), dict(zip(range(5), gen.sample(range(5), 5), strict=True))
        gen.shuffle(names)
        other = rank(
            {name: {swapped[s]: value for s, value in reversed(finals[name].items())} for name in names}, ["plain"]
        )
        assert (other.order, other.means, other.total) == (found.order, found.means, found.total)
        assert set(other.unranked) == set(found.unranked)
        assert set(other.seeds) == {swapped[s] for s in found.seeds}
        for better, worse in zip(found.order, found.order[1:], strict=False):
            assert sum(finals[better][s] - finals[worse][s] for s in found.seeds) > 0


def test_of_variants_without_a_common_seed_the_least_covered_and_then_the_lowest_go():
    found = rank({"plain": {0: 0.5}, "a": {1: 0.5, 2: 0.5}, "b": {2: 0.9, 3: 0.9}, "c": {1: 0.9}}, ["plain"])
    assert (found.order, found.seeds) == (("b", "a"), (2,))
    assert found.unranked == (("plain", 1), ("c", 1)) and found.total == 4
    assert rank({"plain": {}, "a": {0: 0.5}, "b": {1: 0.5}}, ["plain"]).order == ("a",)
