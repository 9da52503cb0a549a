"""Pictures and the steps that they are seen in, for the tests of views."""

import numpy as np
import torch

from rotssl.base.step import StepContext

POSITIONS = np.arange(12)


def pictures(count=12, channels=3, height=28, width=28, seed=0):
    """Smooth, so that a shift by a part of a pixel shows, with noise on top; uint8."""
    gen = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 5, 5, generator=gen)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (255 * (smooth + 0.1 * torch.rand(smooth.shape, generator=gen)).clamp(0, 1)).byte()


def step_at(progress=0.0, epoch=0, positions=POSITIONS):
    return StepContext(0, epoch, 0, progress, positions, 0, len(positions))
