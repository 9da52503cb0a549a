"""Encoders that look trained, without a run."""

import torch

from rotssl.export.encoder import Encoder
from rotssl.models.encoders import build_encoder
from rotssl.models.norm import convert_norm

VIT, CONVNET = "timm/vit_tiny_patch16_224", "timm/regnetx_002"
KINDS = {
    "small": ("small", "cifar", 16, "auto"),
    "resnet18": ("resnet18", "imagenet", 32, "auto"),
    "resnet18 with a stem of CIFAR": ("resnet18", "cifar", 16, "auto"),
    "transformer": (VIT, "imagenet", 28, 7),
    "padded transformer": (VIT, "imagenet", 30, 7),
    "convnet": (CONVNET, "imagenet", 32, "auto"),
    "convnet without BatchNorm": ("timm/convnext_atto", "imagenet", 32, "auto"),
    "convnet with a head": ("timm/mobilenetv3_small_100", "imagenet", 32, "auto"),
}


def encoder_of(kind, norm="batch", network="student"):
    """An encoder whose weights, biases and running statistics are not those of a fresh one."""
    name, stem, side, patch = KINDS[kind]
    torch.manual_seed(0)
    made, dim = build_encoder(name, stem, image_size=side, patch_size=patch)
    convert_norm(made, norm, torch.device("cpu"))
    with torch.no_grad():
        for value in made.parameters():
            value.add_(0.01 * torch.randn_like(value))
        made.train()(torch.randn(16, 3, side, side))
    about = {"encoder": name, "stem": stem, "patch_size": patch, "norm": norm, "image_size": side}
    about |= {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "network": network, "stored": [side, side]}
    return Encoder(made, dim, about)


def noise(encoder, count=4):
    side = encoder.image_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(9))
