"""Manifests as `kubectl apply -k` would send them, and what the Kubernetes API would say about them."""

import copy
import functools
import os
import re
from pathlib import Path

import pytest
import yaml

from tests.cluster.files import CLUSTER, ROOT, output, program

FOLDER = CLUSTER / "kubernetes"
OVERLAYS = sorted(path.name for path in (FOLDER / "overlays").iterdir())
TRAINJOBS = ["trainjob/cpu", "trainjob/gpu"]
RAY = "ray.io/v1"
# Kind -> the file with its CRD, as KubeRay's and Kubeflow Trainer's repositories name it.
CRDS = {
    "RayJob": "rayjobs.yaml",
    "TrainJob": "trainer.kubeflow.org_trainjobs.yaml",
    "TrainingRuntime": "trainer.kubeflow.org_trainingruntimes.yaml",
}


@functools.cache
def _built(folder):
    return list(yaml.load_all(output(program("kubectl"), "kustomize", folder), yaml.CSafeLoader))


def built(name):
    """The objects of a folder below cluster/kubernetes."""
    return copy.deepcopy(_built(FOLDER / name))


def job(overlay):
    """The RayJob of an overlay."""
    (found,) = built(f"overlays/{overlay}")
    assert (found["apiVersion"], found["kind"]) == (RAY, "RayJob")
    return found


def one(objects, kind, name=None):
    """The one object of a kind and a name."""
    (found,) = [o for o in objects if o["kind"] == kind and name in (None, o["metadata"]["name"])]
    return found


def groups(rayjob):
    """The pod templates of the head and of the workers."""
    cluster = rayjob["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    return cluster["headGroupSpec"]["template"], workers["template"]


def pods(value):
    """All pod specs within an object."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for part in value.values():
            yield from pods(part)
    elif isinstance(value, list):
        for part in value:
            yield from pods(part)


def amount(quantity):
    """A quantity of Kubernetes as a number."""
    number, unit = re.fullmatch(r"([\d.]+)([A-Za-z]*)", str(quantity)).groups()
    return float(number) * {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}[unit]


def strict(node):
    """A schema that also refuses unknown fields, as the API server does with `--validate=strict`, which is kubectl's default."""
    if isinstance(node, list):
        return [strict(part) for part in node]
    if not isinstance(node, dict):
        return node
    node = {key: strict(part) for key, part in node.items()}
    if node.get("type") == "object" and "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
        node.setdefault("additionalProperties", False)
    if node.pop("x-kubernetes-int-or-string", False):
        node.pop("anyOf", None)
        node["type"] = ["integer", "string"]
    if node.pop("nullable", False) and "type" in node:
        node["type"] = [node["type"], "null"]
    return node


def schema(kind, api):
    """The schema of a kind of object in its CRD, in a version of the API; the test is skipped without the CRD."""
    folder = Path(os.environ.get("ROTSSL_CRDS", ROOT.parent / "shared" / "testbed" / "crd"))
    file = folder / CRDS[kind]
    if not file.exists():
        pytest.skip(
            f"{folder} has no {file.name}: set ROTSSL_CRDS to a folder with the CRDs of KubeRay and Kubeflow Trainer"
        )
    crd = yaml.load(file.read_text(), yaml.CSafeLoader)["spec"]
    (version,) = [v for v in crd["versions"] if f"{crd['group']}/{v['name']}" == api]
    found = strict(version["schema"]["openAPIV3Schema"])
    found["properties"]["metadata"] = {"type": "object"}  # of which a CRD says nothing
    return found


@functools.cache
def _validator(kind, api):
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: pip install '.[cluster]'")
    return jsonschema.Draft202012Validator(schema(kind, api))


def objections(manifest):
    """What the API server would refuse, one line each."""
    if manifest["kind"] in CRDS:
        found = _validator(manifest["kind"], manifest["apiVersion"]).iter_errors(manifest)
        return ["/".join(map(str, e.path)) + f": {e.message[:200]}" for e in found]
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed: '.[cluster]'")
    try:
        validate.validate(manifest, validate.latest_version(), strict=True)
    except Exception as error:
        return [f"{manifest['kind']}: {error}"]
    return []
