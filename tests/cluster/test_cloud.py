"""The files for `ray up` and SkyPilot: taken by their own checks, their commands understood, their scripts clean."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest
import yaml

from tests.cluster.files import CLUSTER, ROOT, output, parsed, shellcheck, without_login
from tests.conftest import free_port

pytestmark = pytest.mark.cluster
FOLDER = CLUSTER / "cloud"
CLUSTERS = ["aws", "gcp", "onpremise"]
each = pytest.mark.parametrize("name", CLUSTERS)


def config(name):
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def taken(found):
    """What `ray up` does with a file before it asks a cloud for anything."""
    import jsonschema
    import ray
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(found, json.loads(schema.read_text()))
    prepared = prepare_config(found)
    validate_config(prepared)
    return prepared


@each
def test_ray_takes_the_file(name):
    prepared = taken(config(name))
    workers = sum(kind.get("min_workers", 0) for kind in prepared["available_node_types"].values())
    assert workers == prepared["max_workers"] == 2


@each
def test_a_misspelled_field_is_refused(name):
    from jsonschema import ValidationError

    found = config(name)
    found["setup_comands"] = found.pop("setup_commands")
    with pytest.raises(ValidationError, match="setup_comands"):
        taken(found)


@each
def test_the_commands_are_understood(name):
    from ray.scripts.scripts import start

    found = config(name)
    for kind in ("head", "worker"):
        commands = found[f"{kind}_start_ray_commands"]
        shellcheck("".join(f"{command}\n" for command in commands))
        words = shlex.split(re.search(r"ray start (.*)", " ".join(commands[-1].split()))[1])
        options = start.make_context("start", words).params
        assert options["head"] == (kind == "head") and "RAY_AUTH_MODE=token" in commands[-1]
        if kind == "head":
            # The dashboard runs whatever it is sent: `ray dashboard` reaches it through ssh.
            assert options["dashboard_host"] == "127.0.0.1" and options["num_cpus"] == 0
            port = options["port"]
            assert options["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
        else:
            assert options["address"] == f"$RAY_HEAD_IP:{port}"
            # A machine that was stopped is not set up again, and has no mounts.
            assert 'bash ~/rotssl/node.sh mount "$RAY_HEAD_IP:/shared"' in commands
    mounted = {Path(place).name: source for place, source in found["file_mounts"].items()}
    assert mounted == {
        "pyproject.toml": "pyproject.toml",
        "node.sh": "cluster/cloud/node.sh",
        "auth_token": "~/.ray/auth_token",
    }
    assert all((ROOT / source).is_file() for source in mounted.values() if not source.startswith("~"))
    used = {verb for command in _commands(found) for verb in re.findall(r"node\.sh (\w+)", command)}
    assert used == {"profile", "setup", "serve", "mount", "mlflow", "address"}


def _commands(found):
    return [command for key, value in found.items() if key.endswith("_commands") for command in value]


def test_workers_are_spot_machines_and_the_head_is_not():
    for name, spot in (("aws", "InstanceMarketOptions"), ("gcp", "scheduling")):
        kinds = config(name)["available_node_types"]
        assert {kind for kind, found in kinds.items() if spot in found["node_config"]} == {"cpu_spot", "gpu_spot"}
        assert kinds["head"]["resources"] == {"CPU": 0}, "the driver's machine takes no workers"
    kinds = config("aws")["available_node_types"]
    assert kinds["gpu_spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert config("gcp")["available_node_types"]["gpu_spot"]["node_config"]["scheduling"]["provisioningModel"] == "SPOT"


def test_what_is_chosen_by_the_user_is_marked():
    for name in CLUSTERS:
        text = (FOLDER / f"{name}.yaml").read_text()
        assert "EDIT" in text
        for line in text.splitlines():
            chosen = re.match(
                r"\s*(region|availability_zone|project_id|ImageId|head_ip|worker_ips|ssh_private_key):", line
            )
            assert not chosen or "EDIT" in line, line


def test_skypilot_takes_the_file():
    sky = pytest.importorskip("sky", reason="skypilot is not installed; it wants an environment of its own")
    found = config("sky")
    task = sky.Task.from_yaml_config(found, secrets_overrides=[("RAY_AUTH_TOKEN", "x")])
    assert task.num_nodes == 2
    with pytest.raises(Exception, match="num_node"):
        sky.Task.from_yaml_config({**found, "num_node": 2}, secrets_overrides=[("RAY_AUTH_TOKEN", "x")])


def test_what_skypilot_runs_is_clean_and_parses():
    found = config("sky")
    shellcheck(found["run"])
    shellcheck(found["setup"])
    assert set(found) == {"name", "num_nodes", "workdir", "resources", "envs", "secrets", "setup", "run"}
    asked = parsed("pretrain.py", _in_the_checkout(found["envs"]["ARGUMENTS"]))
    assert asked.data.root == "/shared/data"
    # Its own Ray would end with ours.
    assert not re.search(r"^\s*ray stop", found["run"], re.M) and found["secrets"] == {"RAY_AUTH_TOKEN": None}


def _in_the_checkout(arguments):
    return [str(ROOT / word) if word.startswith("jobs/") else word for word in arguments.split()]


def test_the_script_is_clean_and_says_its_verbs(tmp_path):
    shellcheck((FOLDER / "node.sh").read_text())
    done = subprocess.run(["bash", str(FOLDER / "node.sh")], capture_output=True, text=True)
    assert done.returncode == 2
    for verb in ("setup", "profile", "serve", "mount", "mlflow", "address"):
        assert f"node.sh {verb}" in done.stdout
    home = without_login() | {"HOME": str(tmp_path)}
    for _ in range(2):
        output("bash", FOLDER / "node.sh", "profile", env=home)
    (line,) = (tmp_path / ".bashrc").read_text().splitlines()
    assert line.startswith(f"export PATH={tmp_path}/rotssl-env/bin:$PATH RAY_AUTH_MODE=token")


def test_an_old_python_is_refused_in_one_line(tmp_path):
    pretend = "import sys; sys.version_info = (3, 10, 12); exec(sys.argv[1])"
    programs = {
        "python3": f'if [ "$1" = --version ]; then echo "Python 3.10.12"; else {sys.executable} -c "{pretend}" "$2"; fi',
        "sudo": "exit 99",
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = without_login() | {"HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(FOLDER / "node.sh"), "setup", "x"], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Python 3.10.12, but 3.11 or newer is needed") and done.stderr.count("\n") == 1


@pytest.mark.system
def test_the_server_of_the_head_starts_once_and_answers_to_its_address(tmp_path):
    port = free_port()
    env = without_login() | {"HOME": str(tmp_path), "ENVIRONMENT": sys.prefix, "PORT": port}
    script = FOLDER / "node.sh"
    address = output("bash", script, "address", env=env).strip()
    place = tmp_path / "mlflow"
    try:
        output("bash", script, "mlflow", env=env)
        first = (place / "pid").read_text()
        with urlopen(f"http://{address}:{port}/api/2.0/mlflow/experiments/get?experiment_id=0") as answer:
            assert json.load(answer)["experiment"]["name"] == "Default"
        output("bash", script, "mlflow", env=env)
        assert (place / "pid").read_text() == first
    finally:
        if (place / "pid").exists():
            os.killpg(int((place / "pid").read_text()), signal.SIGTERM)
