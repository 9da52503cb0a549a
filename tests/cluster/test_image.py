"""The image and the Compose file: clean to their linters, without secrets, and each RUN line really run."""

import os
import re
import shlex
import shutil
import stat
import subprocess
import warnings
from pathlib import Path

import pytest
import yaml

from tests.cluster.dockerfile import context, ignored, patterns_of, stages
from tests.cluster.files import (
    CLUSTER,
    DOCKERFILE,
    ROOT,
    output,
    program,
    ray_version,
    shellcheck,
    stated,
    without_login,
)

pytestmark = pytest.mark.cluster
IGNORE = ROOT / ".dockerignore"
COMPOSE = CLUSTER / "compose.yaml"


def test_hadolint_has_nothing_to_say():
    assert output(program("hadolint"), DOCKERFILE) == ""


def test_the_context_has_what_is_copied_and_little_else():
    patterns = patterns_of(IGNORE)
    sent = set(context(ROOT, patterns))
    assert sum((ROOT / path).stat().st_size for path in sent) < 100e6
    assert {path.split("/")[0] for path in sent} == {"LICENSE", "README.md", "pyproject.toml", "rotssl", "jobs"}
    for path in (
        ".git/config",
        ".venv/bin/python",
        "results/mlflow.db",
        "cluster/.env",
        "data/x",
        "rotssl/__pycache__/x.pyc",
    ):
        assert ignored(path, patterns), path
    for path in ("rotssl/data/sample/LICENSE", "rotssl/reports/report.html.j2", "jobs/recipes/byol_cifar10.yaml"):
        assert path in sent
    for stage in stages(DOCKERFILE.read_text()).values():
        for word, line in stage.lines:
            if word == "COPY" and "--from" not in line:
                for source in line.split()[:-1]:
                    assert source in sent or any(path.startswith(f"{source}/") for path in sent)


def test_the_image_is_not_root_and_pins_what_the_manifests_name():
    for device in ("cpu", "cuda"):
        found = stages(DOCKERFILE.read_text(), DEVICE=device)
        last = found[""]
        assert last.base == f"runtime-{device}" and dict(last.lines)["USER"] == "1000:1000"
        assert ("NVIDIA_VISIBLE_DEVICES" in last.values) == (device == "cuda")
        assert found["build"].values.get("UV_TORCH_BACKEND") == ("cpu" if device == "cpu" else None)
        (install,) = [line for word, line in found["build"].lines if "--requirements pyproject.toml" in line]
        assert (
            '"ray[default,train,tune]==${RAY_VERSION}"' in install
            and found["build"].values["RAY_VERSION"] == ray_version()
        )
        assert last.values["RAY_AUTH_MODE"] == "token"
    python = stated(DOCKERFILE, r"^ARG PYTHON_VERSION=(.+)$")
    lowest = stated(ROOT / "pyproject.toml", r'^requires-python = ">=(.+)"$')
    assert tuple(map(int, python.split("."))) >= tuple(map(int, lowest.split(".")))


@pytest.fixture(scope="module")
def compose():
    """The Compose file, with its variables as they are."""
    return yaml.safe_load(COMPOSE.read_text())


def test_compose_knows_all_keys(compose):
    models = pytest.importorskip("compose_spec.models", reason="compose-spec is not installed: '.[cluster]'")

    def known(model):
        return {alias for name, field in model.model_fields.items() for alias in (name, field.alias)} - {None}

    assert {key for key in compose if not key.startswith("x-")} <= known(models.ComposeSpecification)
    for name, service in compose["services"].items():
        assert set(service) <= known(models.Service), name
        assert set(service.get("healthcheck", {})) <= known(models.Healthcheck)
    for config in compose["configs"].values():
        assert set(config) <= known(models.Config)


def test_compose_waits_for_health_and_publishes_to_this_host_only(compose):
    services = compose["services"]
    assert set(services) == {"head", "worker", "mlflow", "postgres", "s3"}
    for name, service in services.items():
        assert "healthcheck" in service, name
        assert not service["image"].endswith(":latest") and ":" in service["image"]
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:")
        for other, how in service.get("depends_on", {}).items():
            assert how["condition"] == "service_healthy" and other in services
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (CLUSTER / source).is_file() if source.startswith(".") else source in compose["volumes"]
    assert services["head"]["build"] == {
        "context": "..",
        "dockerfile": "cluster/image/Dockerfile",
        "args": {"DEVICE": "${DEVICE:-cpu}"},
    }
    for name in ("head", "worker"):
        assert services[name]["environment"]["RAY_AUTH_MODE"] == "token"


def test_the_passwords_are_made_once_and_are_in_no_file_of_the_repository(tmp_path):
    text = COMPOSE.read_text()
    script = tmp_path / "make-env.sh"
    shutil.copy(CLUSTER / "make-env.sh", script)
    output("bash", script)
    made = tmp_path / ".env"
    assert stat.S_IMODE(made.stat().st_mode) == 0o600 and [path.name for path in tmp_path.glob(".env*")] == [".env"]
    first = made.read_text()
    values = dict(line.split("=", 1) for line in first.splitlines())
    secrets = {name for name in values if name.endswith(("PASSWORD", "TOKEN", "KEY"))}
    assert len(secrets) == 5 and len({values[name] for name in secrets}) == 5
    assert all(re.fullmatch(r"[0-9a-f]{48}", values[name]) for name in secrets)
    output("bash", script)
    assert made.read_text() == first, "the databases have the first ones"
    # What has no default must be in the file, and stop Compose with what to do if it is not.
    used = re.findall(r"\$\{(\w+)(:-|:\?)", text)
    assert {name for name, kind in used if kind == ":?"} == set(values) - {"DEVICE"}
    assert not re.search(r"\$\{?\w+\}", text), "a variable without a default and without a message"
    assert subprocess.run(["git", "check-ignore", "-q", "cluster/.env"], cwd=ROOT).returncode == 0
    assert ignored("cluster/.env", patterns_of(IGNORE)) and "/cluster/.env" in (ROOT / ".rayignore").read_text()


def test_scripts_are_clean():
    shellcheck((CLUSTER / "make-env.sh").read_text())


def test_what_the_containers_run_is_understood(compose):
    from ray.scripts.scripts import start

    with warnings.catch_warnings(action="ignore"):  # of its own type hints
        from mlflow.cli import server

    def understood(command, words):
        command.make_context(words[0], [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in words[1:]])

    for name in ("head", "worker"):
        words = compose["services"][name]["command"]
        assert words[:2] == ["ray", "start"]
        understood(start, words[1:])
    understood(server, compose["services"]["mlflow"]["command"][1:])
    (port,) = re.findall(r"127\.0\.0\.1:(\d+)/api", compose["services"]["head"]["healthcheck"]["test"][3])
    assert int(port) == next(option.default for option in start.params if option.name == "dashboard_agent_listen_port")


AS_BUILT = """
set -euo pipefail
mount -t overlay overlay -o "lowerdir=/,upperdir=$PLACE/up,workdir=$PLACE/work" "$PLACE/root"
for folder in proc dev sys; do mount --rbind "/$folder" "$PLACE/root/$folder"; done
mount --bind "$CACHE" "$PLACE/root/mnt"
chroot "$PLACE/root" /usr/bin/env --ignore-environment /bin/bash /build.sh
"""


def build_script(device, python):
    """A script that does what a builder does: the stages ``build`` and the last one, in one folder tree."""
    found = stages(DOCKERFILE.read_text(), DEVICE=device)
    # The base image has nobody with the number 1000, and its Python is everybody's.
    lines = ["set -euo pipefail", "sed -i '/:x:1000:/d' /etc/passwd /etc/group", f"chmod o+x /root {python}"]
    lines += ["rm -rf /opt/venv /opt/rotssl"]
    for stage in (found["build"], found[""]):
        values = stage.values | {"UV_CACHE_DIR": "/mnt", "UV_LINK_MODE": "symlink"}
        # How this machine reaches the package index.
        values |= {name: os.environ[name] for name in os.environ if re.search("cert|proxy|ca_bundle", name, re.I)}
        lines += [f"export {name}={shlex.quote(value)}" for name, value in values.items()] + ["unset UV_NO_CACHE"]
        lines += [f"export PATH={stage.values['PATH'].replace('/usr/local/bin', f'{python}:/usr/local/bin', 1)}"]
        for word, line in stage.lines:
            if word == "RUN":
                lines += [f"echo {shlex.quote(f'RUN {line}')}", f"/bin/sh -ec {shlex.quote(line)}"]
            elif word == "WORKDIR":
                lines += [f"mkdir -p {line}", f"cd {line}"]
            elif word == "COPY" and "--from" not in line:
                *sources, target = line.split()
                lines += [f"cp -r /context/{source} {target}" for source in sources]
    return lines


@pytest.mark.exhaustive
@pytest.mark.timeout(3000)
def test_each_run_line_runs_in_a_copy_of_this_machine(tmp_path):
    """All lines of the image with CUDA, in order, as root in a chroot: an overlay over this Debian, which stays as it is.

    What differs from a build: this machine is the base image, and uv has a cache. The image for CPUs differs in where torch
    comes from. At the end the user of the image trains two steps.
    """
    python = shutil.which("python3.11")
    if os.geteuid() != 0 or not shutil.which("unshare") or "bookworm" not in Path("/etc/os-release").read_text():
        pytest.skip("needs root on Debian 12, which the image's base is")
    if python is None:
        pytest.skip("needs Python 3.11, which the image's base has")
    base = output(python, "-c", "import sys; print(sys.base_prefix)").strip()
    script = build_script("cuda", f"{base}/bin")
    smoke = "python jobs/pretrain.py --scaling.num_workers 0 --smoke --storage.path /results --tracking.uri off"
    script += [
        f"setpriv --reuid=1000 --regid=1000 --clear-groups env HOME=/home/ray {smoke}",
        "command -v g++ ray mlflow",
    ]
    place = tmp_path / "overlay"
    for name in ("up/context", "work", "root"):
        (place / name).mkdir(parents=True)
    for path in context(ROOT, patterns_of(IGNORE)):
        target = place / "up" / "context" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, target)
    (place / "up" / "build.sh").write_text("\n".join(script))
    cache = output(shutil.which("uv") or program("uv"), "cache", "dir").strip()
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", AS_BUILT],
        env=without_login() | {"PLACE": str(place), "CACHE": cache},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("RUN ") == DOCKERFILE.read_text().count("\nRUN ")
