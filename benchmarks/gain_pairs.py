"""Runs of a form and of plain by the seeds that both have, for gain_report.py."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from gain_cells import hits_of
from gain_plan import Content, Results, Row, last
from gain_stats import Difference, bootstrap, t_difference
from numpy.typing import NDArray


def runs_of(row: Row, results: Results) -> list[Content]:
    """The runs of a row that are there."""
    return [content for content in map(results.read, row.cells) if content is not None]


class Pairs:
    """Runs of a form and of plain, by seeds that both have.

    Args:
        row: the form.
        plain: plain.
        metric: of the accuracies.
        results: the runs.
    """

    def __init__(self, row: Row, plain: Row, metric: str, results: Results) -> None:
        ours, theirs = ({c["seed"]: c for c in runs_of(each, results)} for each in (row, plain))
        pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs and not theirs[seed]["error"]]
        self.ours, self.theirs = ([last(pair[side])[metric] for pair in pairs] for side in (0, 1))
        self.gains: NDArray[Any] | None = None  # (seeds, images)
        if pairs and all(metric in content["hits"] for pair in pairs for content in pair):
            hits = [[hits_of(pair[side], metric).astype(np.int8) for pair in pairs] for side in (0, 1)]
            for scores, found in zip((self.ours, self.theirs), hits, strict=True):
                assert np.allclose(scores, [row.mean() for row in found], atol=1e-9), f"hits are not those of {metric}"
            self.gains = np.stack(hits[0]) - np.stack(hits[1])


def differences(several: Sequence[Pairs]) -> tuple[Difference, Difference | None]:
    """The mean gain of several methods over seeds, and over seeds and images if there are hits."""
    ours, theirs = (np.mean(side, axis=0).tolist() for side in zip(*((p.ours, p.theirs) for p in several), strict=True))
    gains = mean_gains(several)
    return t_difference(ours, theirs), None if gains is None else bootstrap(gains)


def mean_gains(several: Sequence[Pairs]) -> NDArray[Any] | None:
    """(seeds, images): the mean over the methods; None if one has no hits."""
    gains = [pairs.gains for pairs in several if pairs.gains is not None]
    return np.mean(gains, axis=0) if len(gains) == len(several) else None
