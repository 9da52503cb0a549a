"""Encoders: features, stems, timm's, and what a run leaves of one."""

import json
import sys

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from rotssl.config.fields import ConfigError
from rotssl.models.encoders import build_encoder, read_encoder, save_encoder
from rotssl.models.norm import convert_norm
from rotssl.models.tap import PLACES, pooled, stage
from tests.small_runs import full_disk

CPU = torch.device("cpu")
VIT = "timm/vit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def build(name, stem="imagenet", **options):
    return build_encoder(name, stem, **options)


def pictures(count, side, seed=0):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("small", 96),
        ("resnet18", 512),
        ("resnet50", 2048),
        ("timm/resnet18", 512),
        ("timm/mobilenetv3_small_100", 1024),  # whose head has a hidden layer: not num_features, which is 576
        ("timm/convnext_atto", 320),
        (VIT, 192),
    ],
)
def test_features_have_the_dimension_that_is_told(name, dim):
    encoder, told = build(name, image_size=32)
    assert told == dim
    assert encoder.eval()(pictures(2, 32)).shape == (2, dim)


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 8), ("cifar", 32)])
def test_the_cifar_stem_keeps_the_resolution(stem, side):
    encoder, _ = build("resnet18", stem)
    shapes = []
    encoder.layer1.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    encoder(pictures(2, 32))
    assert shapes == [(2, 64, side, side)]


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("small", {"stem": 24, "stage1": 24, "stage": 48}),
        ("resnet18", {"stem": 64, "stage1": 64, "stage2": 128, "stage": 256}),
        ("resnet50", {"stem": 64, "stage1": 256, "stage2": 512, "stage": 1024}),
        ("timm/resnet18", {"stage1": 64, "stage2": 128, "stage": 256}),
        ("timm/convnext_atto", {"stage1": 40, "stage2": 80, "stage": 160}),
        (VIT, {"stage1": 192, "stage2": 192, "stage": 192}),
    ],
)
def test_places_within_an_encoder_have_names_from_its_input_on(name, places):
    encoder, _ = build(name, image_size=32)
    found, whole = {}, []
    for place in PLACES:
        if place not in places:
            refusal = rf"^rotation\.head_on: got {place}, expected encoder or projector, or [a-z0-9 ]+: {name} has no {place}$"
            with pytest.raises(ConfigError, match=refusal):
                stage(encoder, name, place)
            continue
        layer, channels = stage(encoder, name, place)
        layer.register_forward_hook(lambda _, args, out, place=place: found.update({place: pooled(out).shape[1]}))
        assert channels == places[place]
        whole.append(layer)
    encoder(pictures(2, 32))
    assert list(found.items()) == list(places.items()) and len(set(whole)) == len(places)


@pytest.mark.parametrize("name", ["small", "resnet18", "resnet50"])
@pytest.mark.parametrize("zero_init", [True, False])
def test_with_zero_init_each_block_starts_as_its_shortcut(name, zero_init):
    encoder, _ = build(name, zero_init=zero_init)
    gaps = []

    def compare(block, args, output):
        shortcut = args[0] if block.downsample is None else block.downsample(args[0])
        gaps.append((output - shortcut.relu()).abs().max().item())

    for block in encoder.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            block.register_forward_hook(compare)
    encoder(pictures(4, 32))
    assert len(gaps) == {"small": 3, "resnet18": 8, "resnet50": 16}[name]
    assert max(gaps) < 1e-6 if zero_init else min(gaps) > 1e-2


# --- timm ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "patch", "tokens", "own"),
    [
        (28, 7, {28: 16, 14: 4, 10: 4}, 16),  # 10 is padded to 14
        (32, "auto", {32: 4, 14: 1, 48: 9}, 4),
    ],
)
def test_a_vision_transformer_takes_views_of_several_sides(size, patch, tokens, own):
    encoder, dim = build(VIT, image_size=size, patch_size=patch)
    assert encoder.pos_embed.shape == (1, own + 1, dim)
    seen = []
    encoder.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    for side in tokens:
        assert encoder(pictures(2, side)).shape == (2, dim)
    assert seen == [count + 1 for count in tokens.values()]


def test_drop_path_reaches_the_last_block():
    encoder, _ = build(VIT, image_size=32, drop_path=0.3)
    assert encoder.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    x = pictures(4, 32)
    assert not torch.equal(encoder(x), encoder(x))
    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("timm/resnet81", {}, ["encoder.name", "'resnet81'", "did you mean 'resnet18'"]),
        ("timm/resnet18.foo", {}, ["encoder.name: timm cannot build", "tag"]),
        ("timm/qqqqq", {}, ["encoder.name", "timm has no 'qqqqq'"]),
        ("timm/resnet18", {"patch_size": 8}, ["encoder.patch_size: got 8", "not a vision transformer"]),
        ("timm/vgg11", {"drop_path": 0.1}, ["encoder.name: vgg11 does not accept {'drop_path_rate': 0.1}"]),
        (VIT, {"image_size": 8}, ["encoder.patch_size: got 16", "at most the side of the views (8)"]),
        (VIT, {"image_size": 28, "patch_size": 32}, ["encoder.patch_size: got 32", "(28)"]),
    ],
)
def test_what_timm_cannot_do_is_said_in_a_line(name, options, words):
    with pytest.raises(ConfigError) as caught:
        build(name, **options)
    assert all(word in str(caught.value) for word in words), caught.value


def test_timm_that_is_not_installed_is_said_in_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"encoder.name: got 'timm/resnet18', but timm is not installed"):
        build("timm/resnet18")


# --- what a run leaves ---------------------------------------------------------------------------------------------------


@pytest.mark.contract
@pytest.mark.parametrize("norm", ["batch", "sync", "group"])
@pytest.mark.parametrize(
    ("name", "stem", "patch"),
    [
        ("small", "cifar", "auto"),
        ("resnet18", "cifar", "auto"),
        ("resnet18", "imagenet", "auto"),
        (VIT, "imagenet", 7),
        ("timm/regnetx_002", "imagenet", "auto"),
    ],
)
def test_a_saved_encoder_is_the_same_when_loaded(tmp_path, name, stem, patch, norm):
    encoder, dim = build(name, stem, image_size=28, patch_size=patch)
    encoder = convert_norm(encoder, norm, CPU).to(memory_format=torch.channels_last)
    encoder(pictures(8, 28))  # moves the running statistics
    about = {"encoder": name, "stem": stem, "patch_size": patch, "norm": norm, "image_size": 28, "mean": [0.5]}
    save_encoder(encoder, about, tmp_path)
    again, told = read_encoder(tmp_path)
    assert told == dim
    assert not again.training
    x = pictures(4, 28, seed=1)
    torch.testing.assert_close(again(x), encoder.eval()(x), rtol=1e-3, atol=1e-4)
    assert any(isinstance(m, nn.GroupNorm) for m in again.modules()) == (norm == "group" and name != VIT)
    assert json.loads((tmp_path / "encoder.json").read_text())["mean"] == [0.5]
    assert len({(tmp_path / f"encoder.{kind}").stat().st_mode for kind in ("safetensors", "json")}) == 1


def test_a_full_disk_under_an_encoder_is_an_error_of_the_system(tmp_path):
    encoder = build_encoder("small", "cifar")[0]
    save_encoder(encoder, {}, tmp_path)
    before = (tmp_path / "encoder.safetensors").read_bytes()
    with full_disk(100_000), pytest.raises(OSError, match="File too large"):
        save_encoder(encoder, {}, tmp_path)
    assert (tmp_path / "encoder.safetensors").read_bytes() == before and len(before) > 100_000
