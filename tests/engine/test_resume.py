"""Which checkpoint a run resumes from: damaged ones are passed over, those of another run are refused in one line."""

import json
import logging
import shutil

import pytest
import torch

from rotssl import config as cfg
from rotssl import lifecycle
from rotssl.engine.runtime import RunFailed
from rotssl.runs import checkpoint
from tests.small_runs import make_config, trainer

pytestmark = pytest.mark.contract
SHORT = {"data.limit": 64, "train.epochs": 3, "evaluation.knn_every": 0, "evaluation.linear": False}


def run(config):
    made = trainer(config)
    made.run()
    return made.model.state_dict()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Makes a run that was stopped after two epochs, anew for each test; and the weights of one that was not."""
    whole = run(make_config(tmp_path_factory.mktemp("whole"), "byol", **SHORT))

    def make(folder, **fields):
        config = make_config(folder, "byol", **SHORT, **fields)
        run(cfg.replace(config, {"train.stop_after": 2}))
        return config

    return make, whole


def flipped(content, where):
    """The content with one bit changed."""
    place = int(where * (len(content) - 1))
    return content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :]


DAMAGES = {
    "a weight's bit": lambda content: flipped(content, 0.5),
    "a late bit": lambda content: flipped(content, 0.97),
    "200 bytes": lambda content: content[:4000] + bytes(200) + content[4200:],
    "torn": lambda content: content[: len(content) // 3],
    "a weight's bit, and bytes after its end": lambda content: flipped(content, 0.5) + b"more",
    "a weight's bit, and one of its checksum's mark": lambda content: (
        flipped(content[:-71], 0.5) + b"x" + content[-70:]
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_said_and_the_one_before_leads_to_the_same_weights(tmp_path, caplog, stopped, damage):
    make, whole = stopped
    config = make(tmp_path)
    file = config.run_dir / checkpoint.name(2) / checkpoint.FILE
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    made, said = trainer(config), []
    made.runtime.progress = lambda event: said.append(getattr(event, "text", ""))
    with caplog.at_level(logging.WARNING):
        made.run()
    found = made.model.state_dict()
    assert "resuming after epoch 1" in said  # not from the beginning, which leads to the same weights too
    (line,) = [record.getMessage() for record in caplog.records if "checkpoint" in record.getMessage()]
    assert "epoch_00002 cannot be read" in line and "trying the previous one" in line
    for key, value in whole.items():
        assert torch.equal(found[key], value), key


def test_every_bit_of_a_checkpoint_is_covered(tmp_path):
    state = {"epoch": 1, "model": {"weight": torch.arange(8.0)}, "optimizer": {}}
    folder = tmp_path / checkpoint.name(1)
    checkpoint.save(state, folder)
    content = (folder / checkpoint.FILE).read_bytes()
    for place in range(0, len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 1
        (folder / checkpoint.FILE).write_bytes(bytes(changed))
        for found in checkpoint.latest(tmp_path):  # only the mark of the checksum itself may be lost
            assert content[place : place + 1] in b"sha256:" and torch.equal(found["model"]["weight"], torch.arange(8.0))


def test_a_checkpoint_without_checksum_is_taken_up(tmp_path, stopped):
    make, whole = stopped
    config = make(tmp_path)
    for folder in checkpoint.found(config.run_dir):
        torch.save(checkpoint.load(folder), folder / checkpoint.FILE)  # as earlier versions did
    found = run(config)
    for key, value in whole.items():
        assert torch.equal(found[key], value), key


def change(run_config, number, **entries):
    """Write a checkpoint of the run with some of its entries changed, whole and with its checksum."""
    folder = run_config.run_dir / checkpoint.name(number)
    checkpoint.save(checkpoint.load(folder) | entries, folder)


def test_a_checkpoint_of_another_configuration_is_refused_by_name(tmp_path, stopped):
    config = stopped[0](tmp_path)
    other = cfg.to_dict(cfg.replace(config, {"optim.lr": 9.0, "train.seed": 99, "data.root": "/elsewhere"}))
    change(config, 2, config=json.dumps(other | {"colour": {"hue": 3}}))
    with pytest.raises(RunFailed, match=r"^storage\.path: .*epoch_00002 is of another configuration") as caught:
        run(config)
    text = str(caught.value)
    for words in ("optim.lr 9.0 in place of", "train.seed 99 in place of 0", "colour.hue 3", "remove it"):
        assert words in text
    assert "data.root" not in text and "\n" not in text  # what may change
    late = cfg.to_dict(config)
    del late["rotation"]["head_on"]  # a field that was added later
    change(config, 2, config=json.dumps(late))
    run(config)


OTHERS = {
    "architecture": lambda state: {"model": {**state["model"], "encoder.stem.0.weight": torch.ones(1, 3, 3, 3)}},
    "names": lambda state: {"model": {f"x.{key}": value for key, value in state["model"].items()}},
    "cost": lambda state: {"cost": {**state["cost"], "colour": 1}},
    "optimizer": lambda state: {"optimizer": {"state": {}, "param_groups": []}},
    "no cost": lambda state: {"cost": None},
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_that_does_not_fit_is_refused_in_a_line(tmp_path, stopped, what):
    config = stopped[0](tmp_path)
    change(config, 2, **OTHERS[what](checkpoint.load(config.run_dir / checkpoint.name(2))))
    with pytest.raises(RunFailed, match=r"^storage\.path: .*epoch_00002 does not fit this run") as caught:
        run(config)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_checkpoint_of_another_epoch_than_its_folder_is_refused(tmp_path, stopped):
    config = stopped[0](tmp_path)
    change(config, 2, epoch=3)
    with pytest.raises(RunFailed, match=r"epoch_00002 holds the state after epoch 3; remove it"):
        run(config)


@pytest.mark.parametrize("place", ["epoch_00003", "epoch_00003.part", "epoch_00003/checkpoint.pt"])
def test_what_stands_where_a_checkpoint_is_to_be_written_is_named(tmp_path, stopped, place):
    config = stopped[0](tmp_path)
    wrong = config.run_dir / place
    wrong.write_text("x") if place == "epoch_00003" else wrong.mkdir(parents=True)
    with pytest.raises(OSError, match=rf"is where a checkpoint is to be written; remove it: .*{place}'$"):
        run(config)
    wrong.unlink() if place == "epoch_00003" else wrong.rmdir()
    run(config)


def test_a_new_run_starts_with_the_weights_of_another_and_then_has_its_own(tmp_path, stopped):
    first = make_config(tmp_path / "first", "byol", **SHORT)
    weights = {name: value.clone() for name, value in run(first).items()}
    fields = {**SHORT, "train.init_from": str(first.run_dir), "train.seed": 5}
    second = make_config(tmp_path / "second", "byol", **fields)
    made = trainer(second)
    seen, said, step = [], [], made.step
    made.step = lambda *batch: seen.append({k: v.clone() for k, v in made.model.state_dict().items()}) or step(*batch)
    made.runtime.progress = lambda event: said.append(getattr(event, "text", ""))
    made.run()
    assert f"starting with the weights of {first.run_dir}" in said
    for name, value in weights.items():
        assert torch.equal(seen[0][name], value), name
    whole = made.model.state_dict()
    # Resumed, it has no need of the other run any more.
    third = make_config(tmp_path / "third", "byol", **fields)
    run(cfg.replace(third, {"train.stop_after": 2}))
    shutil.rmtree(first.run_dir)
    for name, value in run(third).items():
        assert torch.equal(whole[name], value), name


@pytest.mark.parametrize(
    ("fields", "damage", "words"),
    [
        (
            {"method.hidden_dim": 16},
            None,
            r"^train\.init_from: the weights in .*epoch_00002 cannot be taken \(Runtime.*size",
        ),
        ({}, "torn", r"^train\.init_from: the weights in .*epoch_00002 cannot be taken \("),
        ({}, "gone", r"^train\.init_from: .* holds no checkpoint; expected the folder of a run or of a checkpoint$"),
    ],
)
def test_weights_that_cannot_be_taken_are_refused_in_a_line(tmp_path, stopped, fields, damage, words):
    make, _ = stopped
    folder = make(tmp_path / "first").run_dir / checkpoint.name(2)
    if damage == "torn":
        content = (folder / checkpoint.FILE).read_bytes()
        (folder / checkpoint.FILE).write_bytes(content[:-2000])
    if damage == "gone":
        shutil.rmtree(folder)
    config = make_config(tmp_path / "second", "byol", **SHORT, **fields, **{"train.init_from": str(folder)})
    with pytest.raises(RunFailed, match=words):
        run(config)
    if damage == "gone":
        with pytest.raises(cfg.ConfigError, match=words):
            lifecycle.prepare(config)
