"""What auto stands for, once the data are known, and what then does not fit."""

import pytest

from rotssl import config as cfg
from rotssl.config.fields import ConfigError
from rotssl.config.methods import METHODS

RESOLVED = """
 | data.image_size=28 encoder.stem=imagenet
encoder.name=resnet18 data.image_size=65 | encoder.stem=imagenet data.image_size=65
optim.lr=0.1 train.batch_size=64 optim.lr_scale=linear | optim.lr=0.025 optim.lr_scale=none
optim.lr=0.1 train.batch_size=64 optim.lr_scale=sqrt | optim.lr=0.05 optim.lr_scale=none
optim.lr=0.1 train.batch_size=64 | optim.lr=0.1 optim.lr_scale=none
optim.lr=1 optim.warmup_lr=0.5 optim.final_lr=0.1 train.batch_size=64 optim.lr_scale=sqrt | optim.warmup_lr=0.25
optim.lr=1 optim.final_lr=0.1 train.batch_size=64 optim.lr_scale=sqrt | optim.final_lr=0.05
data.image_size=64 encoder.name=resnet18 | encoder.stem=cifar views.local_size=27 rotation.crop_size=32
data.image_size=65 | views.local_size=28 rotation.crop_size=28
data.image_size=224 | views.local_size=96 rotation.crop_size=96
data.image_size=32 | views.local_size=14 rotation.crop_size=16
data.image_size=28 | views.local_size=12 rotation.crop_size=14
data.image_size=8 | views.local_size=4 rotation.crop_size=4
train.epochs=5 | method.momentum=0.9 method.momentum_end=0.9
train.epochs=5000 | method.momentum=0.9894736842105263 method.momentum_end=0.9894736842105263
method.momentum=0.99 | method.momentum=0.99 method.momentum_end=1
method.momentum_end=0.99 train.epochs=5 | method.momentum=0.9 method.momentum_end=0.99
train.epochs=5 | optim.warmup_epochs=1
train.epochs=35 | optim.warmup_epochs=3.5
train.epochs=800 | optim.warmup_epochs=10
views.size_start=0.5 | views.size_start=14 views.local_size=12
views.size_start=0.55 | views.size_start=16
views.size_start=0.1 | views.size_start=8
views.size_start=28 | views.size_start=28 views.size_until=0.75 views.local_size=12
 | rotation.mode=in_place rotation.angles=shared rotation.fraction=1 rotation.fraction_end=0.125
train.batch_size=64 | rotation.fraction_end=0.25
train.batch_size=64 train.accumulate=2 | rotation.fraction_end=0.25
train.batch_size=16 | rotation.fraction_end=null
train.batch_size=4096 | rotation.fraction_end=0.125
rotation.fraction_end=none | rotation.fraction_end=null
rotation.fraction_end=0.7 | rotation.fraction_end=0.7
rotation.fraction=0.5 | rotation.fraction_end=null
rotation.angles=independent | rotation.fraction_end=null
rotation.mode=extra | rotation.fraction_end=null rotation.views=2 rotation.fraction=1
rotation.mode=four_way | rotation.fraction_end=null
data.image_size=224 views.local_size=64 rotation.crop_size=80 | views.local_size=64 rotation.crop_size=80
encoder.name=timm/resnet18 data.image_size=32 | encoder.stem=imagenet
method.name=mocov2 | method.queue_size=2048
method.name=mocov2 method.queue_size=5001 | method.queue_size=5000
method.name=swav method.prototypes=5001 | method.prototypes=5000 method.queue_size=0
"""


@pytest.mark.parametrize("line", RESOLVED.strip("\n").splitlines())
def test_resolve_fills_in_what_was_auto(line):
    given, expected = (dict(word.split("=") for word in side.split()) for side in line.split("| "))
    values = cfg.flat(cfg.resolve(cfg.build(given), 28, 5000))
    for key, value in expected.items():
        number = value != "null" and not isinstance(values[key], str)
        assert values[key] == (pytest.approx(float(value)) if number else None if value == "null" else value), key


@pytest.mark.parametrize(("given", "side"), [({}, 28), ({"data.image_size": 20}, 20)])
def test_views_do_not_start_larger_than_they_end(given, side):
    config = cfg.build({"views.size_start": side + 1, **given})
    with pytest.raises(
        ConfigError, match=rf"^views.size_start: got {side + 1}, expected at most data.image_size \({side}\)$"
    ):
        cfg.resolve(config, 28, 5000)


@pytest.mark.parametrize(("given", "native", "side"), [({}, 27, 27), ({"data.image_size": 21}, 28, 21)])
def test_a_side_that_cannot_be_halved_is_not_split(given, native, side):
    config = cfg.build({"views.split": 2, **given})
    with pytest.raises(ConfigError, match=rf"^data.image_size: got {side}, expected an even side: views.split 2"):
        cfg.resolve(config, native, 5000)
    cfg.resolve(cfg.replace(config, {"views.split": 1}), native, 5000)


@pytest.mark.parametrize("method", METHODS)
def test_an_auto_rate_is_the_method_s_at_its_own_optimizer_scaled_by_the_batch(method):
    config = cfg.build({"method.name": method, "train.batch_size": 64})
    optim = cfg.resolve(config, 28, 5000).optim
    assert (optim.name, optim.lr) == (METHODS[method].optimizer, pytest.approx(METHODS[method].lr / 4))
    with pytest.raises(ConfigError, match=r"optim.lr: got 'auto'"):
        cfg.resolve(cfg.replace(config, {"optim.name": "lars"}), 28, 5000)
    with pytest.raises(ConfigError, match=r"train.batch_size: got 64, expected at most the 63"):
        cfg.resolve(config, 28, 63)


def test_workers_that_are_left_one_rotated_image_in_the_end_are_refused_with_the_way_out():
    config = cfg.build({"train.batch_size": 256, "scaling.num_workers": 16})
    assert cfg.resolve(config, 28, 5000).rotation.fraction_end == 0.125
    many = cfg.replace(config, {"scaling.num_workers": 32})
    with pytest.raises(
        ConfigError, match=r"rotation.fraction_end: got 0.125, expected at least 0.25.*, or none for a constant share"
    ):
        cfg.resolve(many, 28, 5000)
    for fields in ({"rotation.fraction_end": None}, {"rotation.mode": "extra"}, {"rotation.weight": 0.0}):
        cfg.resolve(cfg.replace(many, fields), 28, 5000)


@pytest.mark.parametrize("method", ["mocov2", "swav"])
def test_a_queue_that_holds_no_batch_is_refused(method):
    config = cfg.build({"method.name": method, "method.queue_size": 255, "train.batch_size": 256})
    with pytest.raises(ConfigError, match=r"method.queue_size: got 255, expected at least train.batch_size \(256\)"):
        cfg.resolve(config, 28, 5000)
    exact = cfg.replace(config, {"method.queue_size": 256})
    assert cfg.resolve(exact, 28, 5000).method.queue_size == 256


@pytest.mark.parametrize(
    ("given", "cut"),
    [
        ({"method.name": "mocov2"}, {"queue_size": (2048, 500)}),
        ({"method.name": "mocov2", "method.queue_size": 500}, {}),
        ({"method.name": "swav", "method.queue_size": 501}, {"queue_size": (501, 500)}),
        (
            {"method.name": "swav", "method.queue_size": 600, "method.prototypes": 700},
            {"queue_size": (600, 500), "prototypes": (700, 500)},
        ),
        ({"method.name": "byol"}, {}),
    ],
)
def test_what_had_to_be_cut_is_said(given, cut):
    asked = cfg.build(given)
    resolved = cfg.resolve(asked, 28, 500)
    lines = [f"method.{key}: reduced from {was} to {now}" for key, (was, now) in cut.items()]
    assert [line.split(", the number")[0] for line in cfg.cut_down(asked, resolved)] == lines
    for key, (_, now) in cut.items():
        assert getattr(resolved.method, key) == now


def test_resolved_paths_are_absolute_and_a_ray_job_writes_to_the_home(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    config = cfg.resolve(cfg.build({"data.name": "imagefolder", "data.root": "~/pictures"}), 28, 5000)
    assert config.data.root == "/home/someone/pictures"
    assert config.storage.path == str(tmp_path / "results")
    name = f"byol-imagefolder-{cfg.fingerprint(config)}"
    assert config.run_dir == tmp_path / "results" / "rotssl" / name
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert cfg.resolve(cfg.build({}), 28, 5000).storage.path == "/home/someone/rotssl-results"


@pytest.mark.parametrize(
    ("key", "value"),
    [("data.image_size", "auto"), ("optim.lr", "auto"), ("rotation.fraction_end", "auto"), ("tracking.run_name", None)],
)
def test_what_is_open_is_not_taken_for_resolved(key, value):
    config = cfg.resolve(cfg.build({}), 28, 5000)
    assert cfg.from_dict(cfg.to_dict(config)) == config and config.rotation.fraction_end is not None
    assert (
        cfg.from_dict(cfg.to_dict(cfg.replace(config, {"rotation.fraction_end": None}))).rotation.fraction_end is None
    )
    with pytest.raises(ConfigError, match=rf"^{key}: got {value}, expected a resolved value"):
        cfg.from_dict(cfg.to_dict(cfg.replace(config, {key: value})))
