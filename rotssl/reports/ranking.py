"""Ranking of variants by their mean over the seeds that all of them have.

If weak runs are stopped early or lost, a variant's mean over its remaining seeds reflects those seeds more than the variant.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranking:
    """Variants by their mean over shared seeds.

    Attributes:
        order: ranked variants, best first.
        means: mean of each over the shared seeds.
        seeds: seeds that all of them have.
        unranked: the other variants, with their numbers of seeds.
        total: number of seeds over all variants.
    """

    order: tuple[str, ...]
    means: tuple[float, ...]
    seeds: tuple[int, ...]
    unranked: tuple[tuple[str, int], ...]
    total: int


def rank(finals: Mapping[str, Mapping[int, float]], baselines: Collection[str]) -> Ranking:
    """Rank the baselines and those of the other variants that have the most seeds.

    If they share no seed, variants are dropped until they do: those with the fewest seeds first, of these the lowest mean first.

    Args:
        finals: variant -> seed -> final value, larger is better; of equal variants the first one ranks higher.
        baselines: variants that are ranked regardless of their number of seeds.
    """
    most = max((len(values) for name, values in finals.items() if name not in baselines), default=0)
    ranked = [name for name, values in finals.items() if values and (name in baselines or len(values) == most)]

    def mean(name: str, seeds: Collection[int]) -> float:
        return math.fsum(finals[name][seed] for seed in seeds) / len(seeds)

    while not (shared := set.intersection(*(set(finals[name]) for name in ranked))):
        ranked.remove(min(reversed(ranked), key=lambda name: (len(finals[name]), mean(name, finals[name].keys()))))
    order = sorted(ranked, key=lambda name: -mean(name, shared))
    return Ranking(
        order=tuple(order),
        means=tuple(mean(name, shared) for name in order),
        seeds=tuple(sorted(shared)),
        unranked=tuple((name, len(values)) for name, values in finals.items() if name not in ranked),
        total=len(set().union(*finals.values())),
    )
