"""The protocols of jobs/evaluate.py beside kNN and the probe: what they measure, what they write, what they refuse."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from rotssl import assessment
from rotssl import config as cfg
from rotssl.commands import pretrain as pretrain_
from rotssl.commands.evaluate import evaluate
from rotssl.config import evaluating
from rotssl.config.evaluation import EvaluationConfig
from rotssl.config.fields import ConfigError
from rotssl.data import datasets
from rotssl.evaluation import plan as plans
from rotssl.models.encoders import read_encoder
from rotssl.models.networks import network_of
from rotssl.runs import checkpoint
from tests.commands.test_evaluate import logged
from tests.finished import copied, prepared
from tests.finished import finished as train
from tests.programs import job

pytestmark = pytest.mark.contract
SHORT = {
    **{"sgd.epochs": 3, "finetune.epochs": 2, "finetune.seeds": 2, "finetune.shares": "0.1", "finetune.lr": "0.01,0.1"},
    **{"fewshot.ways": 3, "fewshot.episodes": 20, "robustness.severities": "5", "robustness.angles": "0,90,30"},
    **{"robustness.corruptions": "gaussian_noise,contrast", "knn.k": "5,200", "knn.distance": "cosine,euclidean"},
}
OPTIONS = evaluating.build(SHORT)


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory):
    """A run of BYOL without MLflow, all of whose protocols were measured, and the entries of its test.json."""
    config = copied(trained, tmp_path_factory.mktemp("finished"), off=True)
    assert evaluate(None, str(config.run_dir), evaluating.PROTOCOLS, "", options=OPTIONS) == 0
    return config, json.loads((config.run_dir / "test.json").read_text())


def test_every_protocol_has_a_card_and_its_hits(finished):
    config, entries = finished
    assert [entry["card"]["protocol"] for entry in entries] == list(evaluating.PROTOCOLS)
    common = {"network": "student", "epoch": 2, "query_split": "test", "query_images": 256, "precision": "fp32"}
    for entry in entries:
        card, folder = entry["card"], config.run_dir / "evaluation" / entry["folder"]
        assert {key: card[key] for key in common} == common and len(card["query_digest"]) == 16
        assert json.loads((folder / "card.json").read_text()) == card
        assert all(card["numbers"][key]["value"] == entry["metrics"][key] for key in card["numbers"])
        with np.load(folder / "hits.npz") as hits:
            for key, value in entry["metrics"].items():
                if not key.endswith("/top1"):
                    continue
                name = key.removesuffix("/top1")
                ours = [hits[each] for each in hits.files if each == name or each.startswith(f"{name}/seed")]
                assert len(ours) == (2 if name.startswith("finetune") else 1), key
                assert all(len(each) == (20 if "fewshot" in name else 256) for each in ours)
                assert value == pytest.approx(np.mean([each.mean() for each in ours])), key


def test_the_cards_say_how(finished):
    cards = {entry["card"]["protocol"]: entry["card"] for entry in finished[1]}
    numbers = cards["knn"]["numbers"]
    assert set(numbers) == {"knn/k5_T0.1/top1", "knn/top1", "knn/k5_euclidean/top1", "knn/k200_euclidean/top1"}
    assert numbers["knn/top1"]["k"] == 200 and numbers["knn/top1"]["neighbours"] == 128  # the bank is small
    assert cards["sgd"]["rates_tried"] == [1.0] and cards["sgd"]["bn"] == "running statistics, frozen"
    assert cards["sgd"]["epochs"] == 3 and cards["sgd"]["batch_size"] == 128
    tuned = cards["finetune"]
    assert tuned["rates_tried"] == [0.01, 0.1] and tuned["rate"] in (0.01, 0.1) and tuned["labelled_images"] == 12
    assert tuned["bn"] == "batch statistics in training" and len(tuned["top1_by_seed"]) == 2
    assert cards["semi"]["numbers"].keys() == {"semi/1pct/top1", "semi/10pct/top1"}


def test_the_lists_of_the_parts_are_published(finished):
    config, entries = finished
    (semi,) = [entry for entry in entries if entry["card"]["protocol"] == "semi"]
    labels = datasets.load(config.data, 0.1).train.labels
    for name, each in (("1pct", 1), ("10pct", 3)):
        file = config.run_dir / "evaluation" / semi["folder"] / f"split_{name}_seed0.txt"
        rows = np.loadtxt(file, dtype=int)
        assert (labels[rows[:, 0]] == rows[:, 1]).all() and np.bincount(rows[:, 1]).tolist() == [each] * 4


def test_nothing_is_measured_twice_and_other_settings_are_other_numbers(finished, monkeypatch, capsys):
    config, entries = finished
    monkeypatch.setattr(assessment, "_measure", None)
    assert evaluate(None, str(config.run_dir), evaluating.PROTOCOLS, "", options=OPTIONS) == 0
    assert capsys.readouterr().out.startswith("already measured:")
    other = evaluating.build({**SHORT, "finetune.epochs": 3, "sgd.lr": "0.3", "semi.seed": 1, "fewshot.episodes": 30})
    usual = {n.key for n in plans.plan(evaluating.PROTOCOLS, OPTIONS, EvaluationConfig(), "student")}
    keys = {n.key for n in plans.plan(evaluating.PROTOCOLS, other, EvaluationConfig(), "student")}
    assert {key.split("/")[0] for key in keys - usual} == {"finetune", "sgd", "semi", "fewshot"}
    assert {key for entry in entries for key in entry["card"]["numbers"]} == usual


def test_a_value_that_is_given_as_it_would_be_has_the_usual_key():
    def keys(**given):
        options = evaluating.build({key.replace("__", "."): value for key, value in given.items()})
        return [n.key for n in plans.plan(("sgd", "finetune"), options, EvaluationConfig(), "student")]

    assert keys(sgd__lr="1", sgd__epochs="100") == keys() and keys(sgd__lr="2") != keys()
    assert keys(sgd__preset="swav", sgd__lr="0.3") == keys(sgd__preset="swav") != keys(sgd__preset="swav", sgd__lr="1")
    sixty, usual = keys(finetune__epochs="60"), keys()
    assert sixty[:2] == usual[:2] and sixty[2] != usual[2]  # 60 is the length for a hundredth only


def test_files_of_a_protocol_are_written_together_or_not_at_all(finished, monkeypatch, tmp_path):
    from rotssl.evaluation import hits

    place = tmp_path / "run"
    shutil.copytree(finished[0].run_dir, place)
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hits, "save", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate(None, str(place), ("knn",), "", options=evaluating.build({"knn.k": "7"}))
    assert {file: file.read_bytes() for file in place.rglob("*") if file.is_file()} == before
    assert not [folder for folder in (place / "evaluation").iterdir() if folder.name.startswith(".")]


def test_a_rotated_or_corrupted_image_is_harder_and_an_upright_one_is_what_knn_saw(finished):
    found = {key: value for entry in finished[1] for key, value in entry["metrics"].items()}
    assert found["robustness/rotate_0/knn/top1"] == found["knn/top1"]
    assert found["robustness/rotate_0/linear/top1"] == found["linear/top1"]
    assert found["robustness/contrast_5/knn/top1"] < found["knn/top1"]


def test_the_teacher_is_read_from_the_newest_checkpoint(finished, capsys):
    config, _ = finished
    state = next(checkpoint.latest(config.run_dir))["model"]
    encoder = network_of(config.run_dir, "teacher", 2).encoder
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, state[f"teacher.0.{name}"]), name
    student = read_encoder(config.run_dir)[0].state_dict()
    assert any(not torch.equal(value, student[name]) for name, value in encoder.state_dict().items())
    assert evaluate(None, str(config.run_dir), ("knn",), "", network="teacher") == 0
    assert "teacher/knn" in capsys.readouterr().out
    (entry,) = [e for e in json.loads((config.run_dir / "test.json").read_text()) if "teacher/knn/top1" in e["metrics"]]
    assert entry["card"]["network"] == "teacher"


@pytest.mark.exhaustive
def test_another_set_has_classifiers_of_its_own(finished, capsys):
    config, _ = finished
    assert evaluate(None, str(config.run_dir), ("knn", "linear"), "", name="fashion-mnist-sample") == 0
    entries = json.loads((config.run_dir / "test.json").read_text())
    other = {key: value for entry in entries for key, value in entry["metrics"].items() if "transfer" in key}
    assert set(other) == {f"transfer/fashion-mnist-sample/{name}/top1" for name in ("knn", "linear")}
    assert all(0.2 < value < 0.95 for value in other.values())  # of ten classes


@pytest.mark.exhaustive
def test_a_run_with_a_store_gets_the_cards_and_hits_as_artifacts(tmp_path):
    config = train(tmp_path)
    assert evaluate(None, str(config.run_dir), ("semi",), "") == 0
    _, (child,) = logged(config)
    names = {path.name for path in tmp_path.rglob("artifacts/*") if child.info.run_id in str(path)}
    assert names == {"card.json", "hits.npz", "split_1pct_seed0.txt", "split_10pct_seed0.txt"}
    assert child.data.params["card.protocol"] == "semi" and child.data.params["card.share"] == "0.01, 0.1"
    assert set(child.data.metrics) == {"semi/1pct/top1", "semi/10pct/top1"}


def test_what_cannot_be_measured_is_one_line(finished, tmp_path, main):
    config, _ = finished
    Image.new("RGB", (16, 16)).save(tmp_path / "1.png")  # without classes
    for given, words in (
        ("--protocol knn,vote", "--protocol: got 'knn,vote', expected one or more of knn, linear, semi"),
        ("--network momentum", "--network"),
        ("--knn.k 0", "knn.k: got '0', expected comma-separated integer"),
        ("--knn.k 5,5", "knn.k: got 5,5, expected each value once"),
        ("--knn.preset mine", "knn.preset: got 'mine', expected 'lightly', 'solo-learn'"),
        ("--semi.shares 2", "semi.shares: got '2'"),
        ("--protocol fewshot --fewshot.ways 9", "fewshot.ways: got 9, but 4 classes have 1 training images"),
        ("--protocol robustness --robustness.corruptions fog", "robustness.corruptions: got 'fog', expected"),
        ("--data.name cifra10 --data.root x", "data.name: got 'cifra10', expected"),
        ("--data.name cifar10", "data.root: got none, expected the folder of cifar10"),
        (f"--data.name cifar10 --data.root {tmp_path}", "data.root: no data_batch_1 in"),
        ("--data.name imagefolder --data.root /nowhere", "data.root: /nowhere is not there"),
        ("--data.name synthetic", "data.name: synthetic is the run's own data set; leave it out"),
        (f"--data.name imagefolder --data.root {tmp_path}", "has no labelled test split"),
    ):
        code, _, err = main("evaluate.py", "--checkpoint", config.run_dir, *given.split())
        assert code == 2 and len(err.splitlines()) == 1 and words in err, (given, err)


def test_classes_of_test_that_train_lacks_are_said(finished, monkeypatch):
    config, _ = finished
    split = datasets.load_test(config.data)
    train = type(split)(split.images, np.minimum(split.labels, 2))
    monkeypatch.setattr(datasets, "load", lambda *_: datasets.Splits(train, None, ("a", "b", "c", "d")))
    monkeypatch.setattr(datasets, "load_test", lambda *_: split)
    words = r"1 classes of test are not in train of fashion-mnist-sample \(d\); expected the same classes"
    with pytest.raises(ConfigError, match=words):
        evaluate(None, str(config.run_dir), ("semi",), "", name="fashion-mnist-sample")


def test_a_run_whose_files_are_gone_is_one_line(finished, tmp_path, main):
    run = tmp_path / "rotssl" / "run"
    shutil.copytree(finished[0].run_dir, run)
    (run / "test.json").unlink()
    for folder in run.glob("epoch_*"):
        (folder / checkpoint.FILE).write_bytes(b"torn")
    code, _, err = main("evaluate.py", "--checkpoint", run, "--network", "teacher")
    assert code == 2 and "has no checkpoint that can be read, where the teacher would be" in err.splitlines()[-1]
    (run / "encoder.safetensors").unlink()
    code, _, err = main("evaluate.py", "--checkpoint", run)
    assert code == 2 and err.splitlines()[-1].endswith("it has no encoder.safetensors either")


def test_a_run_without_its_exported_files_is_measured_from_its_newest_checkpoint(finished, tmp_path, main):
    config, entries = finished
    run = shutil.copytree(config.run_dir, tmp_path / "run")
    for name in ("test.json", "encoder.safetensors", "encoder.json"):
        (run / name).unlink()
    assert main("evaluate.py", "--checkpoint", run, "--protocol", "knn")[0] == 0
    (entry,) = json.loads((run / "test.json").read_text())
    assert entry["metrics"]["knn/top1"] == entries[0]["metrics"]["knn/top1"] and entry["card"]["epoch"] == 2
    shutil.rmtree(run / "epoch_00002")
    code, _, err = main("evaluate.py", "--checkpoint", run, "--protocol", "linear")
    assert code == 2 and err.endswith("where the student would be, is of epoch 1, not 2\n") and err.count("\n") == 1


@pytest.mark.exhaustive
def test_a_method_without_a_teacher_has_none(tmp_path, main):
    config = train(tmp_path, **{"tracking.uri": "off", "method.name": "simclr"})
    code, _, err = main("evaluate.py", "--checkpoint", config.run_dir, "--network", "teacher")
    assert code == 2 and "got teacher, expected student: simclr has no teacher" in err


def test_files_of_another_encoder_are_no_measure_of_the_run(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0].run_dir, folder)
    about = json.loads((folder / "encoder.json").read_text())
    (folder / "encoder.json").write_text(json.dumps(about | {"encoder": "resnet18"}))
    with pytest.raises(ConfigError, match="is of another encoder: encoder resnet18, the run has small"):
        network_of(folder, "student", 2)


def test_a_number_that_the_store_did_not_take_is_kept(trained, tmp_path, monkeypatch):
    config = copied(trained, tmp_path)

    def silent(*_):
        raise ConnectionError("the store is silent")

    with monkeypatch.context() as patch:
        patch.setattr(assessment.writer, "log_evaluation", silent)
        with pytest.raises(ConnectionError):
            evaluate(None, str(config.run_dir), ("knn",), "")
    monkeypatch.setattr(assessment, "_measure", None)  # nothing is measured again
    assert evaluate(None, str(config.run_dir), ("knn",), "") == 0
    _, (child,) = logged(config)
    assert "test/knn/top1" in child.data.metrics or "knn/top1" in child.data.metrics


def test_a_run_is_evaluated_at_its_end_and_what_fails_there_loses_nothing(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished[0].run_dir, tmp_path / "rotssl" / "run", ignore=shutil.ignore_patterns("test.json"))
    without = cfg.replace(finished[0], {"storage.path": str(tmp_path)})
    config = cfg.replace(without, {"evaluation.protocols": ("knn", "semi")})
    assert cfg.identity_of(without) == cfg.identity_of(config)

    def broken(*_):
        raise RuntimeError("no memory\nfor this")

    def state():
        return json.loads((config.run_dir / "run.json").read_text())

    with monkeypatch.context() as patch:
        patch.setattr(assessment, "_measure", broken)
        assert pretrain_.pretrain(config) == 1  # finished, without its numbers
        assert (state()["status"], state()["untested"], state()["tested"]) == ("finished", "no memory", [])
    assert pretrain_.pretrain(without) == 0  # who does not ask for them does not miss them
    assert pretrain_.pretrain(config) == 0 and "on the test split" in capsys.readouterr().out
    assert (state()["untested"], state()["tested"]) == ("", ["knn", "semi"])
    entries = json.loads((config.run_dir / "test.json").read_text())
    assert [entry["card"]["protocol"] for entry in entries] == ["knn", "semi"]
    monkeypatch.setattr(assessment, "assess", None)
    assert pretrain_.pretrain(config) == 0  # nothing is left to do


@pytest.mark.exhaustive
def test_a_run_that_is_not_finished_is_not_evaluated(tmp_path):
    fields = {"tracking.uri": "off", "evaluation.protocols": "knn"}
    assert pretrain_.pretrain(stopped := prepared(tmp_path, **fields, **{"train.stop_after": 1})) == 0
    assert not (stopped.run_dir / "test.json").exists()
    config = train(tmp_path, **fields)
    (entry,) = json.loads((config.run_dir / "test.json").read_text())
    assert entry["epoch"] == 2 and entry["card"]["protocol"] == "knn"


def test_protocols_at_the_end_need_a_test_split_and_known_names(tmp_path, main):
    for i in range(8):
        file = tmp_path / "train" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (i, i, i)).save(file)
    folder = f"--data.name imagefolder --data.root {tmp_path} --evaluation.holdout 0.5"
    for given, words in (
        ("--evaluation.protocols knn,vote", "evaluation.protocols: got 'knn,vote', expected comma-separated 'knn'"),
        (f"--evaluation.protocols knn {folder}", "evaluation.protocols: they are measured on test, but imagefolder in"),
    ):
        code, _, err = main("pretrain.py", *given.split(), "--dry-run", "--storage.path", tmp_path / "results")
        assert code == 2 and len(err.splitlines()) == 1 and words in err, err


@pytest.mark.system
@pytest.mark.exhaustive
def test_ray_s_workers_measure_the_same_to_the_bit(finished, tmp_path, cluster):
    config, entries = finished
    place = tmp_path / "rotssl" / "run"
    shutil.copytree(config.run_dir, place)
    shutil.rmtree(place / "evaluation")
    (place / "test.json").unlink()
    given = [part for key, value in SHORT.items() for part in (f"--{key}", value)]
    both = ["--protocol", ",".join(evaluating.PROTOCOLS), "--scaling.num_workers", 2]
    ended = job("--checkpoint", place, *both, *given, script="evaluate.py", env=cluster)
    assert ended.returncode == 0 and "evaluating on 2 CPU workers" in ended.stderr, ended.stderr[-3000:]
    again = json.loads((place / "test.json").read_text())
    assert again == entries[: len(again)] and len(again) == len(evaluating.PROTOCOLS)
    for entry in again:
        ours, theirs = (np.load(run / "evaluation" / entry["folder"] / "hits.npz") for run in (place, config.run_dir))
        assert sorted(ours.files) == sorted(theirs.files)
        assert all((ours[name] == theirs[name]).all() for name in ours.files)
