"""The MLflow server as the manifests start it, on a real PostgreSQL: the same arguments, variables and file."""

import pytest

from tests.cluster.services import EXPERIMENT, LOGIN

pytestmark = [pytest.mark.cluster, pytest.mark.system]


def test_the_server_knows_its_users_and_its_names(server):
    assert server.ask(EXPERIMENT, LOGIN, host="mlflow:5000")[0] == 200
    assert server.ask(EXPERIMENT, LOGIN, host="localhost:5000")[0] == 200
    assert server.ask(EXPERIMENT, None, host="mlflow:5000")[0] == 401
    assert server.ask(EXPERIMENT, (LOGIN[0], "another"), host="mlflow:5000")[0] == 401
    assert server.ask(EXPERIMENT, LOGIN, host="evil.example.com")[0] == 403


def test_runs_are_in_postgresql_and_their_files_behind_the_server(server, database, monkeypatch, tmp_path):
    from tests.programs import mlflow_client

    for name, value in server.login.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    client = mlflow_client(server.uri)
    run = client.create_run(client.create_experiment("of a test")).info
    client.log_metric(run.run_id, "knn/top1", 0.5)
    (tmp_path / "views.txt").write_text("seen")
    client.log_artifact(run.run_id, str(tmp_path / "views.txt"))
    assert [file.path for file in client.list_artifacts(run.run_id)] == ["views.txt"]
    assert [*server.folder.glob("artifacts/**/views.txt")]
    with database.connect() as tables:
        assert tables.execute("select value from metrics where run_uuid = %s", [run.run_id]).fetchall() == [(0.5,)]
        assert tables.execute("select username from users").fetchall() == [(LOGIN[0],)]
