"""Encoders: name and stem -> a network from images to feature vectors."""

import json
from collections.abc import Mapping
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from rotssl.base.paths import AnyPath, write_whole
from rotssl.config import Config
from rotssl.config.datasets import DATASETS
from rotssl.config.fields import ConfigError, nearest
from rotssl.models.norm import convert_norm

WEIGHTS, FACTS = "encoder.safetensors", "encoder.json"


class SmallResNet(nn.Module):
    """Three residual blocks of widths 24, 48 and 96: trains on a CPU core at about a thousand 28 x 28 images per second.

    Args:
        stem: ``imagenet`` for a 3 x 3 convolution of stride 2, ``cifar`` for stride 1.
        zero_init: whether the last norm of each block starts at 0.
    """

    def __init__(self, stem: str, zero_init: bool = False) -> None:
        super().__init__()
        self.width = width = 24
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
            if zero_init and isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)

    @staticmethod
    def _half(before: int, after: int) -> BasicBlock:
        shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=2, bias=False), nn.BatchNorm2d(after))
        return BasicBlock(before, after, stride=2, downsample=shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 96)."""
        return self.blocks(self.stem(x)).mean((2, 3))  # type: ignore[no-any-return]


def build_encoder(
    name: str,
    stem: str,
    image_size: int = 224,
    zero_init: bool = False,
    patch_size: int | str = "auto",
    drop_path: float = 0.0,
) -> tuple[nn.Module, int]:
    """An encoder with fresh weights, and the dimension D of its features.

    Args:
        name: ``small``, a torchvision ResNet, or ``timm/NAME``.
        stem: ``imagenet`` as in torchvision; ``cifar`` replaces the first 7 x 7 convolution of stride 2 by a 3 x 3 one of
            stride 1 and omits the pooling (SimCLR, arXiv 2002.05709, appendix B.9).
        image_size: side of the global views in pixels; timm's vision transformers have position embeddings for it, and
            interpolate them for other sides.
        zero_init: whether the last norm of each residual block starts at 0 (Goyal et al. 2017, arXiv 1706.02677).
        patch_size: patch side in pixels of timm's vision transformers; ``auto``: taken from the name.
        drop_path: rate of stochastic depth in timm's encoders.

    Returns:
        The module, (B, 3, H, W) -> (B, D), and D.

    Raises:
        ConfigError: timm is not installed or does not know the name, or the encoder does not accept an argument.
    """
    if name.startswith("timm/"):
        return _timm(name.removeprefix("timm/"), image_size, patch_size, drop_path)
    if name == "small":
        return SmallResNet(stem, zero_init), 96
    model = torchvision.models.get_model(name, weights=None, zero_init_residual=zero_init)
    dim = model.fc.in_features
    model.fc = nn.Identity()
    if stem == "cifar":
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    model.avgpool = _Mean()
    return model, dim


class _Mean(nn.Module):
    """The mean over a map (B, C, H, W), as nn.AdaptiveAvgPool2d(1), whose gradient is copied once more in channels_last."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


def _timm(name: str, image_size: int, patch_size: int | str, drop_path: float) -> tuple[nn.Module, int]:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"encoder.name: got 'timm/{name}', but timm is not installed") from error
    options = timm_options(name, image_size, patch_size)
    options |= {"drop_path_rate": drop_path} if drop_path else {}
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0, **options)
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(f"encoder.name: {name} does not accept {options} ({error})") from error
    dim = getattr(model, "head_hidden_size", None) or model.num_features
    assert isinstance(dim, int)
    return model, dim


def timm_options(name: str, image_size: int, patch_size: int | str = "auto") -> dict[str, Any]:
    """What ``timm.create_model`` is given beside the name and ``num_classes=0``; the arguments are those of ``build_encoder``.

    Raises:
        ConfigError: timm does not know the name, or the encoder does not accept an argument.
    """
    import timm

    if not timm.is_model(name):
        raise ConfigError(f"encoder.name: timm has no {name!r}{nearest(name, timm.list_models())}")
    try:
        with torch.device("meta"):
            sketch = timm.create_model(name, pretrained=False, num_classes=0)
    except (RuntimeError, ValueError, TypeError) as error:  # for example an unknown tag of weights
        raise ConfigError(f"encoder.name: timm cannot build {name!r} ({error})") from error
    if not isinstance(sketch, timm.models.VisionTransformer):
        if patch_size != "auto":
            raise ConfigError(
                f"encoder.patch_size: got {patch_size}, expected auto: {name} is not a vision transformer"
            )
        return {}
    patch = sketch.patch_embed.patch_size[0] if patch_size == "auto" else int(patch_size)
    if patch > image_size:
        raise ConfigError(f"encoder.patch_size: got {patch}, expected at most the side of the views ({image_size})")
    # Views of different sides go through one network; sides that are not a multiple of the patch are padded.
    options = {"img_size": image_size, "dynamic_img_size": True, "dynamic_img_pad": True}
    return options | ({} if patch_size == "auto" else {"patch_size": patch_size})


def facts(config: Config) -> dict[str, Any]:
    """What one must know of a run's encoder to build and to use it, by the names of ``encoder.json``.

    Args:
        config: resolved; the network is the one that is evaluated.
    """
    encoder, data = config.encoder, DATASETS[config.data.name]
    found: dict[str, Any] = {"encoder": encoder.name, "stem": encoder.stem, "patch_size": encoder.patch_size}
    found |= {"norm": config.model.norm, "image_size": config.data.image_size}
    return found | {"mean": data.mean, "std": data.std, "network": config.evaluation.network}


def save_encoder(encoder: nn.Module, about: Mapping[str, Any], folder: AnyPath) -> None:
    """Save an encoder for ``read_encoder``: weights in ``encoder.safetensors``, how to build it in ``encoder.json``.

    Args:
        encoder: encoder whose state is saved.
        about: as ``facts``, and ``stored``, height and width of the images that were evaluated.
        folder: folder to write to.

    Raises:
        OSError: a file can't be written, for example because the disk is full.
    """
    write_whole(folder / WEIGHTS, packed(encoder))
    content = {**about, "load": "rotssl.load_encoder(FOLDER)"}
    write_whole(folder / FACTS, json.dumps(content, indent=2) + "\n")


def packed(encoder: nn.Module) -> bytes:
    """The weights of an encoder, in the format of safetensors."""
    weights = {key: value.detach().cpu().contiguous() for key, value in encoder.state_dict().items()}
    return save(weights)  # save_file raises no OSError if the disk is full


def read_encoder(folder: AnyPath) -> tuple[nn.Module, int]:
    """The encoder that ``save_encoder`` has saved, without what one needs to use it: see ``rotssl.load_encoder``.

    Returns:
        The module in evaluation mode, (B, 3, S, S) -> (B, D), and D.

    Raises:
        ConfigError: a file is missing or damaged, or the weights are of another encoder.
    """
    about = read_facts(folder / FACTS)
    return restored(about, read_weights(folder / WEIGHTS), folder / WEIGHTS)


def read_facts(file: AnyPath) -> dict[str, Any]:
    """What a file of ``save_encoder``, or a ``config.json`` with the same under ``rotssl``, says of an encoder.

    Raises:
        ConfigError: the file can't be read, or does not describe an encoder.
    """
    try:
        content = json.loads(file.read_text())
        about = content.get("rotssl", content)
        if not isinstance(about, dict) or not about.keys() >= {"encoder", "stem", "norm"}:
            raise ValueError("it does not describe an encoder of rotssl")
        if not all(isinstance(about[key], str) for key in ("encoder", "stem", "norm")):
            raise ValueError("encoder, stem and norm are to be text")
        if not all(isinstance(about.get(key, []), list) for key in ("mean", "std")):
            raise ValueError("mean and std are to be lists")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read ({_why(error)})") from error
    return about


def read_weights(file: AnyPath) -> dict[str, Tensor]:
    """The tensors in a file of safetensors.

    Raises:
        ConfigError: it can't be read, for example because it was cut short.
    """
    try:
        return load(file.read_bytes())
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file} cannot be read ({_why(error)})") from error


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0][:160]


def restored(about: Mapping[str, Any], weights: Mapping[str, Tensor], where: AnyPath) -> tuple[nn.Module, int]:
    """An encoder from what ``facts`` says of it, and its weights.

    Args:
        about: what is said of the encoder.
        weights: its state.
        where: where the weights are from, for the message.

    Returns:
        The module in evaluation mode, and the dimension of its features.

    Raises:
        ConfigError: the weights are of another encoder.
    """
    shape = {key: about[key] for key in ("image_size", "patch_size") if key in about}
    encoder, dim = build_encoder(about["encoder"], about["stem"], **shape)
    if about["norm"] == "group":
        convert_norm(encoder, "group", torch.device("cpu"))
    check_fit(about, encoder.state_dict(), weights, where)
    encoder.load_state_dict(dict(weights))
    return encoder.eval(), dim


def check_fit(
    about: Mapping[str, Any], expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: AnyPath
) -> None:
    """Check that weights have the names and shapes of an encoder; the arguments are those of ``restored``.

    Raises:
        ConfigError: they are of another encoder.
    """
    if reason := differences(expected, found):
        raise ConfigError(f"{where} is of another encoder than {about['encoder']} (stem {about['stem']}): {reason}")


def differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """How the names and shapes of two states differ, in a few words; empty if they do not."""
    both = expected.keys() & found.keys()
    kinds = {
        "missing": sorted(expected.keys() - found.keys()),
        "not expected": sorted(found.keys() - expected.keys()),
        "of another shape": sorted(key for key in both if expected[key].shape != found[key].shape),
    }
    words = [f"{len(keys)} weights {kind}, such as {keys[0]}" for kind, keys in kinds.items() if keys]
    return "; ".join(words)
