"""Which variants can be ranked, and how they stand: over the seeds that all of them have.

Where weak runs are stopped early or lost, a variant's mean over what is left of it says more of these seeds than of the variant.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranking:
    """Variants by their mean over shared seeds.

    Attributes:
        order: those that are ranked, the best first.
        means: of each, over the shared seeds.
        seeds: that all of them have.
        unranked: the others and the number of their seeds.
        total: number of seeds that any variant has.
    """

    order: tuple[str, ...]
    means: tuple[float, ...]
    seeds: tuple[int, ...]
    unranked: tuple[tuple[str, int], ...]
    total: int


def rank(finals: Mapping[str, Mapping[int, float]], baselines: Collection[str]) -> Ranking:
    """Rank the baselines and the best covered of the other variants.

    If no seed is shared, those with the fewest seeds, and of them the lowest, are dropped until one is.

    Args:
        finals: variant -> seed -> final value, the larger, the better; of equals that which stands first is taken.
        baselines: variants that are ranked whatever they cover.
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
