"""What the command line offers, which of its parts win, and what --smoke makes of a recipe."""

import subprocess
import sys

import pytest

from rotssl import config as cfg
from rotssl.config.cli import parse
from rotssl.config.fields import convert
from rotssl.config.methods import METHODS
from tests.config.command_lines import recipe


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


@pytest.mark.parametrize("order", [0, 1, 2])
def test_flags_win_over_the_recipe_whatever_their_order(tmp_path, order):
    path = recipe(tmp_path, "train: {epochs: 7, seed: 5}\nmethod: {name: simclr, temperature: 0.5}")
    groups = [["--train.epochs", "3"], ["--method.temperature", "0.7"]]
    groups.insert(order, ["--config", path])
    config = parse([word for group in groups for word in group]).config
    assert (config.train.epochs, config.train.seed) == (3, 5)
    assert (config.method.name, config.method.temperature) == ("simclr", 0.7)
    assert parse(["--config", recipe(tmp_path, "# nothing")]).config == cfg.Config()


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


def test_a_smoke_run_has_a_step_of_each_side_of_the_views():
    shrunk = [
        parse([*flags, "--smoke"]).config.views for flags in (["--method.name", "dino"], ["--views.size_start", "16"])
    ]
    assert [(views.size_start, views.size_until) for views in shrunk] == [(None, 0.75), (16, 0.5)]


def test_every_smoke_run_is_a_new_one(tmp_path):
    first, second = (parse(["--smoke"]).config.storage.path for _ in range(2))
    assert first != second
    assert parse(["--smoke", "--storage.path", str(tmp_path)]).config.storage.path == str(tmp_path)


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
