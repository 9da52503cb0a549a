"""Encoders: name and stem -> a network from images to feature vectors."""

import json
from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from rotssl.distributed import convert_norm


class SmallResNet(nn.Module):
    """Three residual blocks of widths 24, 48 and 96: trains on a CPU core at about a thousand 28 x 28 images a second.

    Args:
        stem: ``imagenet`` for a 3 x 3 convolution of stride 2, ``cifar`` for stride 1.
    """

    def __init__(self, stem: str) -> None:
        super().__init__()
        width = 24
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2 if stem == "imagenet" else 1, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.blocks = nn.Sequential(
            BasicBlock(width, width), self._half(width, 2 * width), self._half(2 * width, 4 * width)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _half(before: int, after: int) -> BasicBlock:
        shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=2, bias=False), nn.BatchNorm2d(after))
        return BasicBlock(before, after, stride=2, downsample=shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 96)."""
        return self.blocks(self.stem(x)).mean((2, 3))  # type: ignore[no-any-return]


def build_encoder(name: str, stem: str) -> tuple[nn.Module, int]:
    """An encoder with fresh weights, and the dimension D of its features.

    Args:
        name: ``small`` or a torchvision ResNet.
        stem: ``imagenet`` as torchvision has it; ``cifar`` replaces the first 7 x 7 convolution of stride 2 by a 3 x 3 one of
            stride 1 and leaves out the pooling (SimCLR, arXiv 2002.05709, appendix B.9).

    Returns:
        The module, (B, 3, H, W) -> (B, D), and D.
    """
    if name == "small":
        return SmallResNet(stem), 96
    model = torchvision.models.get_model(name, weights=None)
    dim = model.fc.in_features
    model.fc = nn.Identity()
    if stem == "cifar":
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return model, dim


def load_encoder(folder: str | Path) -> tuple[nn.Module, int]:
    """A pretrained encoder, as a run leaves it: ``encoder.safetensors`` and ``encoder.json`` in its folder.

    Images are to be scaled to [0, 1] and normalised by the ``mean`` and ``std`` in encoder.json.

    Returns:
        The module in evaluation mode, (B, 3, S, S) -> (B, D), and D.
    """
    about = json.loads((Path(folder) / "encoder.json").read_text())
    encoder, dim = build_encoder(about["encoder"], about["stem"])
    if about["norm"] == "group":
        convert_norm(encoder, "group", torch.device("cpu"))
    encoder.load_state_dict(load_file(Path(folder) / "encoder.safetensors"))
    return encoder.eval(), dim
