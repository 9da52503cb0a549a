"""The page of a run: what is on it, and what keeps it from being made."""

import json
import re

import numpy as np
import pytest

from rotssl import config as cfg
from rotssl.commands import report as command
from rotssl.config.fields import ConfigError
from rotssl.reports import run_plots
from tests.finished import copied, finished


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """A finished run with rotation, whose experiment has a name that is no HTML."""
    return copied(trained, tmp_path_factory.mktemp("runs"), off=True, **{"tracking.experiment": "<b>"}).run_dir


@pytest.mark.contract
def test_the_page_has_all_of_it_and_needs_nothing_else(run, main):
    code, out, err = main("report.py", "--checkpoint", run, "--images", 60)
    assert (code, err) == (0, "") and str(run / "report" / "report.html") in out
    page = (run / "report" / "report.html").read_text()
    for title in (
        "Curves",
        "Map of the features",
        "Nearest neighbours",
        "What rotation confuses",
        "What tells the angle",
    ):
        assert f"<h2>{title}</h2>" in page
    sources = re.findall(r'(?:src|srcset|href)="([^"]{0,40})', page)
    assert len(sources) > 60 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "prefers-color-scheme: dark" in page and "http" not in re.sub(r"data:[^\"]*", "", page)
    assert "&lt;b&gt;" in page and "<b>\n" not in page
    numbers = json.loads((run / "report" / "report.json").read_text())
    assert numbers["angles"] == ["0°", "90°", "180°", "270°"] and len(numbers["by_class"]) == 4
    assert np.allclose(np.sum(numbers["confusion"], axis=1), 1)
    assert sum(count for _, count, _ in numbers["by_class"]) == 60
    assert numbers["measures"][0] != ["knn/top1", "kNN"] and numbers["measures"][0][0] == "kNN top-1, validation"
    again = page
    assert main("report.py", "--checkpoint", run, "--images", 60)[0] == 0
    assert (run / "report" / "report.html").read_text() == again


@pytest.mark.exhaustive
def test_a_run_without_a_rotation_head_that_was_stopped(main, tmp_path):
    run = finished(tmp_path, **{"tracking.uri": "off", "rotation.weight": 0, "train.stop_after": 1}).run_dir
    code, _, err = main("report.py", "--checkpoint", run, "--images", 40, "--output", tmp_path / "page")
    assert (code, err) == (0, "")
    page = (tmp_path / "page" / "report.html").read_text()
    assert "This run has no rotation head" in page and "What rotation confuses</h2>" not in page
    assert "epoch 1; stopped (stop_after)" in page


@pytest.mark.contract
def test_what_cannot_be_shown_is_one_line(run, main, tmp_path, monkeypatch):
    from rotssl.runs import checkpoint

    for arguments, words in (
        (("--checkpoint", run, "--images", 1), "--images: got 1, expected at least 2"),
        (("--run", "0" * 32, "--uri", f"sqlite:///{run.parent}/none.db"), "none.db"),
    ):
        code, _, err = main("report.py", *arguments)
        assert code == 2 and err.startswith("error: ") and words in err and err.count("\n") == 1
    found = checkpoint.load(run / "epoch_00002")
    found["model"].popitem()
    monkeypatch.setattr(checkpoint, "load", lambda folder: dict(found))
    code, _, err = main("report.py", "--checkpoint", run)
    assert code == 2 and "checkpoint.pt is of other networks than the run" in err and err.count("\n") == 1


def test_pictures_of_any_kind_are_tiles_of_one_size():
    import base64
    import io

    from PIL import Image

    for shape in ((1, 28, 28), (3, 8, 8), (3, 300, 300)):
        picture = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
        heat = np.zeros(shape[1:], np.float32)
        heat[: shape[1] // 2] = 1
        for source in (run_plots.tile(picture), run_plots.heated(picture, heat)):
            image = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
            assert image.size == (96, 96) and image.mode == "RGB"
        hot, cold = np.asarray(image)[:40].mean(), np.asarray(image)[56:].mean()
        assert hot > cold + 40


def test_the_api_takes_a_folder_only(tmp_path):
    import rotssl

    with pytest.raises(ConfigError, match=r"^run: .* has no config.yaml: expected the folder of a run$"):
        rotssl.report(tmp_path)


def test_a_page_says_that_labels_were_used_and_that_the_task_ended():
    given = {"method.name": "simclr", "oracle.false_negatives": 0.5, "rotation.until": 0.5, "rotation.weight": 1.0}
    labels, ended = command._warnings(cfg.resolve(cfg.build(given), 28, 1000), {})
    words = "an oracle removes false negatives, given the labels of 50% of the images"
    assert labels == f"LABELS WERE USED IN PRETRAINING: {words}."
    assert ended == "The rotation task ended at 50% of the run: its head is as it was then."
