"""The output of an intermediate stage of an encoder, beside its features, in one forward pass."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from rotssl.config.fields import ConfigError
from rotssl.models.encoders import SmallResNet


def stage(encoder: nn.Module, name: str) -> tuple[nn.Module, int]:
    """The last stage but one of an encoder (in vision transformers the block at three quarters), and its number of channels.

    Args:
        encoder: as built by ``build_encoder``.
        name: its name, for the message.

    Raises:
        ConfigError: the encoder has no known stages.
    """
    if isinstance(encoder, SmallResNet):
        return encoder.blocks[1], 2 * encoder.width
    if isinstance(encoder, ResNet):
        return encoder.layer3, encoder.layer4[0].conv1.in_channels
    known = getattr(encoder, "feature_info", None) or []  # timm's
    if len(known) < 2:
        raise ConfigError(
            f"rotation.head_on: got stage, expected encoder or projector: {name} does not name its stages"
        )
    chosen = known[math.ceil(0.75 * len(known)) - 1]
    return encoder.get_submodule(chosen["module"]), chosen["num_chs"]


def pooled(x: Tensor) -> Tensor:
    """The mean over all places of a map (B, C, H, W), or of all tokens (B, N, C): (B, C)."""
    return x.mean((2, 3)) if x.dim() == 4 else x.mean(1)


class Tap:
    """An encoder that appends to its features the mean of one of its stages, while that stage is watched.

    Args:
        encoder: (B, 3, S, S) -> (B, D).
        layer: the stage, a submodule of the encoder.
        channels: of the stage.
        fork: called with the output of the stage; returns what the next stage gets and what is averaged. Both are equal to it.
    """

    def __init__(
        self, encoder: nn.Module, layer: nn.Module, channels: int, fork: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> None:
        self.encoder, self.channels, self.fork = encoder, channels, fork
        self.open = False
        self.seen: list[Tensor] = []
        layer.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        if not self.open:
            return None
        onward, own = self.fork(out)
        self.seen.append(own)
        return onward

    def __call__(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, D + C)."""
        self.open = True
        try:
            return torch.cat([self.encoder(x), pooled(self.seen[-1])], 1)
        finally:
            self.open = False
            self.seen.clear()

    def split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """What ``__call__`` returned, in its parts: features (B, D) and the mean of the stage (B, C)."""
        features, mean = y.split([y.shape[1] - self.channels, self.channels], 1)
        return features, mean
