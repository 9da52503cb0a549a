"""An encoder in the formats of other libraries. Each file is read again by its library, which must give the same features."""

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from rotssl.config.fields import ConfigError
from rotssl.config.sections import RESNETS
from rotssl.export.encoder import Encoder
from rotssl.models.encoders import differences, packed, read_encoder, save_encoder, timm_options

TOLERANCE = 1e-5  # largest difference of a feature, as a share of the largest feature, or of 1 if that is smaller
TORCHVISION, TIMM, ONNX, FOLDER = "torchvision.pth", "timm.safetensors", "encoder.onnx", "huggingface"
_CLASSES = 1000  # of torchvision's constructors
_EXTRA = ("onnxscript", "onnxruntime")


def misfit(encoder: Encoder, name: str) -> str:
    """Why an encoder has no form in a format; empty if it has one."""
    if name == "onnx":
        missing = [package for package in _EXTRA if importlib.util.find_spec(package) is None]
        return f"{' and '.join(missing)} not installed: pip install 'rotssl[export]'" if missing else ""
    if name not in ("torchvision", "timm"):
        return ""
    about = encoder.about
    kind, stem = about["encoder"], about["stem"]
    if kind not in RESNETS and not (name == "timm" and kind.startswith("timm/")):
        return f"{name} has no encoder {kind}"
    if kind in RESNETS and stem != "imagenet":
        return (
            f"{name}'s {kind} has no stem {stem}: its first convolution is 7 x 7 with stride 2, not 3 x 3 with stride 1"
        )
    with torch.device("meta"):
        plain = torchvision_model(about, nn.Identity()) if name == "torchvision" else timm_model(about)
    if reason := differences(plain.state_dict(), encoder.network.state_dict()):
        return f"model.norm {about['norm']} changes the weights of {kind} ({reason})"
    return ""


def torchvision_model(about: Mapping[str, Any], head: nn.Module | None = None) -> nn.Module:
    """The model of torchvision, as its constructor makes it, or with another head."""
    model = torchvision.models.get_model(about["encoder"], weights=None)
    if head is not None:
        model.fc = head
    return model  # type: ignore[no-any-return]


def timm_arguments(about: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with which ``timm.create_model`` makes the model."""
    name = about["encoder"].removeprefix("timm/")
    own = timm_options(name, about["image_size"], about.get("patch_size", "auto")) if name != about["encoder"] else {}
    return {"model_name": name, "num_classes": 0, **own}


def timm_model(about: Mapping[str, Any]) -> nn.Module:
    """The model of timm, without a classifier."""
    import timm

    return timm.create_model(**timm_arguments(about))


def safetensors(encoder: Encoder, folder: Path) -> tuple[str, nn.Module]:
    """``encoder.safetensors`` and ``encoder.json``, for ``load_encoder``."""
    save_encoder(encoder.network, encoder.about, folder)
    return "encoder.safetensors", read_encoder(folder)[0]


def torchvision_weights(encoder: Encoder, folder: Path) -> tuple[str, nn.Module]:
    """A state that torchvision's constructor takes as it is; its ``fc``, which was never trained, has zeros."""
    state = {key: value.detach().cpu().clone() for key, value in encoder.network.state_dict().items()}
    fc = torch.zeros(_CLASSES, encoder.dim), torch.zeros(_CLASSES)
    torch.save({**state, "fc.weight": fc[0], "fc.bias": fc[1]}, folder / TORCHVISION)
    model = torchvision_model(encoder.about)
    model.load_state_dict(torch.load(folder / TORCHVISION, weights_only=True), strict=True)
    model.fc = nn.Identity()
    return TORCHVISION, model.eval()


def timm_weights(encoder: Encoder, folder: Path) -> tuple[str, nn.Module]:
    """A state that timm's constructor takes with ``num_classes=0``."""
    import timm

    (folder / TIMM).write_bytes(packed(encoder.network))
    return TIMM, timm.create_model(**timm_arguments(encoder.about), checkpoint_path=str(folder / TIMM)).eval()


def onnx(encoder: Encoder, folder: Path) -> tuple[str, nn.Module]:
    """A graph from ``images`` (B, 3, S, S), normalised, to ``features`` (B, D), for any B; the facts are in its metadata."""
    side, network = encoder.image_size, encoder.network
    device = next(network.parameters()).device
    shown = (torch.zeros(2, 3, side, side, device=device),)
    program: Any = torch.onnx.export(
        network,
        shown,
        dynamo=True,
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    program.model.metadata_props["rotssl"] = json.dumps(encoder.about)
    program.save(str(folder / ONNX), external_data=False)
    return ONNX, _Runtime(folder / ONNX)


class _Runtime(nn.Module):
    """A graph of ONNX in onnxruntime, as a module."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, D)."""
        return torch.from_numpy(self.session.run(["features"], {"images": images.numpy()})[0])


WRITERS: Mapping[str, Callable[[Encoder, Path], tuple[str, nn.Module]]] = {
    "safetensors": safetensors,
    "torchvision": torchvision_weights,
    "timm": timm_weights,
    "onnx": onnx,
}


@torch.no_grad()
def gap(encoder: Encoder, other: nn.Module, counts: tuple[int, ...] = (1, 3)) -> float:
    """The largest difference between the features of two networks, relative as ``TOLERANCE``, on batches of noise.

    Args:
        encoder: what was exported, on the CPU.
        other: what was read again.
        counts: sizes of the batches.
    """
    worst = torch.zeros(())
    for count in counts:
        noise = torch.Generator().manual_seed(count)
        x = torch.randn(count, 3, encoder.image_size, encoder.image_size, generator=noise)
        ours, theirs = encoder(x), other(x)
        # torch.maximum, unlike max, keeps what is not a number.
        worst = torch.maximum(worst, (ours - theirs).abs().max() / ours.abs().max().clamp(min=1))
    return float(worst)


def write(encoder: Encoder, name: str, folder: Path) -> tuple[str, float]:
    """Write a format of ``WRITERS`` into a folder and read it again.

    Args:
        encoder: on the CPU.
        name: of the format.
        folder: exists.

    Returns:
        The file, and the largest difference of the features.

    Raises:
        ConfigError: the encoder has no such form, or its features differ by more than ``TOLERANCE``.
    """
    if reason := misfit(encoder, name):
        raise ConfigError(f"--format: {name} does not fit: {reason}")
    file, again = WRITERS[name](encoder, folder)
    if not (found := gap(encoder, again)) <= TOLERANCE:
        (folder / file).unlink()
        raise ConfigError(f"--format: {name} gives other features than the encoder: they differ by {found:.1g}")
    return file, found
