"""Sweeps on a real Ray cluster: killed, widened, failing, stopped early, on several workers."""

import contextlib
import json
import os
import signal

import psutil
import pytest
import yaml

from rotssl.runs import journal
from tests.commands.test_compare import without_seconds
from tests.programs import command, job, mlflow_client, started, wait_for, without_ray

pytestmark = pytest.mark.system
SWEEP = {
    "sweep": {"seeds": 2},
    "grid": {"rotation.weight": [0, 1.0], "train.epochs": [3]},
    "data": {"name": "fashion-mnist-sample", "limit": 256},
    "method": {"hidden_dim": 32, "out_dim": 16},
    "train": {"batch_size": 64},
    "tracking": {"experiment": "study"},
}
TIMED = ("seconds", "images_per_second", "input_wait", "host_bytes")


class Ablation:
    """A sweep file, the command that runs it, and what it left."""

    def __init__(self, env, folder, **sections):
        self.env, self.folder, self.file = env, folder, folder / "sweep.yaml"
        self.write(**sections)

    def write(self, **sections):
        self.file.write_text(yaml.safe_dump({**SWEEP, **sections}))

    def arguments(self, *flags):
        return "--config", str(self.file), "--storage.path", str(self.folder / "results"), *flags

    def started(self):
        return started(command("ablate.py", *self.arguments()), self.folder / "log", self.env)

    def run(self, *flags, env=None):
        done = job(*self.arguments(*flags), script="ablate.py", env=env or self.env)
        return done.returncode, done.stdout, done.stderr

    def runs(self):
        """Folder of each trial, by its name."""
        return {path.parent.name: path.parent for path in (self.folder / "results" / "study").glob("byol-*/run.json")}

    def record(self, name):
        return json.loads((self.runs()[name] / "run.json").read_text())

    def report(self):
        """The report's numbers, but for times."""
        return without_seconds(json.loads((self.folder / "results/study/sweep/report/report.json").read_text()))

    def logged(self):
        """MLflow's runs by name, and metric -> its points of each."""
        client = mlflow_client(f"sqlite:///{self.folder}/results/mlflow.db")
        experiment = client.get_experiment_by_name("study").experiment_id
        found = client.search_runs([experiment])
        found = [run for run in found if run.data.tags.get("kind") != "evaluation"]
        runs = {run.info.run_name: run for run in found}
        assert len(runs) == len(found)  # each run once, whatever was killed
        points = {
            name: {
                key: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]
                for key in run.data.metrics
                if not key.startswith("system/")
            }
            for name, run in runs.items()
        }
        return runs, points


def without_times(points):
    return {
        name: {key: values for key, values in metrics.items() if not key.endswith(TIMED)}
        for name, metrics in points.items()
    }


@pytest.fixture(scope="module")
def whole(cluster, tmp_path_factory):
    """A sweep that nothing disturbed."""
    ablation = Ablation(cluster, tmp_path_factory.mktemp("whole"))
    code, out, err = ablation.run()
    assert code == 0, out + err
    assert "rotation weight 1" in out and "report.html" in out
    assert "data: 1,256 images in 10 classes (train 256, validation 1,000), 28 x 28" in err
    return ablation


def test_a_sweep_leaves_nested_runs_and_says_what_it_did(whole):
    runs, points = whole.logged()
    parent = runs.pop("sweep")
    assert parent.info.status == "FINISHED" and parent.data.tags["kind"] == "sweep"
    assert len(runs) == 4 and set(runs) == set(whole.runs())
    for name, run in runs.items():
        assert run.info.status == "FINISHED" and run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["kind"] == "trial" and run.data.tags["sweep"] == "sweep"
        assert [step for step, _ in points[name]["knn/top1"]] == [1, 2, 3]
    cells = {(run.data.tags["cell"], run.data.tags["seed"]) for run in runs.values()}
    assert cells == {(f"rotation.weight={w} train.epochs=3", seed) for w in (0, 1) for seed in "01"}
    assert not (whole.folder / "results" / "study" / "sweep" / "tune").exists()  # nothing of Tune's is kept
    client = mlflow_client(f"sqlite:///{whole.folder}/results/mlflow.db")
    report = {item.path for item in client.list_artifacts(parent.info.run_id, "report")}
    assert {"report/report.html", "report/report.json", "report/convergence.png", "report/final.png"} <= report


def test_started_again_it_does_nothing(whole):
    before = {name: (folder / "run.json").stat().st_mtime_ns for name, folder in whole.runs().items()}
    code, out, err = whole.run(env=os.environ | {"RAY_ADDRESS": "127.0.0.1:1"})  # who asks for a cluster fails
    assert code == 0 and "nothing to do" in out and "4 finished; 0 to run" in out, out + err
    assert {name: (folder / "run.json").stat().st_mtime_ns for name, folder in whole.runs().items()} == before


def holder(folder):
    """The process that holds a run's lock."""
    for process in psutil.process_iter():
        try:
            if any(file.path == str(folder / ".lock") for file in process.open_files()):
                return process
        except psutil.Error:
            continue  # it ended meanwhile, or is not ours
    return None


def test_killed_worker_and_killed_driver_go_on_as_if_nothing_had_been(whole, tmp_path):
    ablation = Ablation(whole.env, tmp_path)

    def status(state):
        return [name for name in ablation.runs() if ablation.record(name)["status"] == state]

    def halted():
        """Trials in the middle, and the processes that run them, which stand still: else they might end meanwhile."""
        found = {name: holder(ablation.runs()[name]) for name in status("running")}
        found = {name: worker for name, worker in found.items() if worker}
        for worker in found.values():
            worker.suspend()
        if any(journal.read(ablation.runs()[name]) for name in status("running") if name in found):
            return found
        for worker in found.values():
            worker.resume()
        return {}

    with ablation.started() as process:
        stopped = wait_for(halted, process)
        name = next(name for name in stopped if name in status("running") and journal.read(ablation.runs()[name]))
        run_id = ablation.record(name)["run_id"]
        for each, worker in stopped.items():
            worker.kill() if each == name else worker.resume()
        wait_for(lambda: "its worker died; resuming after epoch " in process.told(), process)
        # The workers outlive the driver, and would finish what is to be cut short.
        workers = wait_for(lambda: status("finished") and halted(), process).values()
        process.kill()
    finished, cut = status("finished"), status("running")
    before = {name: ((ablation.runs()[name] / "metrics.jsonl").read_bytes()) for name in finished}
    ids = {name: ablation.record(name)["run_id"] for name in [*finished, *cut]} | {name: run_id}
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):  # Ray was faster
            worker.kill()
    code, out, err = ablation.run("--resume")
    assert code == 0 and f"{len(finished)} finished" in out and "cut short" in out, out + err
    runs, points = ablation.logged()
    for name in finished:
        assert (ablation.runs()[name] / "metrics.jsonl").read_bytes() == before[name]
    for name, run_id in ids.items():
        assert run_id in (None, runs[name].info.run_id)  # None: killed before it was noted
    names = [name for name in runs if name != "sweep"]
    assert len(names) == 4 and all(runs[name].info.status == "FINISHED" for name in names)
    undisturbed = without_times(whole.logged()[1])
    assert without_times(points) == {name: undisturbed[name] for name in points}
    assert ablation.report() == whole.report()


@pytest.mark.exhaustive
def test_asha_closes_what_it_stops_and_a_wider_sweep_goes_on_with_what_was_interrupted(cluster, tmp_path):
    sections = {"sweep": {"seeds": 1, "scheduler": "asha", "concurrency": 1}}
    sections["grid"] = {"optim.lr": [0.05, 1e-5, 1e-6], "rotation.weight": [1.0], "train.epochs": [4]}
    ablation = Ablation(cluster, tmp_path, **sections)
    with ablation.started() as process:
        wait_for(lambda: sum(len(journal.read(folder)) for folder in ablation.runs().values()) >= 5, process)
        process.send_signal(signal.SIGTERM)  # as `ray job stop` does
        assert process.wait() == 130, process.told()
    (cut,) = [name for name in ablation.runs() if ablation.record(name)["status"] == "interrupted"]
    assert ablation.logged()[0][cut].info.status == "KILLED"
    before = {name: (folder / "run.json").stat().st_mtime_ns for name, folder in ablation.runs().items() if name != cut}
    sections["grid"]["optim.lr"].append(1e9)
    ablation.write(**sections)
    code, out, err = ablation.run()
    assert f"{7 - len(before)} new" in out, out  # of eight: neither interrupted nor ended
    assert code == 1 and "stopped early" in out and "2 failed" in out, out + err
    assert "failed: optim.lr=1000000000" in err, err  # and stops no other
    assert {name: (ablation.runs()[name] / "run.json").stat().st_mtime_ns for name in before} == before
    runs, points = ablation.logged()
    assert len(runs) == 9
    pruned, failed = (
        [name for name in ablation.runs() if ablation.record(name)["status"] == status]
        for status in ("pruned", "failed")
    )
    assert len(failed) == 2
    for name in failed:
        assert runs[name].info.status == "FAILED" and "optim.lr 1e+09" in runs[name].data.tags["status_reason"]
    assert pruned and all(name.startswith("byol-rotation1") for name in pruned)  # never a baseline
    for name in pruned:
        last = len(points[name]["knn/top1"])
        assert last < 4 and runs[name].info.status == "KILLED"
        assert runs[name].data.tags["status_reason"] == f"stopped by asha after epoch {last}"
    assert runs["sweep"].info.status == "FAILED"
    for name in set(runs) - {"sweep", *pruned, *failed}:
        assert [step for step, _ in points[name]["knn/top1"]] == [1, 2, 3, 4] and runs[name].info.status == "FINISHED"


def test_trials_on_several_workers_are_ray_train_runs(cluster, tmp_path):
    grid = {"rotation.weight": [1.0], "train.epochs": [2]}
    ablation = Ablation(cluster, tmp_path, sweep={"baseline": False}, grid=grid)
    code, out, err = ablation.run("--scaling.num_workers", "2")
    assert code == 0 and "collective: two workers communicated" in out, out + err
    runs, points = ablation.logged()
    runs.pop("sweep")
    assert len(runs) == 1 and "no report: nothing to compare" in err
    for name, run in runs.items():
        assert run.info.status == "FINISHED" and run.data.tags["world_size"] == "2"
        assert [step for step, _ in points[name]["knn/top1"]] == [1, 2]


@pytest.mark.exhaustive  # the head may come back: a sweep waits for it for half a minute
def test_a_sweep_that_loses_the_head_says_so_in_one_line_and_goes_on_elsewhere(cluster, whole, tmp_path):
    ablation = Ablation(without_ray() | {"RAY_ADDRESS": "local"}, tmp_path)
    with ablation.started() as driver:
        wait_for(lambda: any(2 in journal.read(folder) for folder in ablation.runs().values()), driver)
        ours = psutil.Process(driver.pid).children(recursive=True)
        next(process for process in ours if process.name() == "gcs_server").kill()
        assert driver.wait() == 1, driver.told()[-3000:]
        told = driver.told()
    (line,) = [line for line in told.splitlines() if "the head of the Ray cluster is gone" in line]
    assert line.startswith("failed: ") and "goes on from the last checkpoint" in line and "Traceback" not in told
    assert psutil.wait_procs(ours, timeout=30)[1] == []
    folder = ablation.folder / "results" / "study"
    assert json.loads((folder / "sweep" / "run.json").read_text())["status"] == "interrupted"
    assert {ablation.record(name)["status"] for name in ablation.runs()} <= {"finished", "interrupted"}
    assert not (folder / "sweep" / "tune").exists()
    code, out, err = ablation.run(env=cluster)
    assert code == 0, out + err
    assert ablation.report() == whole.report()


@pytest.mark.exhaustive
def test_trials_are_evaluated_on_test_which_chooses_nothing(cluster, tmp_path):
    short = {"grid": {"rotation.weight": [0, 1.0]}, "train": {"batch_size": 64, "epochs": 1}}
    ablation = Ablation(cluster, tmp_path, sweep={"seeds": 1}, evaluation={"linear": False}, **short)
    code, out, err = ablation.run("--evaluation.protocols", "knn")
    assert code == 0, out + err
    first, runs = ablation.report(), ablation.logged()[0]
    trials = {run.info.run_name for run in runs.values() if run.data.tags.get("kind") == "trial"}
    assert len(trials) == 2 and {entry["run"] for entry in first["evaluations"]} == trials
    assert all(entry["card"]["query_split"] == "test" for entry in first["evaluations"])
    # Trials that are finished are only evaluated, by what is missing; everything else of the report stays what it was.
    code, out, err = ablation.run("--evaluation.protocols", "knn,semi")
    assert code == 0 and "2 finished; 2 to run" in out, out + err
    again = ablation.report()
    assert len(again.pop("evaluations")) == 4 and len(first.pop("evaluations")) == 2 and again == first
    assert all(ablation.record(name)["tested"] == ["knn", "semi"] for name in ablation.runs())
