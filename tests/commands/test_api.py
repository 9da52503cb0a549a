"""rotssl.pretrain, ablate, compare and evaluate: what a notebook calls, and what it gets."""

import logging
import subprocess
import sys

import numpy as np
import pytest

import rotssl
from rotssl import ConfigError
from rotssl.lifecycle import Run
from rotssl.runs import journal
from rotssl.tracking.untracked import kept_tags
from tests.own_methods import EXAMPLE, forgotten, installed, with_example
from tests.programs import SMALL, flags, job, with_store, without_ray

HERE = {**SMALL, "rotation.weight": 0, "scaling.num_workers": 0, "tracking.run_name": "run"}


@pytest.fixture
def fields(tmp_path):
    return {**HERE, "storage.path": with_store(tmp_path)}


def test_the_import_is_light_and_everything_offered_is_there():
    code = "import sys, rotssl; heavy = {'torch', 'ray', 'mlflow', 'numpy', 'yaml', 'rich'} & set(sys.modules); print(heavy)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
    for name in rotssl._OFFERED:
        assert getattr(rotssl, name) is not None and name in dir(rotssl)
    with pytest.raises(AttributeError, match="module 'rotssl' has no attribute 'pretrian'"):
        rotssl.pretrian  # noqa: B018


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"epochs": 3}, r"^epochs: got 3, expected a section such as train=\{\"epochs\": 10\}, or a dotted field"),
        ({"train": 3}, r"^train: got 3, expected a section"),
        ({"trains": 3}, r".did you mean 'train'.."),
        ({"train": {"epocs": 3}}, "^train.epocs: no such field .did you mean 'train.epochs'"),
        ({"train": {"epochs": 3}, "train.epochs": 4}, "^train.epochs: given twice$"),
        ({"recipe": "nowhere.yaml"}, "^recipe: cannot read nowhere.yaml"),
        ({"recipe": {"train": {"epochs": 0}}}, "^train.epochs: got 0, expected an integer at least 1$"),
        ({"method": {"name": "none"}}, "^method.name: got 'none', expected one of simclr"),
    ],
)
def test_bad_input_of_a_run_is_an_error_of_one_line(given, words):
    with pytest.raises(ConfigError, match=words):
        rotssl.pretrain(**given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"grid": {"train.seed": [0]}, "train": {"seed": 1}}, "^train.seed: given twice in the call"),
        ({"grid": {"train.sed": [0]}}, "^grid.train.sed: no such field"),
        ({}, "^grid: the call varies nothing"),
        ({"sweep": {"name": "a/b"}, "grid": {"train.seed": [0, 1]}}, "^sweep.name: got 'a/b', expected a short name"),
        ({"file": "nowhere.yaml"}, "^file: cannot read nowhere.yaml"),
    ],
)
def test_bad_input_of_a_sweep_is_an_error_of_one_line(given, words):
    with pytest.raises(ConfigError, match=words):
        rotssl.ablate(**given)


def test_bad_input_of_a_comparison_and_of_an_evaluation(tmp_path):
    for given, words in (
        ({"metric": "accuracy"}, "^metric: got 'accuracy', expected one of knn/top1"),
        ({"target": 70}, "^target: got 70, expected a fraction"),
        ({"uri": f"sqlite:///{tmp_path}/none.db"}, "none.db"),
    ):
        with pytest.raises(ConfigError, match=words):
            rotssl.compare("rotssl", **given)
    for given, words in (
        ({"run": tmp_path}, "^run: .* has no config.yaml: expected the folder of a run$"),
        ({"run": tmp_path, "protocols": "knm"}, "^protocols: got knm, expected one or more of knn, linear"),
        ({"run": tmp_path, "protocols": ()}, "^protocols: got none"),
        ({"run": tmp_path, "network": "both"}, "^network: got 'both', expected student or teacher$"),
        ({"run": tmp_path, "knn": {"kk": 3}}, "^knn.kk: unknown option of an evaluation"),
        ({"run": tmp_path, "knn.k": 0}, "^knn.k: got 0, expected"),
    ):
        with pytest.raises(ConfigError, match=words):
            rotssl.evaluate(**given)


@pytest.mark.contract
def test_a_run_is_the_programs_run_and_is_measured_once(fields, tmp_path, capsys):
    run = rotssl.pretrain(**{**fields, "train.epochs": np.int64(2), "method": {"name": "simclr"}})
    assert (run.status, run.reason, run.name) == ("finished", "completed", "run")
    assert sorted(run.points) == [1, 2] and sorted(run.points.column("knn/top1")) == [1, 2]
    assert run.metrics["linear/top1"] == run.points[2]["linear/top1"] and run.config["train.epochs"] == 2
    assert run.points == journal.read(run.folder)
    html = run._repr_html_()
    assert "<b>run</b>" in html and f"{run.points[2]['knn/top1']:.1%}" in html and "None" not in html
    assert len(repr(run)) < 400 and not [h for h in logging.getLogger("rotssl").handlers if h.level == logging.WARNING]
    capsys.readouterr()
    again = rotssl.pretrain(
        {"method.name": "simclr"}, **fields
    )  # a recipe in place of what is recommended: the same here
    assert again.points == run.points and "epoch" not in capsys.readouterr().err
    measured = rotssl.evaluate(run, "knn")
    assert set(measured.metrics) == {"knn/top1", "feature/effective_rank"} and "knn/top1" in measured._repr_html_()
    assert rotssl.evaluate(run.folder, ["knn"]).metrics == measured.metrics
    more = rotssl.evaluate(run, "knn", knn={"k": [1, 20]}).metrics
    assert more.items() > measured.metrics.items() and len(more) == len(measured.metrics) + 2
    assert rotssl.evaluate(run.run_id, ["knn"], uri=f"sqlite:///{tmp_path}/mlflow.db").metrics == more


@pytest.mark.contract
def test_an_interrupt_is_raised_and_the_same_call_resumes(fields, monkeypatch):
    train = Run._train

    def interrupted(self, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt, match="the same call resumes"):
        rotssl.pretrain(**fields, **{"tracking.uri": "off"})
    monkeypatch.setattr(Run, "_train", lambda self, *arguments: ("failed", "no such <disk>"))
    run = rotssl.pretrain(**fields, **{"tracking.uri": "off"})
    assert (run.status, run.run_id) == ("failed", None) and "failed: no such &lt;disk&gt;" in run._repr_html_()
    monkeypatch.setattr(Run, "_train", train)
    assert rotssl.pretrain(**fields, **{"tracking.uri": "off"}).status == "finished"


@pytest.mark.contract
def test_a_package_brings_a_method_to_the_programs(tmp_path, main, monkeypatch):
    for place in (str(EXAMPLE), installed(tmp_path / "site", "align_uniform", align_uniform="align_uniform:SPEC")):
        monkeypatch.syspath_prepend(place)
    with forgotten():
        code, out, _ = main("pretrain.py", "--method.name", "align_uniform", "--help")
        assert code == 0 and "--method.uniformity" in out and "Weight of the uniformity term." in out
        fields = {**HERE, "method.name": "align_uniform", "method.t": 3, "tracking.uri": "off"}
        (tmp_path / "recipe.yaml").write_text("method: {name: align_uniform, uniformity: 0.5}\n")
        code, _, err = main("pretrain.py", "--config", tmp_path / "recipe.yaml", *flags(fields, tmp_path))
    assert code == 0 and "error" not in err
    folder = tmp_path / "rotssl" / "run"
    assert kept_tags(folder)["method.source"] == "align_uniform 1.0 (align_uniform:SPEC)"
    assert "align_uniform/uniformity" in (folder / "metrics.jsonl").read_text()


@pytest.mark.system
@pytest.mark.exhaustive
def test_a_package_brings_a_method_to_rays_workers(tmp_path):
    fields = {**HERE, "method.name": "align_uniform", "tracking.uri": "off", "scaling.num_workers": 2}
    env = without_ray() | with_example(tmp_path / "site") | {"RAY_ADDRESS": "local"}
    done = job(*flags(fields, tmp_path), env=env)
    assert done.returncode == 0, done.stderr
    assert "align_uniform/uniformity" in (tmp_path / "rotssl" / "run" / "metrics.jsonl").read_text()


NOTEBOOK = """
import ray
import rotssl
from rotssl.methods.simclr import SimCLR
from tests.methods.test_outside import Config

class Here(SimCLR):
    pass

rotssl.register_method("here", rotssl.MethodSpec(Config, Here, "sgd", 0.1))
common = {"data.limit": 128, "train.batch_size": 32, "train.epochs": 1, "storage.path": FOLDER, "views.size_start": None}
run = rotssl.pretrain(method={"name": "here"}, scaling={"num_workers": 2}, **common)
assert run.status == "finished", run
assert not ray.is_initialized()
ray.init("local", num_cpus=2, logging_level="ERROR")
swept = rotssl.ablate(method={"name": "here"}, grid={"rotation.weight": [1.0]}, sweep={"name": "two"}, **common)
assert swept.status == "finished" and [trial.status for trial in swept.trials] == 2 * ["finished"], swept
assert swept.comparison.page.exists() and "<img" in swept._repr_html_()
assert ray.is_initialized()
print("all of it")
"""


@pytest.mark.system
@pytest.mark.exhaustive
def test_a_registered_method_reaches_workers_and_trials_and_the_users_ray_stays(tmp_path):
    file = tmp_path / "notebook.py"
    file.write_text(NOTEBOOK.replace("FOLDER", repr(str(tmp_path / "out"))))
    env = with_example(tmp_path / "site") | {"RAY_ADDRESS": "local"}
    done = subprocess.run([sys.executable, str(file)], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "all of it" in done.stdout, done.stdout + done.stderr
