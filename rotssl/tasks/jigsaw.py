"""Jigsaw puzzles: Noroozi and Favaro 2016 (arXiv 1603.09246)."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rotssl.base import distributed, rng
from rotssl.base.precision import full_precision
from rotssl.base.rng import Positions
from rotssl.base.sending import send
from rotssl.base.step import StepContext, StepOutput
from rotssl.config.tasks import JigsawConfig
from rotssl.models.heads import mlp
from rotssl.tasks.base import Targets, Task
from rotssl.tasks.permutations import permutation_set

# Pixels have a standard deviation of about 1 over a data set. A tile below this one, less than a gray level in 256, is flat: it
# contains only rounding errors of the augmentation, which normalisation would amplify.
FLAT = 0.01


def cut(images: Tensor, tops: Tensor, lefts: Tensor, side: int) -> Tensor:
    """Square tiles of each image, without a host synchronisation.

    Args:
        images: (B, C, S, S).
        tops: first row of the tile at each of P places, (P, B) int64.
        lefts: likewise the first column.
        side: side of the tiles in pixels.

    Returns:
        (P x B, C, side, side), first all images' tiles at the first place; in the memory layout of the images.
    """
    steps = torch.arange(side, device=images.device)
    rows = tops[:, :, None, None] + steps[:, None]
    columns = lefts[:, :, None, None] + steps
    image = torch.arange(len(images), device=images.device)[:, None, None]
    tiles = images.permute(0, 2, 3, 1)[image, rows, columns].flatten(0, 1).permute(0, 3, 1, 2)
    channels_last = images.is_contiguous(memory_format=torch.channels_last)
    return tiles.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def normalize(tiles: Tensor) -> Tensor:
    """Each channel of each tile (N, C, side, side) normalised to mean 0 and standard deviation 1 (less for flat tiles).

    Brightness and contrast vary smoothly over an image and would reveal neighbours (section 4.2 of the paper).
    """
    var, mean = torch.var_mean(tiles, dim=(2, 3), correction=0, keepdim=True)
    return (tiles - mean) / var.sqrt().clamp(min=FLAT)


class Jigsaw(Task):
    """Classification of the order of the shuffled tiles of the first view; see the section ``jigsaw`` of the configuration.

    The encoder sees one tile at a time. The head sees the concatenated features of all tiles of an image, in their order:
    Linear(grid^2 D, hidden), BN, ReLU, Linear(hidden, permutations).
    """

    config: JigsawConfig

    def __init__(self, config: JigsawConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.places = config.grid**2
        self.orders = permutation_set(self.places, config.permutations)
        self.head = mlp([self.places * dim, config.hidden_dim, config.permutations])
        self.update_bn = config.update_bn

    def layout(self, side: int, ctx: StepContext) -> tuple[Positions, Positions, int]:
        """The order and the positions of the tiles: a function of (seed, epoch, position).

        Args:
            side: side of the images in pixels.
            ctx: context of the step.

        Returns:
            The index of the order, (B,); the first row and column of the tile at each place, (B, P, 2); the side of the tiles.
        """
        grid = self.config.grid
        cell, tile = side // grid, self.config.tile_side(side)
        draws = [
            rng.uniform(rng.key(ctx.seed, ctx.epoch, "jigsaw", purpose), ctx.positions, count)
            for purpose, count in (("order", 1), ("offset", 2 * self.places))
        ]
        labels = np.floor(len(self.orders) * draws[0][:, 0]).astype(np.int64)
        offsets = np.floor((cell - tile + 1) * draws[1]).astype(np.int64).reshape(-1, self.places, 2)
        cells = self.orders[labels]
        return labels, np.stack([cells // grid, cells % grid], axis=2) * cell + offsets, tile

    def transform(self, views: list[Tensor], ctx: StepContext) -> tuple[list[Tensor], Targets]:
        """The shuffled tiles of the first view, (grid^2 B, 3, t, t), first all images' tiles at the first place."""
        images = views[0]
        labels, corners, tile = self.layout(images.shape[-1], ctx)
        tops, lefts = send(images.device, corners.transpose(2, 1, 0).copy())
        tiles = normalize(cut(images, tops, lefts, tile))
        return [tiles], Targets([send(images.device, labels)], None, ctx.batch_size, ctx.passes)

    def loss(self, features: list[Tensor], targets: Targets) -> StepOutput:
        """Cross-entropy averaged over the images of all workers, from the tiles' features (grid^2 B, D); logs the accuracy."""
        (labels,) = targets.labels
        side_by_side = features[0].unflatten(0, (self.places, len(labels))).transpose(0, 1).flatten(1)
        logits = full_precision(self.head(side_by_side))
        # DDP averages over workers: world x local sum / global count is then the mean over the global batch.
        share = distributed.world_size() * targets.passes / max(1, targets.count)
        correct = (logits.detach().argmax(1) == labels).sum() * share
        return StepOutput(F.cross_entropy(logits, labels, reduction="sum") * share, {"accuracy": correct})
