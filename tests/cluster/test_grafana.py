"""Grafana's dashboard: its form, and its queries, which a real Prometheus asks of a real Ray with a run on it."""

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml

from rotssl.runs import journal
from rotssl.runtimes.ray_gauges import MEANING, TAGS
from tests.cluster.files import CLUSTER
from tests.conftest import free_port
from tests.programs import SMALL, command, flags, started, wait_for

pytestmark = pytest.mark.cluster
FILE = CLUSTER / "grafana" / "rotssl.json"
# Of nodes with GPUs only.
GPUS = {"ray_node_gpus_utilization", "ray_node_gram_used", "ray_node_gram_available"}
OURS = {f"ray_{name}" for name in MEANING}


def dashboard():
    return json.loads(FILE.read_text())


def panels():
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def queries():
    """What the panels ask of Prometheus, with all runs and nodes chosen."""
    return [re.sub(r"\$\w+", ".*", target["expr"]) for panel in panels() for target in panel["targets"]]


def names(query):
    return set(re.findall(r"\bray_\w+", query))


def test_the_dashboard_can_be_imported_anywhere():
    board = dashboard()
    # Grafana 10 has this version of the schema, and later ones convert it; an id of an instance would clash.
    assert board["schemaVersion"] <= 39 and "id" not in board and "__inputs" not in board
    assert board["title"] and re.fullmatch(r"[\w-]{1,40}", board["uid"])
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    source = {"type": "prometheus", "uid": "${datasource}"}
    asked = [variable for variable in variables.values() if variable["type"] == "query"]
    for part in [*panels(), *(target for panel in panels() for target in panel["targets"]), *asked]:
        assert part["datasource"] == source
    used = set(re.findall(r"\$\{?(\w+)\}?", FILE.read_text())) - {"__all"}
    assert used == set(variables)
    assert {variable["name"] for variable in asked} == {*TAGS, "node"}


def test_panels_lie_beside_each_other_and_say_what_they_show():
    board = dashboard()["panels"]
    assert len({panel["id"] for panel in board}) == len(board)
    taken = set()
    for panel in board:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["title"] and panel["description"] and panel["fieldConfig"]["defaults"]["unit"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_the_metrics_of_gpus_are_declared_by_ray():
    agent = pytest.importorskip("ray.dashboard.modules.reporter.reporter_agent", reason="ray[default] is missing")
    declared = {f"ray_{name}" for name in agent.METRICS_GAUGES}
    asked = {name for query in queries() for name in names(query)}
    assert declared & asked >= GPUS and asked >= OURS
    assert {name for name in asked - declared - OURS} == {"ray_object_store_memory"}  # of the raylets, in C++


def test_prometheus_understands_the_queries(tmp_path):
    promtool = shutil.which("promtool") or pytest.skip("promtool is not installed: apt-get install prometheus")
    rules = [{"record": f"panel:{i}", "expr": query} for i, query in enumerate(queries())]

    def said(rules):
        (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
        return subprocess.run([promtool, "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True)

    assert said(rules).returncode == 0, said(rules).stderr
    assert said([{"record": "panel:bad", "expr": queries()[0].replace("}", "", 1)}]).returncode == 1


def test_prometheus_takes_the_configuration_of_the_documentation(tmp_path):
    promtool = shutil.which("promtool") or pytest.skip("promtool is not installed: apt-get install prometheus")
    (tmp_path / "token").write_text("x")
    file = configuration({"DASHBOARD_PORT": "8265", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}, tmp_path)
    done = subprocess.run([promtool, "check", "config", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def get(url, token=None):
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read().decode()


def configuration(cluster, folder):
    """Prometheus's for the nodes of a cluster with a token: that of the documentation, with this cluster's address."""
    page = (CLUSTER.parent / "docs" / "clusters" / "watching.md").read_text()
    (text,) = re.findall(r"^```yaml\n(scrape_configs:.*?)^```$", page, re.M | re.S)
    text = text.replace("HEAD:8265", f"127.0.0.1:{cluster['DASHBOARD_PORT']}")
    text = text.replace("TOKEN_FILE", cluster["RAY_AUTH_TOKEN_PATH"])
    (folder / "prometheus.yml").write_text("global: {scrape_interval: 1s}\n" + text)
    return folder / "prometheus.yml"


@pytest.fixture
def prometheus(cluster, tmp_path):
    """A Prometheus that reads the cluster's metrics: a function from a query to its answer, and the process."""
    program = shutil.which("prometheus") or pytest.skip("Prometheus is not installed: apt-get install prometheus")
    address = f"127.0.0.1:{free_port()}"
    argv = [program, f"--config.file={configuration(cluster, tmp_path)}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"]

    def ask(query):
        answer = get(f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}")
        return json.loads(answer)["data"]["result"]

    with started([*argv, f"--web.listen-address={address}"], tmp_path / "prometheus.log") as process:
        wait_for(lambda: "ready to receive web requests" in process.told(), process)
        yield ask, process


def exposed(cluster):
    """Names of the metrics that the nodes of the cluster expose."""
    token = Path(cluster["RAY_AUTH_TOKEN_PATH"]).read_text()
    (group,) = json.loads(get(f"http://127.0.0.1:{cluster['DASHBOARD_PORT']}/api/prometheus/sd", token))
    text = "".join(get(f"http://{target}/metrics") for target in group["targets"])
    return set(re.findall(r"^(ray_\w+)[{ ]", text, re.M))


def test_each_query_has_an_answer_while_a_run_trains(cluster, prometheus, tmp_path):
    ask, server = prometheus
    fields = {**SMALL, "data.limit": 512, "train.epochs": 1000, "tracking.uri": "off"}
    folder = tmp_path / "rotssl" / "run"
    with started(command("pretrain.py", *flags(fields, tmp_path)), tmp_path / "log", cluster) as run:
        wait_for(lambda: journal.read(folder), run)
        asked = {name for query in queries() for name in names(query)} - GPUS
        wait_for(lambda: time.sleep(0.5) or asked <= exposed(cluster), run)
        for query in (query for query in queries() if not names(query) & GPUS):
            wait_for(lambda query=query: ask(query), run)
        (epoch,) = ask("ray_rotssl_epoch")
        assert {tag: epoch["metric"][tag] for tag in TAGS} == {"experiment": "rotssl", "run": "run"}
        assert len(ask("ray_node_cpu_utilization")) >= 1 and float(ask("ray_rotssl_epochs")[0]["value"][1]) == 1000
        assert server.poll() is None
        run.terminate()
        assert run.wait() == 130
