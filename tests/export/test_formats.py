"""Formats of other libraries: what their own constructors read has the features of the encoder."""

import importlib.util
import json

import pytest
import torch
import torchvision
from torch import nn

from rotssl.config.fields import ConfigError
from rotssl.export import formats
from rotssl.export.source import load_encoder
from tests.export.made import KINDS, VIT, encoder_of, noise

pytestmark = pytest.mark.contract
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnxscript", "onnxruntime")),
    reason="onnxscript and onnxruntime are not installed: pip install 'rotssl[export]'",
)


def same(encoder, features):
    with torch.no_grad():
        ours = encoder(noise(encoder))
    assert float((ours - features).abs().max()) <= 1e-5 * max(1.0, float(ours.abs().max()))


@torch.no_grad()
def features(model, encoder):
    return model.eval()(noise(encoder))


FEW = ("small", "resnet18", "transformer", "convnet")


def mostly_exhaustive(few):
    return [pytest.param(kind, marks=[] if kind in few else pytest.mark.exhaustive) for kind in KINDS]


@pytest.mark.parametrize("kind", mostly_exhaustive(FEW))
def test_what_load_encoder_reads_again_is_the_same(tmp_path, kind):
    encoder = encoder_of(kind)
    formats.write(encoder, "safetensors", tmp_path)
    again = load_encoder(tmp_path)
    same(encoder, features(again, encoder))
    assert (again.dim, again.image_size, again.mean, again.std) == (
        encoder.dim,
        encoder.image_size,
        encoder.mean,
        encoder.std,
    )
    assert not again.training


def test_torchvision_takes_a_resnet_strictly(tmp_path):
    encoder = encoder_of("resnet18")
    assert formats.write(encoder, "torchvision", tmp_path) == ("torchvision.pth", 0.0)
    model = torchvision.models.resnet18()
    model.load_state_dict(torch.load(tmp_path / "torchvision.pth"), strict=True)
    assert torch.equal(model.eval()(noise(encoder)), torch.zeros(4, 1000))  # fc was never trained
    model.fc = nn.Identity()
    same(encoder, features(model, encoder))


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("resnet18", {}),
        ("transformer", {"img_size": 28, "patch_size": 7, "dynamic_img_size": True, "dynamic_img_pad": True}),
        ("convnet", {}),
        ("convnet without BatchNorm", {}),
        ("convnet with a head", {}),
    ],
)
def test_timm_takes_its_encoders_and_resnets_strictly(tmp_path, kind, arguments):
    import timm
    from safetensors.torch import load_file

    encoder = encoder_of(kind)
    formats.write(encoder, "timm", tmp_path)
    name = KINDS[kind][0].removeprefix("timm/")
    model = timm.create_model(name, num_classes=0, **arguments)
    model.load_state_dict(load_file(tmp_path / "timm.safetensors"), strict=True)
    same(encoder, features(model, encoder))


@needs_onnx
@pytest.mark.parametrize("kind", mostly_exhaustive(["small"]))
def test_onnxruntime_gives_the_same_features_for_any_batch(tmp_path, kind):
    import onnxruntime

    encoder = encoder_of(kind)
    formats.write(encoder, "onnx", tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    for count in (1, 4, 7):
        x = noise(encoder, count)
        (found,) = session.run(None, {"images": x.numpy()})
        with torch.no_grad():
            wanted = encoder(x)
        assert found.shape == (count, encoder.dim)
        assert abs(found - wanted.numpy()).max() <= 1e-5 * max(1.0, float(wanted.abs().max()))
    facts = json.loads(session.get_modelmeta().custom_metadata_map["rotssl"])
    assert facts["mean"] == [0.4, 0.5, 0.6] and facts["image_size"] == encoder.image_size


@pytest.mark.parametrize(
    ("kind", "norm", "name", "words"),
    [
        ("small", "batch", "torchvision", "torchvision has no encoder small"),
        ("small", "batch", "timm", "timm has no encoder small"),
        ("transformer", "batch", "torchvision", f"torchvision has no encoder {VIT}"),
        ("resnet18 with a stem of CIFAR", "batch", "torchvision", "no stem cifar: its first convolution is 7 x 7"),
        ("resnet18 with a stem of CIFAR", "batch", "timm", "no stem cifar: its first convolution is 7 x 7"),
        ("resnet18", "group", "torchvision", "model.norm group changes the weights of resnet18"),
        ("convnet", "group", "timm", "model.norm group changes the weights of timm/regnetx_002"),
    ],
)
def test_a_format_that_does_not_fit_is_said_in_a_line(tmp_path, kind, norm, name, words):
    with pytest.raises(ConfigError, match=f"^--format: {name} does not fit: ") as caught:
        formats.write(encoder_of(kind, norm), name, tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_onnx_without_its_packages_is_said_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "_EXTRA", ("onnxscript_of_nobody",))
    with pytest.raises(ConfigError, match=r"onnx does not fit: onnxscript_of_nobody not installed: pip install"):
        formats.write(encoder_of("small"), "onnx", tmp_path)


@pytest.mark.parametrize("change", [2e-5, float("nan")])
def test_a_file_that_gives_other_features_is_not_left(tmp_path, monkeypatch, change):
    class Other(nn.Module):
        def forward(self, images):
            found = encoder(images)
            return found + change * found.abs().max().clamp(min=1)

    def writes(_, folder):
        (folder / "file").write_text("")
        return "file", Other()

    encoder = encoder_of("small")
    monkeypatch.setattr(formats, "WRITERS", {"onnx": writes})
    monkeypatch.setattr(formats, "_EXTRA", ())
    with pytest.raises(ConfigError, match="onnx gives other features than the encoder: they differ by"):
        formats.write(encoder, "onnx", tmp_path)
    assert not (tmp_path / "file").exists()
