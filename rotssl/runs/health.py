"""What shows in its points that a run learns nothing any more: collapsed features, or losses that diverged."""

import itertools

from rotssl.runs.journal import Points

COLLAPSED = 0.1  # feature/std below it: evenly spread features have 1, a single direction has 0
A_LINE = 2.0  # feature/effective_rank below it
FALL = 3  # a measure that fell so many epochs in a row, to less than one in FALL of its highest value
DIVERGED = (
    20  # diverged if a loss is so many times that of the first epoch, and more than this; cross-entropies can't be
)
_SHOW = {"feature/std": COLLAPSED, "feature/effective_rank": A_LINE}


def collapsed(points: Points) -> str | None:
    """Why a run counts as collapsed at its last epoch, or None if it does not or the metrics are missing.

    It has collapsed if the spread of the projections or the effective rank of the features is close to nothing, or on its way
    there.
    """
    epoch = max(points, default=0)
    for key, limit in _SHOW.items():
        measured = [points[e][key] for e in sorted(points) if key in points[e]]
        if not measured or key not in points[epoch]:
            continue
        value, highest = measured[-1], max(measured)
        if not value >= limit:  # nor is NaN
            return f"collapsed: {key} {value:.3g} at epoch {epoch}, below {limit:g}"
        recent = measured[-FALL - 1 :]
        falls = len(recent) > FALL and all(a > b for a, b in itertools.pairwise(recent))
        if falls and value < highest / FALL:
            return f"collapsed: {key} fell to {value:.3g} at epoch {epoch}, from {highest:.3g}"
    return None


def diverged(points: Points) -> str | None:
    """Why a run counts as diverged at its last epoch, or None: a loss far above the first epoch's."""
    first, epoch = points.get(1, {}), max(points, default=0)
    for key, loss in points.get(epoch, {}).items():
        if key.startswith("loss/") and key in first and loss > DIVERGED * max(1.0, abs(first[key])):
            return f"diverged: {key} {loss:.3g} at epoch {epoch}, {first[key]:.3g} at epoch 1"
    return None


def ill(points: Points) -> str:
    """Why a run learned nothing at its last epoch, or an empty text."""
    return "; ".join(filter(None, (collapsed(points), diverged(points))))
