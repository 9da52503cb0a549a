"""jobs/analyze.py as a user starts it."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from rotssl.tracking import store, writer
from tests.programs import with_store
from tests.reports.test_studies import table1

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """A store with an experiment ``removed`` whose runs removed false negatives."""
    folder = tmp_path_factory.mktemp("store")
    with_store(folder)
    address = store.default_uri(str(folder))
    for record in table1(0.05)[:6]:
        tags = {**record.tags, "labels_in_pretraining": "an oracle"}
        run_id = writer.open_run(address, "removed", record.name, None, record.params, tags, folder / "artifacts")
        tracker = writer.Tracker(address, run_id)
        assert tracker.sync(record.points) and tracker.finish(record.status, "completed", [])
    return address


def test_a_sweep_beside_the_paper(uri, tmp_path, main):
    flags = ("--uri", uri, "--experiment", "removed", "--metric", "knn/top1", "--output", tmp_path / "out")
    code, out, err = main("analyze.py", "sweep", "--study", "table1", *flags)
    assert code == 0, err
    assert "simclr, plain: from 0% to 100%: +5.0 (one seed) points; the paper has no such number." in out
    assert "the paper's numbers are of a linear classifier: none is set beside knn/top1" in err
    assert "warning: LABELS WERE USED IN PRETRAINING in 6 of 6 runs: an oracle." in err
    numbers = json.loads((tmp_path / "out" / "table1.json").read_text())
    assert numbers["reading"] and numbers["warnings"][0].startswith("LABELS")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"table1.png", "table1.json", "table1.md"}
    code, _, err = main("analyze.py", "sweep", "--study", "figureA4", *flags)
    assert code == 2 and "are both plain, but differ in oracle.false_negatives: choose one sweep" in err


def test_signal_and_noise_of_a_run(tmp_path, main):
    root, pixels = tmp_path / "data", np.random.default_rng(0)
    for i in range(64):
        for split in ("train", "val"):
            file = root / split / "ab"[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.integers(0, 256, (16, 16, 3), np.uint8)).save(file)
    small = ("--data.name", "imagefolder", "--data.root", root, "--data.image_size", 16, "--train.batch_size", 16)
    small += ("--train.epochs", 2, "--optim.warmup_epochs", 1, "--rotation.weight", 1, "--views.size_start", "none")
    small += ("--evaluation.knn_every", 0, "--evaluation.linear", "false", "--scaling.num_workers", 0)
    small += (
        "--storage.path",
        tmp_path,
        "--tracking.uri",
        "off",
        "--tracking.run_name",
        "run",
        "--method.hidden_dim",
        16,
    )
    code, _, err = main("pretrain.py", *small)
    assert code == 0, err
    folder = tmp_path / "rotssl" / "run"
    code, out, err = main("analyze.py", "gradients", "--checkpoint", folder, "--batches", 3)
    assert code == 0, err
    lines = [line for line in out.splitlines() if line.startswith("epoch")]
    assert [line.split()[1] for line in lines] == ["0", "1", "2"] and all("SNR rotation" in line for line in lines)
    numbers = json.loads((folder / "signal" / "signal.json").read_text())
    assert [point["epoch"] for point in numbers["points"]] == [0, 1, 2] and numbers["batches"] == 3
    for flags, reason in (
        (("--batches", 1), "--batches: got 1, expected at least 2"),
        (("--data.root", tmp_path / "none"), f"data.root: {tmp_path / 'none'} is not there any more"),
    ):
        code, _, err = main("analyze.py", "gradients", "--checkpoint", folder, *flags)
        assert code == 2 and err.startswith(f"error: {reason}") and len(err.splitlines()) == 1
    shutil.copy(root / "train" / "a" / "0.png", root / "train" / "a" / "2.png")
    code, _, err = main("analyze.py", "gradients", "--checkpoint", folder)
    assert (code, err) == (2, "error: data.root: the run was trained on other images: 1 image was replaced\n")


def test_the_overlap_of_crops(tmp_path, main):
    few = "--views.global_scale", "0.08,1", "--output", tmp_path / "out"
    flags = (*few, "--views.min_overlap", 0.4)
    code, out, err = main("analyze.py", "overlap", "--scaling.num_workers", 0, *flags)
    assert code == 0, err
    assert out.startswith("IoU of two crops of an image, ") and "views.min_overlap 0.4" in out
    numbers = json.loads((tmp_path / "out" / "overlap.json").read_text())
    assert numbers["below_bound"] < 0.15 and numbers["mean"] > 0.4 and numbers["percentiles"]["100"] <= 1
    assert "saliency of its image in a crop: mean" in out and "of the crops are more salient than their image" in out
    before = numbers["saliency"]
    code, out, err = main("analyze.py", "overlap", "--scaling.num_workers", 0, *few, "--views.good_crops", 1)
    assert code == 0, err
    after = json.loads((tmp_path / "out" / "overlap.json").read_text())["saliency"]
    assert 0.5 < before["good"] < 0.95 and after["good"] > 0.99 and 0 < before["percentiles"]["50"] < 1
    code, _, err = main("analyze.py", "overlap", "--views.min_overlap", 2)
    assert code == 2 and err.startswith("error: views.min_overlap: got '2'")
