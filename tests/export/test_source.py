"""rotssl.load_encoder: what it finds where, and what it says of what it cannot load."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import rotssl
from rotssl.config.fields import ConfigError
from rotssl.data.augment import Augment
from rotssl.data.decoding import fit
from rotssl.export import formats
from rotssl.models.encoders import save_encoder
from rotssl.runs import checkpoint
from rotssl.runs.state import RunState
from tests.export.made import encoder_of, noise
from tests.finished import SHORT, copied, finished, store_of

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def run(trained):
    return trained


@pytest.fixture
def copy(run, tmp_path):
    """The run's folder with one checkpoint, to break."""
    folder = shutil.copytree(run.run_dir, tmp_path / "copy")
    for older in checkpoint.found(folder)[1:]:
        shutil.rmtree(older)
    return folder


def weights(run, network):
    """Of a network, as the checkpoint has them."""
    start = {"student": "encoder.", "teacher": "teacher.0."}[network]
    model = checkpoint.load(checkpoint.found(run.run_dir)[0])["model"]
    return {key.removeprefix(start): value for key, value in model.items() if key.startswith(start)}


def holds(encoder, wanted):
    state = encoder.network.state_dict()
    return state.keys() == wanted.keys() and all(torch.equal(state[key], value) for key, value in wanted.items())


def test_importing_the_package_takes_no_library():
    code = """
import sys, rotssl
assert "load_encoder" in dir(rotssl)
assert not {"torch", "numpy", "mlflow", "yaml"} & set(sys.modules), sorted(sys.modules)
try:
    rotssl.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("network", ["auto", "student", "teacher"])
def test_a_network_is_found_by_folder_and_by_id(run, network):
    state = RunState.read(run.run_dir / "run.json", {})
    newest = checkpoint.found(run.run_dir)[0]
    wanted = weights(run, "teacher" if network == "teacher" else "student")
    assert not holds(rotssl.load_encoder(run.run_dir, "teacher"), weights(run, "student"))
    for source in (run.run_dir, str(run.run_dir), state.run_id, f"runs:/{state.run_id}", newest):
        encoder = rotssl.load_encoder(source, network, store_of(run))
        assert holds(encoder, wanted), source
        assert (encoder.dim, encoder.image_size, encoder.training) == (96, 16, False)
        assert encoder.about["network"] == ("teacher" if network == "teacher" else "student")


def test_the_teacher_of_a_run_that_evaluates_it_is_in_its_file(tmp_path):
    run = finished(tmp_path, **SHORT, **{"evaluation.network": "teacher", "tracking.uri": "off"})
    exported = load_file(run.run_dir / "encoder.safetensors")
    assert holds(rotssl.load_encoder(run.run_dir), exported) and holds(
        rotssl.load_encoder(run.run_dir, "teacher"), weights(run, "teacher")
    )
    assert holds(rotssl.load_encoder(run.run_dir, "student"), weights(run, "student"))


def test_a_run_that_was_stopped_has_the_encoder_of_its_newest_checkpoint(tmp_path, caplog):
    run = finished(tmp_path, **{**SHORT, "train.epochs": 2, "train.stop_after": 1, "tracking.uri": "off"})
    assert not (run.run_dir / "encoder.safetensors").exists()
    assert holds(rotssl.load_encoder(run.run_dir), weights(run, "student"))
    assert "has 1 of 2 epochs" in caplog.text


def test_a_run_whose_folder_is_elsewhere_is_taken_from_mlflow(trained, tmp_path, caplog):
    run = copied(trained, tmp_path)
    run_id, wanted = RunState.read(run.run_dir / "run.json", {}).run_id, weights(run, "student")
    run.run_dir.rename(tmp_path / "elsewhere")
    assert holds(rotssl.load_encoder(run_id, uri=store_of(run)), wanted)
    assert "taking its encoder from MLflow" in caplog.text
    with pytest.raises(ConfigError, match=r"^network: got teacher, expected student, which is what .* holds"):
        rotssl.load_encoder(run_id, "teacher", store_of(run))


def test_an_encoder_of_an_earlier_version_says_less_and_is_loaded(copy, run):
    facts = json.loads((copy / "encoder.json").read_text())
    for key in ("network", "stored", "patch_size"):
        del facts[key]
    (copy / "encoder.json").write_text(json.dumps(facts))
    assert holds(rotssl.load_encoder(copy), weights(run, "student"))


# --- pictures -------------------------------------------------------------------------------------------------------------


def shades(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def evaluated(run, pixels, side, mean, std):
    """What the run's evaluation makes of stored pixels (3 or 1, H, W)."""
    augment = Augment(run.views, side, mean, std, 0)
    return augment.evaluation(torch.from_numpy(np.ascontiguousarray(pixels))[None])[0]


@pytest.mark.parametrize(("stored", "size"), [([16, 16], (16, 16)), ([20, 24], (20, 24)), ([37, 37], (90, 60))])
def test_a_picture_is_seen_as_in_the_evaluation(run, stored, size):
    encoder = encoder_of("small")
    encoder.about["stored"], encoder.image_size = stored, 32
    pixels = shades(*size)
    wanted = pixels.transpose(2, 0, 1) if tuple(stored) == size else fit(Image.fromarray(pixels), 37)
    found = encoder.transform(Image.fromarray(pixels))
    assert torch.equal(found, evaluated(run, wanted, 32, encoder.mean, encoder.std))


def test_shades_of_grey_are_normalised_by_one_number(run):
    encoder = encoder_of("small")
    encoder.mean, encoder.std = (0.286,), (0.353,)
    pixels = shades(16, 16, 1)
    wanted = evaluated(run, pixels.transpose(2, 0, 1), 16, encoder.mean, encoder.std)
    grey = Image.fromarray(pixels[..., 0])
    assert torch.equal(encoder.transform(grey), wanted) and torch.equal(encoder.transform(grey.convert("RGB")), wanted)


def test_pictures_of_any_kind_become_features():
    encoder = encoder_of("small")
    colour = Image.fromarray(shades(30, 50))
    seen = []
    encoder.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    pictures = [colour, colour.convert("L"), colour.convert("P"), colour.convert("RGBA"), Image.fromarray(shades(5, 5))]
    found = encoder.features(pictures, batch=2)
    assert found.shape == (5, 96) and not found.requires_grad
    assert seen == [False] * 3 and torch.backends.cudnn.allow_tf32  # fp32 on a GPU, too
    torch.testing.assert_close(found[3:4], encoder(encoder.transform(colour)[None]))
    assert encoder.features([]).shape == (0, 96)


# --- what cannot be loaded ------------------------------------------------------------------------------------------------


def of_another_encoder(folder):
    other = encoder_of("resnet18")
    save_encoder(other.network, json.loads((folder / "encoder.json").read_text()), folder)
    return "encoder.safetensors is of another encoder than small (stem imagenet): "


def described_as_another(folder):
    other = encoder_of("resnet18")
    save_encoder(other.network, other.about, folder)
    return "encoder.json is of another encoder: encoder resnet18, the run has small"


def cut_short(folder):
    file = folder / "encoder.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "encoder.safetensors cannot be read ("


def no_json(folder):
    (folder / "encoder.json").write_text("[]")
    return "encoder.json cannot be read ("


def without_checkpoint(folder):
    (folder / "encoder.safetensors").unlink()
    for path in checkpoint.found(folder):
        shutil.rmtree(path)
    return "has no checkpoint that can be read, where the student would be; it has no encoder.safetensors either"


@pytest.mark.parametrize(
    "damage",
    [of_another_encoder, described_as_another, cut_short, no_json, without_checkpoint],
    ids=lambda f: f.__name__,
)
def test_a_damaged_run_is_one_line(copy, main, damage):
    words = damage(copy)
    with pytest.raises(ConfigError) as caught:
        rotssl.load_encoder(copy)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    for program in ("export.py", "evaluate.py"):
        code, _, err = main(program, "--checkpoint", copy)
        assert (code, err) == (2, f"error: {caught.value}\n")


def gone(folder, newest):
    shutil.rmtree(newest)
    return "has no checkpoint that can be read"


def torn(folder, newest):
    file = newest / checkpoint.FILE
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"checkpoint.pt cannot be read"):
        rotssl.load_encoder(newest)
    return "has no checkpoint that can be read"


def of_another_configuration(folder, newest):
    state = checkpoint.load(newest)
    config = json.loads(state["config"])
    config["encoder"]["name"] = "resnet18"
    checkpoint.save(state | {"config": json.dumps(config)}, newest)
    with pytest.raises(ConfigError, match=r"checkpoint.pt is of another encoder than resnet18"):
        rotssl.load_encoder(newest)
    return "is of another configuration: encoder.name resnet18 in place of small"


def of_other_weights(folder, newest):
    state = checkpoint.load(newest)
    for start in ("encoder.", "teacher.0."):
        del state["model"][f"{start}stem.0.weight"]
    checkpoint.save(state, newest)
    return "checkpoint.pt is of another encoder than small (stem imagenet): 1 weights missing, such as stem.0.weight"


@pytest.mark.parametrize("damage", [gone, torn, of_another_configuration, of_other_weights], ids=lambda f: f.__name__)
def test_all_programs_say_the_same_of_a_checkpoint_that_cannot_be_used(copy, main, caplog, damage):
    words = damage(copy, *checkpoint.found(copy))
    with pytest.raises(ConfigError) as caught:
        rotssl.load_encoder(copy, "teacher")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    if damage is gone:
        assert str(caught.value).endswith(", where the teacher would be; the student is in encoder.safetensors")
    for command in (
        "export.py --network teacher",
        "evaluate.py --network teacher",
        "report.py",
        "analyze.py gradients",
    ):
        code, _, err = main(*command.split(), "--checkpoint", copy)
        *told, last = err.splitlines()
        assert code == 2 and last.startswith(f"error: {str(caught.value).partition(', where')[0]}"), (command, err)
        assert all(line.startswith("warning: checkpoint ") for line in told) and (damage is torn or not told)


def test_all_programs_say_the_same_of_a_run_that_is_not_there(tmp_path, run, main):
    for program in ("export.py", "evaluate.py", "report.py", "analyze.py gradients"):
        for place, what in ((tmp_path, "has no config.yaml"), (tmp_path / "nowhere", "is not there")):
            code, _, err = main(*program.split(), "--checkpoint", place)
            assert (code, err) == (2, f"error: --checkpoint: {place} {what}: expected the folder of a run\n")
        if "gradients" not in program:
            code, _, err = main(program, "--run", "0" * 32, "--uri", store_of(run))
            assert (code, err) == (2, f"error: --run: {store_of(run)} has no run {'0' * 32!r} with a folder\n")


def test_a_method_without_a_teacher_is_said(tmp_path):
    run = finished(tmp_path, **SHORT, **{"method.name": "simclr", "tracking.uri": "off"})
    for source in (run.run_dir, checkpoint.found(run.run_dir)[0]):
        with pytest.raises(ConfigError, match="network: got teacher, expected student: simclr has no teacher"):
            rotssl.load_encoder(source, "teacher")


def test_an_export_has_one_network(tmp_path):
    formats.write(encoder_of("small", network="teacher"), "safetensors", tmp_path)
    assert rotssl.load_encoder(tmp_path, "teacher")(noise(encoder_of("small"))).shape == (4, 96)
    with pytest.raises(ConfigError, match=r"network: got student, expected teacher, which is what .* holds"):
        rotssl.load_encoder(tmp_path, "student")


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("{}/nowhere", {}, "nowhere is not there: expected the folder of a run or of an export, the id of a run"),
        ("{}", {}, "holds no encoder: expected the folder of a run or of an export"),
        ("0123456789abcdef0123456789abcdef", {}, "has no run '0123456789abcdef0123456789abcdef'"),
        ("runs:/nothing", {}, "has no run 'nothing'"),
        ("models:/nothing/1", {}, "models:/nothing/1 of .* cannot be used"),
        ("models:/nothing@best", {}, "models:/nothing@best of .* cannot be used"),
        ("models:/nothing", {}, "got 'models:/nothing', expected models:/NAME/VERSION or models:/NAME@ALIAS"),
        ("models:/a/1", {"uri": "sqlite:///{}/no.db"}, "no file .*no.db"),
        ("runs:/a", {"uri": "sqlite:///{}/no.db"}, "no file .*no.db"),
        ("models:/a/1", {"uri": "ftp://x"}, "got 'ftp://x', expected sqlite:///FILE"),
        ("hdfs://host/x", {}, "got 'hdfs://host/x'|hdfs://host/x"),
        ("{}", {"network": "ema"}, "network: got 'ema', expected one of auto, student, teacher"),
    ],
)
def test_what_is_not_there_is_one_line(run, tmp_path, source, options, words):
    options = {"uri": store_of(run)} | {key: value.format(tmp_path) for key, value in options.items()}
    with pytest.raises(ConfigError, match=words) as caught:
        rotssl.load_encoder(source.format(tmp_path), **options)
    assert "\n" not in str(caught.value)
