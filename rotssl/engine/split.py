"""Views that are cut into tiles, encoded, and combined again: Fast-MoCo, Ci et al. 2022 (arXiv 2207.08220).

Encoding the tiles of a view costs about as much as encoding the view, and yields several inputs of the projector instead of one.
"""

from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from rotssl.base.step import StepContext, StepOutput
from rotssl.methods.base import Method


class Split:
    """What is done before and after encoding; with one tile, everything passes unchanged.

    A view becomes side x side tiles. The features of each pair of its tiles are averaged: a combination of the view, of which
    there are 6 with 4 tiles. The method compares combinations of the same places in different views.

    Args:
        side: number of tiles along a side of a view, 1 or 2.
    """

    def __init__(self, side: int) -> None:
        self.side, self.tiles = side, side**2
        self.pairs = list(combinations(range(self.tiles), 2))

    def cut(self, view: Tensor) -> Tensor:
        """The tiles of a view (B, C, S, S), row by row, in blocks of B: (tiles x B, C, S / side, S / side)."""
        if self.tiles == 1:
            return view
        return torch.cat([tile for band in view.chunk(self.side, 2) for tile in band.chunk(self.side, 3)])

    def mean(self, features: Tensor) -> Tensor:
        """The mean features of each image's tiles, (tiles x B, D) -> (B, D)."""
        return features if self.tiles == 1 else features.unflatten(0, (self.tiles, -1)).mean(0)

    def combine(self, features: list[Tensor], count: int) -> list[Tensor]:
        """The combinations of each of the first ``count`` views, (B, D) each, and the other views as they are.

        Args:
            features: of the tiles of views that were cut, (tiles x B, D), and of other views.
            count: number of views that were cut.
        """
        if self.tiles == 1:
            return features
        blocks = [view.chunk(self.tiles) for view in features[:count]]
        return [(tiles[i] + tiles[j]) / 2 for tiles in blocks for i, j in self.pairs] + features[count:]

    def loss(
        self, method: Method, z: list[Tensor], z_teacher: list[Tensor] | None, ctx: StepContext, count: int
    ) -> StepOutput:
        """The method's loss and logs, averaged over the combinations.

        Args:
            method: the pretraining method.
            z: projections of the student, in the order of ``combine``.
            z_teacher: projections of the teacher, of whole views, or None without a teacher.
            ctx: context of the step.
            count: number of views that were cut.
        """
        if self.tiles == 1:
            return method.loss(z, z_teacher, ctx)
        each = len(self.pairs)
        outs = [
            method.loss(z[c : each * count : each] + z[each * count :], z_teacher, replace(ctx, repeat=c > 0))
            for c in range(each)
        ]
        logs = {key: torch.stack([out.logs[key] for out in outs]).mean() for key in outs[0].logs}
        return StepOutput(torch.stack([out.loss for out in outs]).mean(), logs)
