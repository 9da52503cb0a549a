"""Norms in place of those that an encoder comes with."""

import copy

import pytest
import torch
from torch import nn

from rotssl.base import distributed
from rotssl.models import norm
from rotssl.models.norm import GlobalBatchNorm, ViewBatchNorm, convert_norm, exchanges, per_view_statistics
from tests.models.test_encoders import build, pictures

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# timm's BatchNormAct2d is a BatchNorm with the activation in it.
@pytest.mark.parametrize("name", ["timm/regnetx_002", "timm/mobilenetv3_small_100"])
def test_another_norm_keeps_the_activation_of_timm_s_layers(name, monkeypatch):
    x = pictures(8, 64)
    plain, changed = build(name)[0], build(name)[0]
    changed.load_state_dict(plain.state_dict())
    convert_norm(changed, "sync", CPU)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in changed.modules())
    torch.testing.assert_close(changed(x), plain(x), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(changed.eval()(x), plain.eval()(x), rtol=1e-3, atol=1e-4)
    assert changed.state_dict().keys() == plain.state_dict().keys()

    grouped = convert_norm(build(name)[0], "group", CPU)
    lowest = {"with": [], "without": []}
    for old, new in zip(plain.named_modules(), grouped.named_modules(), strict=False):
        if isinstance(new[1], nn.GroupNorm):
            assert old[0] == new[0]
            which = "without" if isinstance(old[1].act, nn.Identity) else "with"
            new[1].register_forward_hook(lambda _, args, out, which=which: lowest[which].append(out.min().item()))
    grouped(x)
    assert min(lowest["with"]) >= -0.376 > min(lowest["without"])  # the least value of Hardswish is -3/8

    # What GPUs would get; in evaluation it runs on CPUs.
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    spread = convert_norm(build(name)[0], "sync", torch.device("cuda"))
    spread.load_state_dict(plain.state_dict())
    assert {type(m) for m in spread.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)} == {nn.SyncBatchNorm}
    torch.testing.assert_close(spread.eval()(x), plain(x), rtol=1e-3, atol=1e-4)


def test_gpus_have_our_own_layers_where_asked(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(norm, "SYNC_ON_GPUS", GlobalBatchNorm)
    assert type(convert_norm(nn.BatchNorm2d(4), "sync", torch.device("cuda"))) is GlobalBatchNorm


def test_a_view_with_a_single_value_per_channel_is_refused():
    layer = ViewBatchNorm(3)
    with (
        per_view_statistics(2),
        pytest.raises(ValueError, match=r"^expected more than 1 value per channel in each of 2"),
    ):
        layer(torch.randn(2, 3))


@pytest.mark.parametrize("fused", [False, True], ids=["eager", "compiled"])
def test_split_batchnorm_has_the_statistics_of_each_part_of_each_view(monkeypatch, fused):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: fused)
    layer = convert_norm(nn.BatchNorm2d(5), "split", CPU, 4).double()
    x = torch.randn(24, 5, 3, 2, dtype=torch.float64) * torch.linspace(1, 9, 24).view(-1, 1, 1, 1)
    with per_view_statistics(2):  # two views of twelve: parts of three
        found = layer(x)
    parts = [nn.functional.batch_norm(part, None, None, training=True) for part in x.split(3)]
    torch.testing.assert_close(found, torch.cat(parts))
    # All parts of a view together move the running statistics as one batch would.
    weight, expected = 0.9 ** (1 / 4), torch.zeros(5, dtype=torch.float64)
    for part in x.split(3):
        expected = weight * expected + (1 - weight) * part.mean((0, 2, 3))
    torch.testing.assert_close(layer.running_mean, expected)
    plain = nn.BatchNorm2d(5).double()  # parts of ten images would not be alike
    torch.testing.assert_close(layer(x[:10]), plain(x[:10]))


def test_several_gpus_would_exchange_once_per_view():
    with per_view_statistics(2):
        assert exchanges(ViewBatchNorm(3)) == 2 and exchanges(GlobalBatchNorm(3)) == 1


HERE = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("fused", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(7,), (7, 5, 4)], ids=str)
def test_each_of_several_views_has_the_statistics_of_torch_s_layer(monkeypatch, shape, affine, kind, fused, device):
    layer = nn.BatchNorm1d if len(shape) == 1 else nn.BatchNorm2d
    theirs = layer(7, affine=affine, momentum=0.3)
    for value in theirs.parameters():
        nn.init.uniform_(value, 0.5, 2)
    ours = convert_norm(copy.deepcopy(theirs), "batch", CPU)
    assert isinstance(ours, ViewBatchNorm)
    for module in (ours, theirs):
        module.to(device, torch.float64 if kind == torch.float64 else torch.float32)
    x = (torch.randn(12, *shape, dtype=torch.float64) * torch.linspace(1, 9, 12).view(-1, *[1] * len(shape))).to(
        device, kind
    )
    x = x.contiguous(memory_format=torch.channels_last) if len(shape) == 3 else x
    way = torch.randn_like(x)

    def results(module, run):
        given = x.clone().requires_grad_()
        out = run(given)
        out.backward(way)
        return [out, given.grad, *(p.grad for p in module.parameters()), module.running_mean, module.running_var]

    def together(given):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: fused)
        with per_view_statistics(3):
            return ours(given)

    expected = results(theirs, lambda given: torch.cat([theirs(view) for view in given.chunk(3)]))
    found = results(ours, together)
    close = {} if kind == torch.float64 else {"rtol": 0.02, "atol": 0.05}
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        torch.testing.assert_close(a, b, **close)
