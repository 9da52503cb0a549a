"""What the tests of clusters share: hosts for the whole session, Slurm on two of them, and servers."""

import pytest

from tests.cluster import services
from tests.cluster.hosts import Hosts, missing
from tests.cluster.slurm import Slurm
from tests.cluster.slurm import missing as absent
from tests.cluster.stranger import Stranger


@pytest.fixture(scope="session")
def hosts(tmp_path_factory):
    """Three hosts, which a test leaves as it found them: no program of its own, all cables in."""
    if reason := missing():
        pytest.skip(reason)
    with Hosts(tmp_path_factory.mktemp("hosts")) as up:
        yield up


@pytest.fixture(scope="session")
def slurm(hosts):
    """A Slurm of two of the hosts."""
    if reason := absent():
        pytest.skip(reason)
    with Slurm(hosts) as up:
        yield up


@pytest.fixture
def stranger(slurm, tmp_path):
    """A user of that Slurm, in a checkout."""
    return Stranger(slurm, tmp_path / "rotssl")


@pytest.fixture(scope="session")
def database():
    """A PostgreSQL."""
    if reason := services.missing():
        pytest.skip(reason)
    with services.postgres() as up:
        yield up


@pytest.fixture(scope="session")
def server(database, tmp_path_factory):
    """A server of MLflow with logins on that PostgreSQL, as the manifests start it."""
    with services.mlflow_server(database, tmp_path_factory.mktemp("mlflow")) as up:
        yield up
