"""What a start checks and says before its first step."""

import pytest

from rotssl import config as cfg
from rotssl.data import datasets
from rotssl.data.record import FILE, Record
from rotssl.engine.events import Note
from rotssl.engine.runtime import RunFailed
from tests.data.pictures import draw, folder
from tests.small_runs import make_config, trainer

pytestmark = pytest.mark.contract


def start(tmp_path, epochs=None, store="memory"):
    """One start of a run on the images in a folder; returns what it said."""
    fields = {
        "data.name": "imagefolder",
        "data.root": str(tmp_path / "data"),
        "data.image_size": 16,
        "data.limit": None,
    }
    fields |= {"train.epochs": 2, "train.batch_size": 8, "data.store": store, "data.cache": str(tmp_path / "cache")}
    config = make_config(tmp_path, "simclr", **fields)
    run = trainer(cfg.replace(config, {"train.stop_after": epochs}), datasets.load(config.data, 0.2))
    said = []
    run.runtime.progress = said.append
    run.run()
    return config.run_dir, [event.text for event in said if isinstance(event, Note)]


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_a_run_says_its_data_and_does_not_resume_with_other_images(tmp_path, store):
    folder(tmp_path / "data", each=10)
    place, said = start(tmp_path, 1, store)
    assert said[0] == "data: 20 images in 2 classes (train 16, validation 4), 16 x 16"
    new = draw(tmp_path / "data" / "bee" / "new.png")
    with pytest.raises(RunFailed, match=r"^data\.root: .* other images: 1 image was added; restore them, or choose"):
        start(tmp_path, None, store)
    new.unlink()
    old = (tmp_path / "data" / "ant" / "4.png").read_bytes()
    draw(tmp_path / "data" / "ant" / "4.png", colour=(9, 9, 9))
    with pytest.raises(RunFailed, match=r"1 image was replaced"):
        start(tmp_path, None, store)
    (tmp_path / "data" / "ant" / "4.png").write_bytes(old)
    assert "resuming after epoch 1" in start(tmp_path, None, store)[1]
    assert Record.read(place) is not None


def test_a_run_without_a_record_goes_on_and_gets_one_and_a_damaged_one_is_said(tmp_path, caplog):
    folder(tmp_path / "data", each=10)
    place, _ = start(tmp_path, 1)
    (place / FILE).unlink()
    start(tmp_path, 1)
    assert Record.read(place) is not None
    (place / FILE).write_bytes(b"PK")
    assert "resuming after epoch 1" in start(tmp_path)[1]
    assert "images.npz cannot be read" in caplog.text and Record.read(place) is not None
