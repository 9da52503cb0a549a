"""jobs/export.py: its files, its model card, the model that MLflow serves, and what it refuses."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import rotssl
from rotssl.commands.evaluate import evaluate
from rotssl.commands.export import export
from rotssl.export import card as cards
from rotssl.export import formats, records, served
from rotssl.export.encoder import Encoder
from rotssl.runs.state import RunState
from rotssl.tracking import registry
from tests.conftest import free_port
from tests.export.made import noise
from tests.finished import SHORT, finished, store_of
from tests.programs import ROOT, mlflow_client, started, wait_for

pytestmark = pytest.mark.contract
GUIDE = ROOT / "docs" / "export.md"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose encoder torchvision and timm have, with an accuracy on test."""
    fields = {"encoder.name": "resnet18", "encoder.stem": "imagenet", "data.image_size": 32, "data.limit": 64}
    made = finished(tmp_path_factory.mktemp("run"), **SHORT, **fields)
    assert evaluate(None, str(made.run_dir), ("knn", "semi"), "") == 0
    return made


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("picture") / "PICTURE.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(file)
    return file


def test_the_card_says_of_which_network_and_epoch_and_whether_labels_were_used(run):
    encoder, known = rotssl.load_encoder(run.run_dir), records.read(run.run_dir)
    known = dataclasses.replace(
        known, measures=(*known.measures, records.Measure("teacher/knn", 0.123, "test", "as it was"))
    )

    def card(config=known.config, **about):
        made = Encoder(encoder.network, encoder.dim, encoder.about | about)
        return cards.card(made, dataclasses.replace(known, config=config))

    own = card()
    assert "| knn |" in own and "teacher/knn" not in own and "1 of 1 epochs" in own
    assert "pretrained without labels" in own and "Labels took no part" in own
    teacher = card(network="teacher")
    assert "| teacher/knn | 12.30% | test | as it was |" in teacher and "| knn |" not in teacher
    early = card(epoch=0)
    assert "0 of 1 epochs" in early and "None of this network after this epoch are on record" in early
    assert "| knn |" not in early and "Images seen" not in early
    oracle = dataclasses.replace(known.config.oracle, false_negatives=0.5)
    told = card(dataclasses.replace(known.config, oracle=oracle))
    assert "Labels took part" in told and "given the labels of 50% of the images" in told
    assert "pretrained with labels" in told and "without labels" not in told


def test_a_run_is_exported_with_what_its_records_say(run, main, tmp_path):
    import timm

    state = RunState.read(run.run_dir / "run.json", {})
    names = "timm,torchvision,safetensors,huggingface"
    given = "--run", state.run_id, "--uri", store_of(run), "--format", names, "--output", tmp_path, "--licence", "mit"
    code, out, err = main("export.py", *given)
    assert code == 0, err
    assert "the student of run, 512 features:" in out and out.count("features differ by 0)") == 4, out
    encoder = rotssl.load_encoder(run.run_dir)
    x = noise(encoder)
    timms = timm.create_model(f"local-dir:{tmp_path / 'huggingface'}", pretrained=True).eval()
    with torch.no_grad():
        wanted = encoder(x)
        for again in (rotssl.load_encoder(tmp_path), rotssl.load_encoder(tmp_path / "huggingface"), timms):
            torch.testing.assert_close(again(x), wanted, rtol=1e-5, atol=1e-5)
    card = (tmp_path / "huggingface" / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "license": "mit",
    }
    tags = mlflow_client(store_of(run)).get_run(state.run_id).data.tags
    for words in (
        tags["git_commit"],
        state.run_id,
        "The weights: mit.",
        "resnet18",
        "byol",
        "synthetic",
        "1 of 1 epochs",
    ):
        assert words in text, words
    rows = re.findall(r"^\| knn \| ([\d.]+)% \| (\w+) \| (.*) \|$", text, re.MULTILINE)
    assert [split for _, split, _ in rows] == ["validation", "test"]
    assert all(f"queries {split}" in protocol and "k=200" in protocol for _, split, protocol in rows)
    assert "(reduced to k=64)" in rows[0][2]
    parts = dict(re.findall(r"^\| semi/(\w+) \| .* \| test \| (.*) \|$", text, re.MULTILINE))
    assert parts.keys() == {"1pct", "10pct"}  # each says what it has of its own, and what it was measured with
    for name, share in (("1pct", "share 0.01"), ("10pct", "share 0.1")):
        assert f"{share}," in parts[name] and "penalty " in parts[name] and "card." not in parts[name]
        assert "0.01, 0.1" not in parts[name] and "run " not in parts[name]
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert recipe["train.batch_size"] == 32 and "data.root" not in recipe
    assert str(run.storage.path) not in text


def test_a_folder_that_cannot_be_written_whole_is_not_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(cards, "card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(None, str(run.run_dir), ("huggingface",), str(tmp_path / "out"), "auto", "")
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_a_teacher_that_was_not_measured_has_no_accuracies_of_its_own(run, main, tmp_path):
    code, out, err = main(
        "export.py",
        "--checkpoint",
        run.run_dir,
        "--network",
        "teacher",
        "--format",
        "huggingface",
        "--output",
        tmp_path,
    )
    assert code == 0 and "the teacher of run" in out, err
    text = (tmp_path / "huggingface" / "README.md").read_text()
    assert "None of this network are on record." in text
    assert "The licence of these weights is not stated." in text and "license:" not in text
    x = noise(rotssl.load_encoder(tmp_path / "huggingface"))
    with torch.no_grad():
        teacher = rotssl.load_encoder(run.run_dir, "teacher")(x)
        torch.testing.assert_close(rotssl.load_encoder(tmp_path / "huggingface", "teacher")(x), teacher)
        assert float((rotssl.load_encoder(run.run_dir)(x) - teacher).abs().max()) > 1e-3


def test_all_leaves_out_what_does_not_fit_and_says_so(main, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "_EXTRA", ("onnxscript_of_nobody",))
    made = finished(tmp_path, **SHORT, **{"tracking.uri": "off", "data.limit": 64})
    code, out, err = main("export.py", "--checkpoint", made.run_dir, "--format", "all")
    assert (
        code == 0 and "torchvision is left out: torchvision has no encoder small" in err and "timm is left out" in err
    )
    assert "onnx is left out: onnxscript_of_nobody not installed" in err and out.count("features differ by 0)") == 2
    files = {path.name for path in (made.run_dir / "export").iterdir()}
    assert files == {"encoder.safetensors", "encoder.json", "huggingface"}
    assert rotssl.load_encoder(made.run_dir / "export" / "huggingface").dim == 96
    code, _, err = main("export.py", "--checkpoint", made.run_dir, "--format", "mlflow")
    assert (code, err.count("\n")) == (2, 1) and "is of a run that is not in MLflow" in err


@pytest.fixture(scope="module")
def registered(run):
    """The address of the run's encoder in the registry, and that of its teacher."""
    from rotssl.commands.export import export

    for network in ("student", "teacher"):
        assert export(None, str(run.run_dir), ("mlflow",), None, network, "", "encoder") == 0
    return "models:/encoder/1", "models:/encoder/2"


def test_a_registered_model_has_a_signature_and_is_loaded_by_version_and_by_alias(run, registered, picture):
    client = mlflow_client(store_of(run))
    client.set_registered_model_alias("encoder", "best", "2")
    version = client.get_model_version("encoder", "1")
    assert version.run_id == RunState.read(run.run_dir / "run.json", {}).run_id
    assert (
        version.tags["network"] == "student" and version.tags["dim"] == "512" and len(version.tags["git_commit"]) == 40
    )
    for network, address in (("student", registered[0]), ("teacher", "models:/encoder@best")):
        encoder = rotssl.load_encoder(address, uri=store_of(run))
        x = noise(encoder)
        with torch.no_grad():
            assert torch.equal(encoder(x), rotssl.load_encoder(run.run_dir, network)(x))
    place = version.source.removeprefix(f"runs:/{version.run_id}/")
    folder = client.download_artifacts(version.run_id, place)
    from mlflow.models import Model

    model = Model.load(folder)
    assert model.signature.inputs.to_dict() == [{"type": "binary", "name": "picture", "required": True}]
    assert model.signature.outputs.to_dict()[0]["tensor-spec"] == {"dtype": "float32", "shape": (-1, 512)}
    example = model.load_input_example(folder)
    found = served._load_pyfunc(f"{folder}/data/encoder").predict(example)
    assert found.shape == (1, 512) and found.dtype == np.float32


@pytest.mark.exhaustive
def test_what_mlflow_serves_is_what_load_encoder_gives(run, registered, picture, tmp_path, monkeypatch):
    """The commands of the guide: the server, and a picture sent to it."""
    guide = GUIDE.read_text()
    (serve,) = re.findall(r"^(mlflow models serve .*)$", guide, re.MULTILINE)
    (ask,) = re.findall(r"^```python\n(import base64.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    port = free_port()
    serve = serve.replace("models:/encoder/1", registered[0]).replace("5001", port).split()
    ask = ask.replace("5001", port).replace("PICTURE.png", str(picture))
    # Nothing of this checkout: the model carries the code that it needs.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env["MLFLOW_TRACKING_URI"] = store_of(run)
    with started([sys.executable, "-m", *serve], tmp_path / "log", env | {"PYTHONSAFEPATH": "1"}) as server:

        def answers():
            try:
                return urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).status == 200
            except OSError:
                return False

        wait_for(answers, server)
        names = {}
        exec(ask, names)
        body = json.dumps(registry.request([picture.read_bytes()] * 3)).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
        )
        three = json.load(urllib.request.urlopen(request, timeout=60))["predictions"]
    wanted = rotssl.load_encoder(run.run_dir).features([Image.open(picture)])
    torch.testing.assert_close(torch.tensor(names["features"]), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(three), wanted.expand(3, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.exhaustive
def test_a_served_model_needs_what_it_says():
    code = """
import sys
import rotssl.export.served as served
from importlib.metadata import packages_distributions
top = {name.partition(".")[0] for name in sys.modules}
known = packages_distributions()
print(*sorted({known[name][0].lower() for name in top if name in known}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    listed = (ROOT / "pyproject.toml").read_text().partition("dependencies = [")[2].partition("]\n\n")[0]
    ours = {re.split(r"[\[>]", name)[0] for name in re.findall(r'"(.*)"', listed)}
    optional = {"nvidia-ml-py"}  # torch imports it where it is
    needed = {*served.NEEDS} - {"timm"}  # only timm's encoders need that
    assert set(done.stdout.split()) & ours - optional == needed


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "one of the arguments --run --checkpoint is required"),
        ("--run x --checkpoint y", "not allowed with argument"),
        (
            "--checkpoint {run} --format keras",
            "--format: got 'keras', expected one or more of safetensors, torchvision",
        ),
        ("--checkpoint {run} --network ema", "network: got 'ema', expected one of auto, student, teacher"),
        ("--checkpoint hdfs://host/x", "--checkpoint: "),
        ("--run x --uri sqlite:///{empty}/no.db", "--uri: no file"),
        ("--checkpoint {run} --format mlflow --model a/b", "model a/b of "),
    ],
)
def test_bad_input_is_one_line_and_code_2(run, main, tmp_path, given, words):
    given = given.format(run=run.run_dir, empty=tmp_path, uri=store_of(run))
    code, _, err = main("export.py", *given.split())
    assert (code, len(err.splitlines())) == (2, 1) and words in err, err


@pytest.mark.parametrize(
    "names", ["safetensors,torchvision,timm,huggingface", pytest.param("all", marks=pytest.mark.exhaustive)]
)
def test_the_guide_loads_what_it_says(run, main, picture, tmp_path, monkeypatch, names):
    """All blocks of Python in docs/export.md but the one that asks a server, in one program."""
    if names == "all":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'rotssl[export]'")
    assert main("export.py", "--checkpoint", run.run_dir, "--format", names, "--output", tmp_path / "exported")[0] == 0
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    blocks = [block for block in blocks if "base64" not in block and (names == "all" or "onnxruntime" not in block)]
    assert len(blocks) >= 4
    monkeypatch.chdir(tmp_path)
    (tmp_path / "PICTURE.png").write_bytes(picture.read_bytes())
    (tmp_path / "results" / "rotssl").mkdir(parents=True)
    (tmp_path / "results" / "rotssl" / "RUN").symlink_to(run.run_dir)
    found, wanted = {}, None
    for block in blocks:
        exec(block, found)
        wanted = found["features"] if wanted is None else wanted
        torch.testing.assert_close(torch.as_tensor(found["features"]), wanted, rtol=1e-5, atol=1e-5)
