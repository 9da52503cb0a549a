"""jobs/evaluate.py: a finished run on the test split, once, below that run in MLflow."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from rotssl.commands.evaluate import evaluate
from rotssl.config.fields import ConfigError
from rotssl.config.sections import DataConfig
from rotssl.data import datasets
from rotssl.runs.state import RunState
from tests.finished import SHORT, copied
from tests.finished import finished as train
from tests.programs import mlflow_client

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.contract
BOTH = ("knn", "linear")


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory):
    return copied(trained, tmp_path_factory.mktemp("finished"))


def logged(config):
    client = mlflow_client(f"sqlite:///{config.storage.path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("rotssl").experiment_id])
    (run,) = [run for run in runs if "kind" not in run.data.tags]
    return run, [other for other in runs if other.data.tags.get("kind") == "evaluation"]


def test_a_run_that_a_version_without_some_fields_recorded_is_measured(trained, tmp_path, capsys):
    config = copied(trained, tmp_path, off=True)
    file = config.run_dir / "config.yaml"
    content = yaml.safe_load(file.read_text())
    for section, leaf in (
        ("rotation", "fraction_end"),
        ("rotation", "crop_size"),
        ("views", "local_size"),
        ("data", "store"),
    ):
        del content[section][leaf]
    file.write_text(yaml.safe_dump(content))
    assert evaluate(None, str(config.run_dir), ("knn",), "") == 0 and "kNN top-1 on test" in capsys.readouterr().out
    file.write_text("train: 5\n")
    with pytest.raises(ConfigError, match=r"^train: got 5"):
        evaluate(None, str(config.run_dir), ("linear",), "")


def test_the_test_split_is_measured_once_below_the_run(finished, capsys, monkeypatch):
    assert evaluate(None, str(finished.run_dir), BOTH, "") == 0
    first = capsys.readouterr().out
    run, children = logged(finished)
    found = {child.data.params["card.protocol"]: child for child in children}
    for name, metrics in (("knn", {"knn/top1", "feature/effective_rank"}), ("linear", {"linear/top1"})):
        child = found[name]
        assert child.data.tags["mlflow.parentRunId"] == run.info.run_id and child.info.status == "FINISHED"
        assert set(child.data.metrics) == metrics and "queries test" in child.data.params[f"{name}_protocol"]
    assert "kNN top-1 on test" in first and f"{found['knn'].data.metrics['knn/top1']:.1%}" in first

    def measured_again(*_):
        raise AssertionError("the test split was read again")

    monkeypatch.setattr(datasets, "load_test", measured_again)
    uri = f"sqlite:///{finished.storage.path}/mlflow.db"
    assert evaluate(run.info.run_id, None, BOTH, uri) == 0  # by its id this time
    again = capsys.readouterr().out
    assert again == "already measured:\n" + first and len(logged(finished)[1]) == 2
    assert evaluate(None, str(finished.run_dir), ("knn",), "") == 0 and len(logged(finished)[1]) == 2


def test_only_what_is_missing_is_measured(trained, tmp_path, capsys):
    config = copied(trained, tmp_path)
    for protocols in (("knn",), ("linear", "knn")):
        assert evaluate(None, str(config.run_dir), protocols, "") == 0
    _, children = logged(config)
    both = {key for child in children for key in child.data.params if key.endswith("_protocol")}
    assert len(children) == 2 and both == {"knn_protocol", "linear_protocol"}
    assert "linear probe top-1 on test" in capsys.readouterr().out


def test_the_encoder_and_the_images_are_those_of_the_run(tmp_path, capsys):
    """On test images that are the validation images, the numbers are those of the run's last epoch."""
    root = tmp_path / "data"
    for split, other in (("train", 0), ("val", 1), ("test", 1)):
        for label in range(2):
            for i in range(40):
                gen = np.random.default_rng((other, label, i))
                pixels = gen.integers(0, 256, (16, 16, 3)) // (1 + label)
                file = root / split / f"class{label}" / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(file)
    config = train(tmp_path, **{"data.name": "imagefolder", "data.root": str(root), "data.limit": None})
    evaluate(None, str(config.run_dir), BOTH, "")
    run, children = logged(config)
    assert len(children) == 2
    for key, value in (pair for child in children for pair in child.data.metrics.items()):
        assert value == run.data.metrics[key], key
    assert "warning: images of test" not in capsys.readouterr().out


def test_images_of_test_that_were_trained_on_are_said(tmp_path, capsys):
    for split, seeds in (("train", range(20)), ("val", range(20, 40)), ("test", range(18, 38))):
        for seed in seeds:
            file = tmp_path / "data" / split / "ab"[seed % 2] / f"{seed}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)).save(file)
    fields = {
        "data.name": "imagefolder",
        "data.root": str(tmp_path / "data"),
        "data.limit": None,
        "train.batch_size": 16,
        **SHORT,
    }
    config = train(tmp_path, **fields)
    assert "warning: images of" not in capsys.readouterr().err
    evaluate(None, str(config.run_dir), ("knn",), "")
    assert "warning: images of test that are also in train (identical pixels): 2\n" in capsys.readouterr().out


def test_what_cannot_be_evaluated_is_refused(tmp_path, finished):
    shutil.copy(finished.run_dir / "config.yaml", tmp_path)
    with pytest.raises(ConfigError, match="does not hold a finished run \\(status: new\\)"):
        evaluate(None, str(tmp_path), BOTH, "")
    unfinished = RunState.read(finished.run_dir / "run.json", {})
    unfinished.path = tmp_path / "run.json"
    unfinished.write("interrupted")
    with pytest.raises(ConfigError, match="does not hold a finished run \\(status: interrupted\\)"):
        evaluate(None, str(tmp_path), BOTH, "")
    with pytest.raises(ConfigError, match="has no run 'nothing'"):
        evaluate("nothing", None, BOTH, f"sqlite:///{finished.storage.path}/mlflow.db")
    with pytest.raises(ConfigError, match="no file"):
        evaluate("nothing", None, BOTH, f"sqlite:///{tmp_path}/mlflow.db")
    assert not (tmp_path / "mlflow.db").exists()
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "cat" / "1.png")
    with pytest.raises(ConfigError, match="no labelled test split"):
        datasets.load_test(DataConfig(name="imagefolder", root=str(tmp_path), image_size=16))


@pytest.mark.parametrize("name", ["fashion-mnist-sample", "synthetic"])
def test_test_images_are_none_that_a_run_reads(name):
    config = DataConfig(name=name, image_size=28)
    splits, test = datasets.load(config, 0.1), datasets.load_test(config)
    read = {image.tobytes() for part in (splits.train, splits.validation) for image in part.images}
    assert len(test.images) >= 200 and not any(image.tobytes() in read for image in test.images)
    assert set(test.labels) == set(splits.train.labels)


@pytest.mark.parametrize("given", ["", "--run x --checkpoint y", "--checkpoint x --protocol vote"])
def test_a_mistake_is_one_line(main, given):
    code, _, err = main("evaluate.py", *given.split())
    assert code == 2 and len(err.splitlines()) == 1, err
