import ast
import math
import subprocess
import sys

import pytest
import yaml

from rotssl import config as cfg
from rotssl.commands import run_command
from rotssl.config.cli import parse
from rotssl.config.fields import ConfigError, convert
from rotssl.config.methods import METHODS

NUMBERS = [key for key, (hint, _) in cfg.schema().items() if {int, float} & {hint, *getattr(hint, "__args__", ())}]
NO_NUMBERS = ["nan", "inf", "-1", "x", "", math.nan, math.inf, -math.inf, 10**400, -1, True, [], {}]


def refused(argv, *words):
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


def recipe(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize("method", METHODS)
def test_help_lists_every_field_with_its_meaning_and_its_default_is_valid(method, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--method.name", method, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    for key, (hint, spec) in cfg.schema(method).items():
        assert f"--{key} VALUE" in shown
        assert len(spec.metadata["help"]) > 3
        assert " ".join(spec.metadata["help"].split()) in shown, key
        assert convert(key, spec.default, hint, spec.metadata["bounds"]) == spec.default


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: repr(value)[:9])
def test_no_number_takes_what_is_not_finite_or_out_of_range(value):
    for key in NUMBERS:
        with pytest.raises(ConfigError, match=rf"^{key}: got .*, expected"):
            cfg.build({key: value})


GOOD_VALUES = """
train.epochs | '3' | 3
optim.lr | '5e-4' | 5e-4
train.stop_after | 'null' | None
data.root | 'null' | None
tracking.run_name | 'null' | None
train.seed | '9007199254740993' | 9007199254740993
train.deterministic | 'true' | True
scaling.use_gpu | 'false' | False
views.blur | '1, 0.1' | (1.0, 0.1)
views.blur | [1, 0.1] | (1.0, 0.1)
views.jitter | '(0.1,0.2,0.3,0.1)' | (0.1, 0.2, 0.3, 0.1)
"""


@pytest.mark.parametrize("line", GOOD_VALUES.strip().splitlines())
def test_values_become_what_the_field_holds(line):
    key, value, expected = line.split(" | ")
    section, leaf = key.split(".")
    got = getattr(getattr(cfg.build({key: ast.literal_eval(value)}), section), leaf)
    assert got == ast.literal_eval(expected)
    assert type(got) is type(ast.literal_eval(expected))


BAD_FLAGS = """
--train.epochs 0 | train.epochs: got '0', expected an integer at least 1
--optim.lr 0 | optim.lr: got '0', expected a number greater than 0
--views.flip 1.5 | views.flip: got '1.5', expected a number
--rotation.fraction 0 | rotation.fraction: got '0'
--train.epoch 3 | train.epoch: no such field (did you mean 'train.epochs'?)
--dry | dry: no such field
train.epochs=3 | 'train.epochs=3'
--train.epochs | train.epochs | expected one argument
--train.deterministic | train.deterministic | expected one argument
--train.deterministic yes | train.deterministic: got 'yes', expected true or false
--train.on_nan ignore | train.on_nan: got 'ignore' | 'fail', 'skip'
--encoder.name resnet5 | encoder.name: got 'resnet5' | did you mean 'resnet50'?
--method.name simclrr | method.name: got 'simclrr' | byol | did you mean 'simclr'?
--method.temperature 0.1 | method.temperature: no such field | of simclr, mocov2, swav, dino, not of byol
--method.name simclr --method.momentum 0.9 | method.momentum: no such field | of mocov2, byol | not of simclr
--views.jitter 0.1,0.2 | views.jitter: got '0.1,0.2' | 4 comma-separated numbers
--views.global_scale 0.1 | views.global_scale: got '0.1', expected 2
--config a.yaml --config=b.yaml | --config | 2 files, expected one
--train.batch_size 10 --scaling.num_workers 3 | train.batch_size: got 10 | multiple of the 3 workers
--train.batch_size 3 --scaling.num_workers 3 | train.batch_size: got 3 | at least 2 images
--train.epochs 2 --train.stop_after 3 | train.stop_after: got 3 | at most train.epochs (2)
--train.epochs 2 --optim.warmup_epochs 3 | optim.warmup_epochs: got 3 | at most train.epochs (2)
--views.global_scale 1,0.2 | views.global_scale | smaller share first
--views.blur 1,0,1 | views.blur: got 3 values | each of 2 views
--views.jitter 0,0,0,0.6 | views.jitter | 0.6 | at most 0.5
--data.name imagefolder | data.root: got None | a folder of images
--data.name cifar10 | data.root: got None | cifar10
--data.name cifar100 --data.download true | data.root: got None | cifar100
--data.name tiny-imagenet | data.root: got None | the folder that holds tiny-imagenet
--data.name tiny-imagenet --data.root x --data.download true | data.download: got true | tiny-imagenet is not downloaded
--data.download true | data.download: got true | not downloaded
--optim.lr_scale linear | optim.lr_scale: got linear | none with lr auto
--rotation.mode in_place --rotation.views 1 | rotation.views: got 1
--rotation.fraction 0.1 --train.batch_size 16 --scaling.num_workers 1 | rotation.fraction: got 0.1 | at least 0.125
--method.name simclr --train.accumulate 2 | train.accumulate: got 2, expected 1 | of simclr is no mean | byol, simsiam
--method.name mocov2 --train.accumulate 2 | train.accumulate: got 2 | mocov2
--method.name swav --train.accumulate 2 | train.accumulate: got 2 | swav
--method.name barlow --train.accumulate 2 | train.accumulate: got 2 | barlow
--method.name vicreg --train.accumulate 2 | train.accumulate: got 2 | vicreg
--train.accumulate 3 --train.batch_size 16 --scaling.num_workers 2 | train.batch_size: got 16 | 2 workers x 3 passes
--train.accumulate 4 --train.batch_size 8 --scaling.num_workers 2 | train.batch_size: got 8 | at least 2 images
--rotation.fraction 0.25 --train.batch_size 8 --train.accumulate 2 --scaling.num_workers 1 | rotation.fraction | at least 0.5
--method.name mocov2 --views.local_count 2 | views.local_count: got 2, expected 0 | simclr, byol, simsiam, swav | not for mocov2
--method.name barlow --views.local_count 2 | views.local_count: got 2 | barlow
--method.name vicreg --views.local_count 2 | views.local_count: got 2 | vicreg
--method.name mocov2 --views.global_count 3 | views.global_count: got 3, expected 2: mocov2
--method.name swav --views.global_count 3 | views.global_count: got 3, expected 2: swav
--views.global_count 1 | views.global_count: got '1', expected an integer at least 2
--views.global_count 3 --views.blur 1,0 | views.blur: got 2 values | each of 3 views
--views.solarize 0,0,0.2 | views.solarize: got 3 values | each of 2 views
--views.local_scale 0.4,0.1 | views.local_scale: got (0.4, 0.1) | smaller share first
--rotation.crop_scale 0.4,0.1 | rotation.crop_scale: got (0.4, 0.1) | smaller share first
--encoder.name timm/resnet18 --encoder.stem cifar | encoder.stem: got cifar | timm's encoders keep their stem
--encoder.name timm/resnet18 --encoder.zero_init true | encoder.zero_init: got true, expected false | timm
--encoder.name resnet18 --encoder.patch_size 8 | encoder.patch_size: got 8, expected auto
--encoder.drop_path 0.1 | encoder.drop_path: got 0.1, expected 0.0
--encoder.name tim/resnet18 | encoder.name: got 'tim/resnet18' | timm/NAME | did you mean 'resnet18'?
--jigsaw.grid 2 | jigsaw.permutations: got 100, expected at most 24 | 4 tiles
--jigsaw.grid 2 --jigsaw.permutations 25 | jigsaw.permutations: got 25
--rotation.mode four_way --rotation.views 1 | rotation.views: got 1, expected 2 | four_way
--rotation.mode in_place --rotation.joint true | rotation.joint: got True, expected False in mode in_place
--rotation.mode four_way --rotation.resolution 0.5 | rotation.resolution: got 0.5, expected 1.0 | four_way
--rotation.mode extra --rotation.joint true --rotation.update_bn false | rotation.update_bn: got false | one pass
--rotation.update_bn false | rotation.update_bn: got False | it is for rotation.mode extra and four_way
--rotation.mode extra --rotation.angles independent | rotation.angles: got independent, expected shared | in_place
--rotation.fraction_end 0.1 --train.batch_size 16 --scaling.num_workers 1 | rotation.fraction_end: got 0.1 | at least 0.125
--optim.warmup_lr 0.01 | optim.warmup_lr: got 0.01, expected 0 with lr auto
--optim.final_lr 0.01 | optim.final_lr: got 0.01, expected 0 with lr auto
--optim.lr 0.1 --optim.warmup_lr 0.2 | optim.warmup_lr: got 0.2, expected at most optim.lr (0.1)
--optim.lr 0.1 --optim.final_lr 0.2 | optim.final_lr: got 0.2, expected at most optim.lr (0.1)
--data.name cifar100 | data.root: got None | cifar100
--data.name tiny-imagenet --data.root x --data.download true | data.download: got true | tiny-imagenet is not downloaded
--method.name simsiam --method.layers 4 | method.layers: got '4' | at most 3
--method.name swav --method.epsilon 0.001 | method.epsilon: got '0.001' | at least 0.003
--method.name dino --method.center_momentum 1 | method.center_momentum: got '1' | less than 1
--optim.clip_norm 0 | optim.clip_norm: got '0' | greater than 0
--tracking.run_name a/b | tracking.run_name: got 'a/b'
--storage.path s3://bucket | storage.path: got 's3://bucket'
"""


@pytest.mark.parametrize("line", BAD_FLAGS.strip().splitlines())
def test_a_bad_command_line_is_refused_by_name(line):
    flags, *words = line.split(" | ")
    assert "\n" not in refused(flags.split(), *words)


GOOD_FLAGS = """
--train.accumulate 4 --train.batch_size 16 --scaling.num_workers 2
--method.name dino --train.accumulate 2 --views.local_count 8
--method.name simsiam --train.accumulate 2 --views.global_count 3 --views.blur 1,0,0
--method.name barlow --views.global_count 4
--encoder.name timm/vit_small_patch16_224 --encoder.patch_size 8 --encoder.drop_path 0.1
--encoder.name resnet18 --encoder.stem cifar --encoder.zero_init true
--jigsaw.grid 2 --jigsaw.permutations 24
--rotation.mode extra --rotation.views 1
--rotation.weight 0.0 --rotation.views 1 --rotation.update_bn false
--rotation.weight 0.0 --rotation.mode extra --rotation.joint true --rotation.update_bn false --rotation.angles independent
--rotation.mode four_way --rotation.update_bn false
--optim.lr 0.1 --optim.warmup_lr 0.1 --optim.final_lr 0.1
--data.name cifar100 --data.root x --data.download true
"""


@pytest.mark.parametrize("line", GOOD_FLAGS.strip().splitlines())
def test_what_is_just_allowed_is_taken(line):
    flags, given = line.split(), cfg.flat(parse(line.split()).config)
    for key, value in zip(flags[::2], flags[1::2], strict=True):
        shown = given[key[2:]]
        assert (",".join(f"{v:g}" for v in shown) if isinstance(shown, list) else str(shown).lower()) == value.lower()


BAD_RECIPES = r"""
train: {epochs: 3 | line 1 | not valid YAML
train: {epochs: 2020-99-99} | not valid YAML
train: {epochs: !!int abc} | not valid YAML
train: {epochs: !!python/name:os.system ''} | not valid YAML
- train | holds list | sections
trian: {epochs: 3} | trian.epochs: no such field | did you mean 'train.epochs'?
method: {name: [byol]} | method.name: got ['byol'] | simclr, mocov2, byol
train: {epochs: 2.5} | train.epochs: got 2.5, expected an integer
"""


@pytest.mark.parametrize("line", BAD_RECIPES.strip().splitlines())
def test_a_bad_recipe_is_refused(tmp_path, line):
    content, *words = line.split(" | ")
    refused(["--config", recipe(tmp_path, content)], *words)


def test_a_recipe_that_is_no_yaml_file_is_refused(tmp_path):
    for content, word in ((b"\xff\xfe", "text file"), (b"a: \x00", "valid YAML"), (b"[" * 20000, "deeply")):
        refused(["--config", recipe(tmp_path, content)], word)
    for path, word in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "directory")):
        refused(["--config", str(path)], str(path), word)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_flags_win_over_the_recipe_whatever_their_order(tmp_path, order):
    path = recipe(tmp_path, "train: {epochs: 7, seed: 5}\nmethod: {name: simclr, temperature: 0.5}")
    groups = [["--train.epochs", "3"], ["--method.temperature", "0.7"]]
    groups.insert(order, ["--config", path])
    config = parse([word for group in groups for word in group]).config
    assert (config.train.epochs, config.train.seed) == (3, 5)
    assert (config.method.name, config.method.temperature) == ("simclr", 0.7)
    assert parse(["--config", recipe(tmp_path, "# nothing")]).config == cfg.Config()


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
        ConfigError, match=r"rotation.fraction_end: got 0.125, expected at least 0.25.*, or none: the share stays"
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
    lines = [f"method.{key}: {now} in place of {was}" for key, (was, now) in cut.items()]
    assert [line.split(": there")[0] for line in cfg.cut_down(asked, resolved)] == lines
    for key, (_, now) in cut.items():
        assert getattr(resolved.method, key) == now


@pytest.mark.parametrize(
    ("content", "flags", "batch", "side"),
    [
        ("data: {name: imagefolder, root: /x, download: false}\ntrain: {batch_size: 4096, epochs: 300}", "", 2, 224),
        ("data: {name: cifar10, root: /x, download: true}\noptim: {warmup_epochs: 10, lr: 0.1}", "", 2, 32),
        (
            "data: {name: imagefolder, root: /x, image_size: 96}\ntrain: {accumulate: 4, stop_after: 50, epochs: 90}",
            "",
            8,
            96,
        ),
        ("", "--train.accumulate 4", 8, 28),
        ("rotation: {fraction: 0.25}\ntrain: {accumulate: 2}", "", 16, 28),
        ("method: {name: swav, prototypes: 3000, queue_size: 3840}\ntrain: {epochs: 400}", "", 2, 28),
        ("method: {name: swav, queue_size: 0}", "", 2, 28),
        ("method: {name: mocov2, queue_size: 65536}", "--method.momentum 0.999", 2, 28),
    ],
)
def test_smoke_shrinks_any_recipe_to_two_steps(tmp_path, content, flags, batch, side):
    argv = ["--config", recipe(tmp_path, content or "# nothing"), *flags.split()]
    asked, config = parse(argv).config, parse([*argv, "--smoke"]).config
    assert (
        config.data
        == cfg.replace(
            asked,
            {
                "data.name": "synthetic",
                "data.image_size": side,
                "data.root": None,
                "data.download": False,
                "data.limit": 2 * batch,
            },
        ).data
    )
    assert (config.train.batch_size, config.train.epochs, config.optim.warmup_epochs) == (batch, 1, 0)
    assert (config.scaling.num_workers, config.tracking.experiment) == (0, "smoke")
    resolved = cfg.resolve(config, side, 2 * batch)  # two steps
    queue = getattr(asked.method, "queue_size", 0)
    assert getattr(resolved.method, "queue_size", 0) == (batch if queue else 0)
    kept = {"method.queue_size", "train.batch_size", "train.epochs", "train.stop_after", "optim.warmup_epochs"}
    before, after = cfg.flat(asked), cfg.flat(config)
    for key in before.keys() - kept:
        if not key.startswith(("data.", "scaling.", "tracking.", "storage.")):
            assert after[key] == before[key], key


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


SAME_RUN = ["scaling.num_workers=0", "tracking.run_name=x", "storage.path=/x", "train.stop_after=3"]
OTHER_RUN = ["train.seed=1", "rotation.weight=0", "data.limit=999", "method.momentum=0.9", "model.norm=batch"]


@pytest.mark.parametrize("given", SAME_RUN + OTHER_RUN)
def test_the_identity_is_what_is_computed_and_nothing_else(given):
    same = given in SAME_RUN
    key, value = given.split("=")
    before, after = (cfg.resolve(cfg.build(given), 28, 5000) for given in ({}, {key: value}))
    assert (cfg.fingerprint(before) == cfg.fingerprint(after)) is same
    assert (key in cfg.identity_of(before)) is not same


def test_names_of_runs_are_those_of_before():
    # Another hash would start every run and sweep anew that has no name of its own; only a change of what is computed may.
    assert cfg.fingerprint(cfg.resolve(cfg.build({}), 28, 5000)) == "4d43d1e4"


@pytest.mark.parametrize("given", ["", "method.name=simclr optim.lr=1e-5 views.blur=1,0.1", "tracking.run_name=12"])
def test_a_printed_config_read_again_is_the_same_run(tmp_path, given):
    config = cfg.resolve(cfg.build(dict(word.split("=") for word in given.split())), 28, 5000)
    again = parse(["--config", recipe(tmp_path, yaml.safe_dump(cfg.to_dict(config), sort_keys=False))]).config
    assert again == config
    assert cfg.resolve(again, 28, 5000) == config
    assert cfg.fingerprint(again) == cfg.fingerprint(config)


def test_errors_are_one_line_and_a_code(capsys):
    def body(error):
        raise error

    for error, code, shown in ((ConfigError("a: got 1,\n not 2"), 2, "1, not 2"), (KeyboardInterrupt(), 130, "")):
        with pytest.raises(SystemExit) as ended:
            run_command(lambda error=error: body(error))
        written = capsys.readouterr()
        assert ended.value.code == code
        assert (written.out, written.err.count("\n")) == ("", 1)
        assert shown in written.err


def test_a_bad_flag_is_refused_without_importing_anything_heavy():
    code = """
import atexit, sys
from rotssl.config.cli import parse
from rotssl.commands import run_command
atexit.register(lambda: print(sorted({"torch", "ray", "mlflow", "numpy"} & set(sys.modules))))
run_command(lambda: parse(["--train.epochs", "0"]) and 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == "[]\n"
    assert done.stderr.splitlines() == ["error: train.epochs: got '0', expected an integer at least 1"]


def test_every_smoke_run_is_a_new_one(tmp_path):
    first, second = (parse(["--smoke"]).config.storage.path for _ in range(2))
    assert first != second
    assert parse(["--smoke", "--storage.path", str(tmp_path)]).config.storage.path == str(tmp_path)
