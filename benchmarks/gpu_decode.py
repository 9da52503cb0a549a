"""Where are large JPEGs decoded: on the processors, or by the GPU's own decoder (nvJPEG)?"""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made_up
import numpy as np
import torch
from gpu_cell import Cell
from gpu_speed import Rate, in_turn
from packed_sets import opened, pack
from torch.nn import functional as F

from rotssl.base import rng
from rotssl.data.loader import AHEAD, Loader, prefetch
from rotssl.data.packed_images import _untagged

CLASSES = 4


class Here:
    """The loader: pictures are decoded and cropped on the processors, and the crops copied to the device.

    Args:
        cell: for the device.
        folder: of the packed set.
    """

    def __init__(self, cell: Cell, folder: Path) -> None:
        self.device = cell.device
        config, splits, self.augment = opened(folder)
        self.images, self.seed = splits.train.images, config.train.seed
        self.loader = Loader(config, self.images, self.device, augment=self.augment)

    def run(self, steps: int) -> None:
        """Take so many batches."""
        epochs = (self.loader.batches(epoch) for epoch in itertools.count())
        for _ in itertools.islice(itertools.chain.from_iterable(epochs), steps):
            continue


class There(Here):
    """nvJPEG: the files are copied to the device, which decodes and crops them on a stream of its own."""

    def run(self, steps: int) -> None:
        """Take so many batches."""
        each = self.loader.config.train.batch_size
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        order = rng.permutation(rng.key(self.seed, 0, "order"), len(self.images))

        def make(step: int) -> tuple[torch.Tensor, Any]:
            places = np.arange(each) + each * (step % self.loader.steps_per_epoch)
            with torch.cuda.stream(stream):
                made = self.batch(order[places], self.loader._context(0, step, places))
                return made, None if stream is None else stream.record_event()

        for made, event in prefetch(make, steps, AHEAD, threads=2):
            if event is not None:
                torch.cuda.current_stream(self.device).wait_event(event)
                made.record_stream(torch.cuda.current_stream(self.device))

    def batch(self, index: Any, ctx: Any) -> torch.Tensor:
        """The crops of a batch, (B, V, 3, S, S) of uint8."""
        from torchcodec.decoders import decode_jpeg

        images, rows = self.images, self.images.rows[index]
        files = [images.shards.read(int(r["shard"]), int(r["offset"]), int(r["length"])) for r in rows]
        pictures = decode_jpeg([_untagged(file) for file in files], device=self.device)
        return torch.stack(list(self.crops(pictures, self.augment.cuts(ctx, *images.sizes(index)))))

    def crops(self, pictures: list[torch.Tensor], cuts: Any) -> Iterator[torch.Tensor]:
        """The views of each picture, (V, 3, S, S)."""
        for i, picture in enumerate(pictures):
            views = []
            for cut in cuts:
                boxes, size = cut.boxes, (cut.size, cut.size)
                top, left = int(boxes.top[i]), int(boxes.left[i])
                part = picture[None, :, top : top + int(boxes.height[i]), left : left + int(boxes.width[i])]
                made = F.interpolate(part.float(), size, mode=self.images.interpolation, antialias=True)[0]
                views.append(made.flip(2) if cut.flipped[i] else made)
            yield torch.stack(views).round_().clamp_(0, 255).to(torch.uint8)


def difference(here: Here, there: There) -> dict[str, float]:
    """How far the pixels of a batch are apart, in 1 / 255."""
    places = np.arange(here.loader.config.train.batch_size)
    ctx = here.loader._context(0, 0, places)
    cut = here.images.cuts(places, here.augment.cuts(ctx, *here.images.sizes(places)))
    theirs = there.batch(places, ctx).permute(0, 1, 3, 4, 2).reshape(len(cut), -1)
    apart = (torch.from_numpy(cut).float() - theirs.cpu().float()).abs()
    return {"mean difference, 1/255": float(apart.mean()), "largest difference, 1/255": float(apart.max())}


def decode(cell: Cell) -> None:
    """Pictures a second from a packed set, decoded here and there; args: images, steps, rounds."""
    os.environ["ROTSSL_DATA"] = str(cell.archive.parent)
    folder = cell.scratch / f"packed-{cell.args['images']}"
    if not folder.exists():
        jpegs = folder.with_name(f"{folder.name}-jpegs")
        made_up.make(jpegs, cell.args["images"], CLASSES, os.cpu_count() or 1)
        pack(jpegs, folder)
    here, there = Here(cell, folder), There(cell, folder)
    cell.tell(**difference(here, there))
    batch = here.loader.config.train.batch_size
    for work in (here, there):
        work.run(3)
        cell.finish()
    made = {"decoded by processors": here.run, "decoded by the device": there.run}
    in_turn(cell, "contenders", made, batch, cell.args["steps"], cell.args["rounds"], Rate())
