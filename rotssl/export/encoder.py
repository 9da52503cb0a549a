"""The encoder that a user gets: a network with what one needs to give it pictures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from rotssl.base.precision import exact_float32
from rotssl.data.decoding import MARGIN, NATIVE_LIMIT, fit
from rotssl.data.images import shades
from rotssl.data.reading import upright


class Encoder(nn.Module):
    """A pretrained encoder, in evaluation mode.

    Args:
        network: (B, 3, S, S) -> (B, D).
        dim: D.
        about: what ``encoder.json`` says of it.

    Attributes:
        network: the encoder itself, for example to fine-tune it.
        dim: dimension D of the features.
        image_size: side S of its images in pixels.
        mean: of each channel of the images in [0, 1], or one value for pictures in shades of grey.
        std: their standard deviation, likewise.
        about: what is known of it.
    """

    def __init__(self, network: nn.Module, dim: int, about: Mapping[str, Any]) -> None:
        super().__init__()
        self.network, self.dim, self.about = network, dim, dict(about)
        self.image_size = int(about.get("image_size", 224))
        self.mean: tuple[float, ...] = tuple(about.get("mean", (0.485, 0.456, 0.406)))
        self.std: tuple[float, ...] = tuple(about.get("std", (0.229, 0.224, 0.225)))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D) of images (B, 3, S, S) in [0, 1], normalised by ``mean`` and ``std``, as ``transform`` makes them."""
        return self.network(images)  # type: ignore[no-any-return]

    def transform(self, picture: Image.Image) -> Tensor:
        """An image (3, S, S) from a picture of Pillow, as in the run's evaluation: whole or its centre, in size, normalised.

        Raises:
            DataError: the range of its shades is unknown.
        """
        rgb = upright(picture)[0]
        size = (rgb.height, rgb.width)
        pixels = np.asarray(rgb).transpose(2, 0, 1) if self._as_stored(size) else fit(rgb, self._side())
        if len(self.mean) == 1:
            pixels = shades(pixels)
        x = torch.from_numpy(np.array(pixels))[None].float() / 255
        if x.shape[2:] != (self.image_size, self.image_size):
            x = F.interpolate(x, (self.image_size, self.image_size), mode="bilinear", antialias=True)
        mean, std = torch.tensor([self.mean, self.std], dtype=torch.float32).view(2, 1, -1, 1, 1)
        normal: Tensor = (x - mean) / std
        return normal[0].expand(3, -1, -1)

    def _side(self) -> int:
        """Side to which pictures of another size than the run's are fitted."""
        stored = self.about.get("stored")
        return min(stored) if stored else math.ceil(MARGIN * self.image_size)

    def _as_stored(self, size: tuple[int, int]) -> bool:
        """Whether a picture of this height and width was taken whole in the run's evaluation."""
        stored = self.about.get("stored")
        # Runs of earlier versions do not say: they took small pictures whole if all had one size.
        return tuple(stored) == size if stored else size[0] == size[1] <= NATIVE_LIMIT

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image], batch: int = 64) -> Tensor:
        """Features (N, D) of N pictures of Pillow, in float32, also on a GPU.

        Args:
            pictures: of any size.
            batch: pictures per forward pass.
        """
        device = next(self.parameters()).device
        with exact_float32():
            parts = [
                self(torch.stack([self.transform(each) for each in pictures[i : i + batch]]).to(device))
                for i in range(0, len(pictures), batch)
            ]
        return torch.cat(parts) if parts else torch.empty(0, self.dim)
