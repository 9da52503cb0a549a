"""A sweep whose trials all train and log at once, on MLflow with logins and PostgreSQL: every point of every journal, once."""

import os
import subprocess

import pytest

from tests.programs import ROOT, command

pytestmark = [pytest.mark.cluster, pytest.mark.system]
TRIALS, EPOCHS = 4, 3


@pytest.fixture
def benchmark(monkeypatch):
    """benchmarks/tracking_server.py, which does the same with more of all."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tracking_server

    return tracking_server


def test_every_point_of_trials_that_log_at_once_is_there_once(benchmark, server, database, tmp_path, monkeypatch):
    for name, value in server.login.items():
        monkeypatch.setenv(name, value)
    file = benchmark.sweep_file(tmp_path, "many", TRIALS, EPOCHS)
    with benchmark.ray_of(TRIALS, tmp_path) as leads:
        words = ["--config", file, "--storage.path", tmp_path / "results", "--tracking.uri", server.uri]
        done = subprocess.run(
            command("ablate.py", *words), env=os.environ | leads, cwd=ROOT, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{TRIALS} concurrent trials" in done.stdout
    trials = benchmark.journals(tmp_path / "results", "many")
    assert len(trials) == TRIALS
    for rows in trials.values():
        assert {step for _, key, step, _ in rows if key == "loss/total"} == set(range(1, EPOCHS + 1))
    with database.connect() as tables:
        assert benchmark.differences(tables, trials) == []
        # What it would say: a point that is lost, one that is there twice, one of another value, what the table of runs shows.
        run, rows = next(iter(trials.items()))
        where = f"run_uuid = '{run}' and key = 'loss/total'"
        for change, count in (
            (f"delete from metrics where {where} and step = 1", 1),
            (
                f"insert into metrics select key, value, timestamp + 1, run_uuid, step, is_nan from metrics where {where}",
                3,
            ),
            (f"update metrics set value = value + 1 where {where} and step = 2", 2),
            (f"update latest_metrics set step = 1 where {where}", 1),
        ):
            tables.execute(change)
            assert len(benchmark.differences(tables, trials)) == count, change
            tables.rollback()


def test_writers_at_once_lose_nothing(benchmark, server, database, monkeypatch):
    for name, value in server.login.items():
        monkeypatch.setenv(name, value)
    expected, seconds = benchmark.writers(server.uri, TRIALS, {"loss/total": 0.5, "knn/top1": 0.25}, 5)
    assert len(seconds) == 5 * TRIALS and len(expected) == TRIALS
    with database.connect() as tables:
        assert benchmark.differences(tables, expected) == []
