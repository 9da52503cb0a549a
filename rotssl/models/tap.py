"""The output of an intermediate stage of an encoder, beside its features, in one forward pass."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from rotssl.config.fields import ConfigError
from rotssl.models.encoders import SmallResNet

PLACES = ("stem", "stage1", "stage2", "stage")  # of an encoder with four stages, from its input on
MAP = "equivariance.weight: expected 0"


def stage(encoder: nn.Module, name: str, place: str = "stage", refusal: str = "") -> tuple[nn.Module, int]:
    """A place within an encoder, and its number of channels.

    Args:
        encoder: as built by ``build_encoder``.
        name: its name, for the message.
        place: ``stem``, what the first stage gets; ``stage1`` and ``stage2``, the first and the second of four stages; ``stage``,
            the last stage but one. In timm's encoders with more of them, those at one, two and three quarters.
        refusal: the beginning of the message, if it is not about the rotation head.

    Raises:
        ConfigError: the encoder has no such place, or does not name its stages.
    """
    refusal = refusal or f"rotation.head_on: got {place}, expected encoder or projector"
    known = _places(encoder)
    if not known:
        raise ConfigError(f"{refusal}: {name} does not name its stages")
    if place not in known:
        raise ConfigError(f"{refusal}, or {' or '.join(known)}: {name} has no {place}")
    return known[place]


def _places(encoder: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """The places within an encoder that have a name, by that name."""
    if isinstance(encoder, SmallResNet):
        first, second, _ = encoder.blocks
        return {
            "stem": (encoder.stem, encoder.width),
            "stage1": (first, encoder.width),
            "stage": (second, 2 * encoder.width),
        }
    if isinstance(encoder, ResNet):
        stages = [encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4]
        inputs = [following[0].conv1.in_channels for following in stages]
        return dict(zip(PLACES, zip([encoder.maxpool, *stages[:3]], inputs, strict=True), strict=True))
    known = getattr(encoder, "feature_info", None) or []  # timm's, which does not say where a stem ends
    if len(known) < 2:
        return {}
    quarters = PLACES[1:] if len(known) >= 4 else PLACES[3:]
    found = {}
    for place in quarters:
        chosen = known[math.ceil(PLACES.index(place) / 4 * len(known)) - 1]
        found[place] = encoder.get_submodule(chosen["module"]), chosen["num_chs"]
    return found


def map_stage(encoder: nn.Module, name: str, side: int) -> tuple[nn.Module, int]:
    """The ``stage`` of an encoder whose output is a map (B, C, h, h), h > 1, and its number of channels.

    Args:
        encoder: as built by ``build_encoder``; it encodes one image, and is left as it was.
        name: its name, for the message.
        side: side of the views in pixels.

    Raises:
        ConfigError: the encoder has no such stage.
    """
    if hasattr(encoder, "patch_embed"):  # timm's vision transformers
        raise ConfigError(f"{MAP}: {name} has no maps (B, C, h, w)")
    layer, channels = stage(encoder, name, refusal=MAP)
    shapes: list[tuple[int, ...]] = []
    handle = layer.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    encoder.eval()
    try:
        with torch.no_grad():
            encoder(torch.zeros(1, 3, side, side, device=next(encoder.parameters()).device))
    finally:
        encoder.train()
        handle.remove()
    shape = shapes[0]
    if len(shape) != 4 or shape[1] != channels or shape[2] != shape[3]:
        raise ConfigError(f"{MAP}: {name} has no square maps (B, C, h, h)")
    if shape[3] < 2:
        raise ConfigError(f"{MAP}: views of {side} pixels leave {name} a map of one place, which cannot turn")
    return layer, channels


def pooled(x: Tensor) -> Tensor:
    """The mean over all places of a map (B, C, H, W), or of all tokens (B, N, C): (B, C)."""
    return x.mean((2, 3)) if x.dim() == 4 else x.mean(1)


class Tap:
    """An encoder that appends to its features the mean of one of its stages, or all of it, while that stage is watched.

    Args:
        encoder: (B, 3, S, S) -> (B, D).
        layer: the stage, a submodule of the encoder.
        channels: of the stage.
        fork: called with the output of the stage; returns what the next stage gets and what is appended. Both are equal to it.
        whole: whether the stage's square map is appended, not its mean.
    """

    def __init__(
        self,
        encoder: nn.Module,
        layer: nn.Module,
        channels: int,
        fork: Callable[[Tensor], tuple[Tensor, Tensor]],
        whole: bool = False,
    ) -> None:
        self.encoder, self.channels, self.fork, self.whole = encoder, channels, fork, whole
        self.open = False
        self.dim = 0  # D, known after a call
        self.seen: list[Tensor] = []
        layer.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        if not self.open:
            return None
        onward, own = self.fork(out)
        self.seen.append(own)
        return onward

    def __call__(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, D + C), or (B, D + h h C)."""
        self.open = True
        try:
            features, own = self.encoder(x), self.seen[-1]
            self.dim = features.shape[1]
            # Channels last: in that layout nothing moves, and whole places can be gathered.
            return torch.cat([features, own.permute(0, 2, 3, 1).flatten(1) if self.whole else pooled(own)], 1)
        finally:
            self.open = False
            self.seen.clear()

    def split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """What ``__call__`` returned, in its parts: features (B, D) and the mean of the stage (B, C), or its map (B, C, h, h)."""
        features, own = y[:, : self.dim], y[:, self.dim :]
        if not self.whole:
            return features, own
        side = math.isqrt(own.shape[1] // self.channels)
        return features, own.unflatten(1, (side, side, self.channels)).permute(0, 3, 1, 2)
