"""The Kubernetes manifests: valid to the API, what they run parses, and what belongs together agrees."""

import re
import shlex

import pytest

from tests.cluster.files import DOCKERFILE, PAGES, ROOT, parsed, ray_version, stated
from tests.cluster.kubernetes import FOLDER, OVERLAYS, TRAINJOBS, amount, built, groups, job, objections, one, pods

pytestmark = pytest.mark.cluster
FOLDERS = ["services", "base", *(f"overlays/{name}" for name in OVERLAYS), *TRAINJOBS]
overlay = pytest.mark.parametrize("name", OVERLAYS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_api_takes_the_manifests(folder):
    assert [line for manifest in built(folder) for line in objections(manifest)] == []


def test_a_trainjob_with_unknown_fields_is_refused():
    manifests = built("trainjob/cpu")
    asked, runtime = one(manifests, "TrainJob"), one(manifests, "TrainingRuntime")
    asked["spec"]["trainer"]["numProcPerNodes"] = 1
    node = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    node["template"]["spec"]["containers"][0]["imagePulPolicy"] = "Always"
    node["backoffLimit"] = "none"
    assert "numProcPerNodes" in "\n".join(objections(asked))
    said = "\n".join(objections(runtime))
    assert "imagePulPolicy" in said and "'none' is not of type 'integer'" in said


def test_unknown_fields_and_wrong_types_are_refused():
    manifest = job("pretrain-cpu")
    manifest["spec"]["ttlSecondsAfterFinish"] = 1
    head, workers = groups(manifest)
    head["spec"]["containers"][0]["imagePulPolicy"] = "Always"
    workers["spec"]["volumes"][0]["persistentVolumeClaim"]["claim"] = "x"
    manifest["spec"]["backoffLimit"] = "two"
    said = "\n".join(objections(manifest))
    assert said.count("Additional properties") == 3 and "'two' is not of type 'integer'" in said
    for word in ("ttlSecondsAfterFinish", "imagePulPolicy", "'claim'"):
        assert word in said
    server = one(built("services"), "Deployment")
    server["spec"]["template"]["spec"]["containers"][0]["enviroment"] = []
    assert "enviroment" in objections(server)[0]


def test_the_same_ray_everywhere():
    version = ray_version()
    for name in OVERLAYS:
        assert job(name)["spec"]["rayClusterSpec"]["rayVersion"] == version
    assert stated(ROOT / "cluster" / "cloud" / "node.sh", r"RAY_VERSION:-([\d.]+)\}") == version
    lowest, highest = re.search(r'"ray\[.*\]>=([\d.]+),<(\d+)"', (ROOT / "pyproject.toml").read_text()).groups()
    assert tuple(map(int, lowest.split("."))) <= tuple(map(int, version.split(".")[:2]))
    assert int(version.split(".")[0]) < int(highest)


def trainjobs():
    return [manifest for folder in TRAINJOBS for manifest in built(folder)]


def entrypoint(manifest):
    """What a RayJob runs: the Config or Sweep, and the field -> value of its flags."""
    program, script, *arguments = shlex.split(manifest["spec"]["entrypoint"].replace("/opt/rotssl", str(ROOT)))
    assert program == "python"
    flags = dict(zip(arguments[::2], arguments[1::2], strict=True))
    return parsed(script.rsplit("/", 1)[1], arguments), {key[2:]: value for key, value in flags.items()}


@overlay
def test_the_command_parses_and_fits_the_pods(name):
    manifest = job(name)
    asked, flags = entrypoint(manifest)
    (group,) = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    head, workers = groups(manifest)
    limits = workers["spec"]["containers"][0]["resources"]["limits"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    if name.startswith("pretrain"):
        # The rest would stand idle; fewer would be refused.
        assert asked.scaling.num_workers == group["replicas"] and asked.tracking.run_name
    # One worker per pod: with less than half of its CPUs two would share a pod, and a node.
    cpus, each = amount(limits["cpu"]), int(flags["scaling.cpus_per_worker"])
    assert cpus / 2 < each <= cpus
    gpus = limits.get("nvidia.com/gpu", "0")
    assert flags["scaling.use_gpu"] == ("true" if "gpu" in name else "false") and gpus == (
        "1" if "gpu" in name else "0"
    )
    image = workers["spec"]["containers"][0]["image"]
    assert image.endswith(":cuda" if "gpu" in name else ":cpu")
    # What is read and written is mounted, on the driver's node too.
    used = {value for key, value in flags.items() if key in ("storage.path", "data.root", "data.cache")}
    for template in (head, workers):
        assert used <= {mount["mountPath"] for mount in template["spec"]["containers"][0]["volumeMounts"]}
    assert manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


@overlay
def test_the_tracking_server_answers_to_its_name(name):
    _, flags = entrypoint(job(name))
    where = flags["tracking.uri"].removeprefix("http://")
    services = built("services")
    server = one(services, "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"][0]
    (hosts,) = [
        argument.split("=")[1].split(",") for argument in server["args"] if argument.startswith("--allowed-hosts=")
    ]
    service = one(services, "Service", where.split(":")[0])
    assert where in hosts and where.split(":")[1] == str(service["spec"]["ports"][0]["port"])
    assert f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc:5000" in hosts
    assert "*" not in hosts, "that would be every host"
    for object_ in ("mlflow", "postgres"):
        chosen = one(services, "Service", object_)["spec"]["selector"]
        kind = "Deployment" if object_ == "mlflow" else "StatefulSet"
        assert chosen == one(services, kind, object_)["spec"]["template"]["metadata"]["labels"]


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != "base"])
def test_pods_have_no_rights_that_they_do_not_need(folder):
    for pod in (pod for manifest in built(folder) for pod in pods(manifest)):
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True and context["runAsUser"] > 0 and context["fsGroup"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert context["fsGroupChangePolicy"] == "OnRootMismatch"
        assert pod["automountServiceAccountToken"] is False
        # Else the service mlflow sets MLFLOW_PORT, which MLflow reads, in each container.
        assert pod["enableServiceLinks"] is False
        for container in pod["containers"]:
            own = container["securityContext"]
            assert own == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["imagePullPolicy"] == "IfNotPresent" and not container["image"].endswith(":latest")
            assert ":" in container["image"]
            assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"]["requests"])
            assert {"memory", "ephemeral-storage"} <= set(container["resources"]["limits"])
            for variable in container.get("env", ()):
                secret = variable["name"].endswith(("PASSWORD", "KEY", "TOKEN", "USERNAME"))
                assert not secret or "secretKeyRef" in variable["valueFrom"], variable["name"]
    user = stated(DOCKERFILE, r"^USER (\d+):\d+$")
    assert all(str(pod["securityContext"]["runAsUser"]) in (user, "999") for m in built(folder) for pod in pods(m))


@overlay
def test_volumes_fit_into_what_a_pod_may_use(name):
    for template in groups(job(name)):
        (container,) = template["spec"]["containers"]
        limits = container["resources"]["limits"]
        sizes = {volume["name"]: volume["emptyDir"] for volume in template["spec"]["volumes"] if "emptyDir" in volume}
        assert sizes["shm"]["medium"] == "Memory"
        # The object store counts as memory of the container, and the cache as storage of the node.
        assert amount(sizes["shm"]["sizeLimit"]) <= amount(limits["memory"]) / 2
        assert amount(sizes["cache"]["sizeLimit"]) < amount(limits["ephemeral-storage"])
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted["shm"] == "/dev/shm" and set(mounted) == {v["name"] for v in template["spec"]["volumes"]}
        assert container["lifecycle"]["preStop"]["exec"]["command"][2].startswith("ray stop --grace-period ")
        grace = int(container["lifecycle"]["preStop"]["exec"]["command"][2].split()[-1])
        assert grace < template["spec"]["terminationGracePeriodSeconds"]


def test_what_is_named_exists():
    services = built("services")
    made = {(o["kind"], o["metadata"]["name"]) for o in services}
    for manifest in [*services, *map(job, OVERLAYS), *trainjobs()]:
        for pod in pods(manifest):
            assert ("ServiceAccount", pod["serviceAccountName"]) in made
            assert (
                pod.get("priorityClassName") in (None, "rotssl-training")
                and ("PriorityClass", "rotssl-training") in made
            )
            for volume in pod.get("volumes", ()):
                if claim := volume.get("persistentVolumeClaim"):
                    assert ("PersistentVolumeClaim", claim["claimName"]) in made
                if config := volume.get("configMap"):
                    assert ("ConfigMap", config["name"]) in made
    for claim in ("rotssl-results", "rotssl-data"):
        assert one(services, "PersistentVolumeClaim", claim)["spec"]["accessModes"] == ["ReadWriteMany"]
    assert {o["metadata"].get("namespace") for o in services} == {"rotssl", None}
    assert {job(name)["metadata"]["namespace"] for name in OVERLAYS} == {"rotssl"}


def references(value):
    """(secret, key) of all references to secrets within an object."""
    if isinstance(value, dict):
        if "secretKeyRef" in value:
            yield value["secretKeyRef"]["name"], value["secretKeyRef"]["key"]
        for part in value.values():
            yield from references(part)
    elif isinstance(value, list):
        for part in value:
            yield from references(part)


def test_secrets_are_only_named_and_the_page_makes_them():
    manifests = [*built("services"), *map(job, OVERLAYS), *trainjobs()]
    assert not [m for m in manifests if m["kind"] == "Secret"]
    (page,) = [page.read_text() for page in PAGES if page.stem == "kubernetes"]
    made = set()
    for name, rest in re.findall(r"create secret generic (\S+)((?:.*\\\n)*.*)", page):
        made |= {(name, key) for key in re.findall(r"--from-literal=([\w-]+)=", rest)}
    assert made == {pair for manifest in manifests for pair in references(manifest)}


@overlay
def test_a_job_ends_in_any_case_and_leaves_its_logs(name):
    spec = job(name)["spec"]
    assert 0 < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]
    assert spec["submissionMode"] == "K8sJobMode" and spec["backoffLimit"] > 0
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    if "kueue" in name:  # which wants the whole cluster gone
        assert spec["shutdownAfterJobFinishes"] is True and spec["ttlSecondsAfterFinished"] > 0
        assert "deletionStrategy" not in spec
        assert job(name)["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
        return
    # KubeRay refuses rules beside these two.
    assert "shutdownAfterJobFinishes" not in spec and "ttlSecondsAfterFinished" not in spec
    rules = {}
    for rule in spec["deletionStrategy"]["deletionRules"]:
        ((condition, value),) = [item for item in rule["condition"].items() if item[0] != "ttlSeconds"]
        rules.setdefault((condition, value), {})[rule["policy"]] = rule["condition"]["ttlSeconds"]
    assert set(rules) == {("jobStatus", "SUCCEEDED"), ("jobDeploymentStatus", "Failed")}
    for seconds in rules.values():
        assert seconds["DeleteWorkers"] <= 600 < 3600 <= seconds["DeleteCluster"]
    # The autoscaler would need a token of the service account, and excludes DeleteWorkers.
    assert "enableInTreeAutoscaling" not in spec["rayClusterSpec"]


@pytest.mark.parametrize("name", [name for name in OVERLAYS if "spot" in name])
def test_workers_are_on_spot_machines_and_the_head_is_not(name):
    head, workers = groups(job(name))

    def terms(template):
        affinity = template["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        return affinity["nodeSelectorTerms"]

    any_of = {e["key"]: tuple(e["values"]) for term in terms(workers) for e in term["matchExpressions"]}
    (none_of,) = terms(head)
    assert {e["key"]: tuple(e["values"]) for e in none_of["matchExpressions"]} == any_of
    assert {e["operator"] for e in none_of["matchExpressions"]} == {"NotIn"}
    assert all(len(term["matchExpressions"]) == 1 for term in terms(workers)), (
        "terms are alternatives, expressions are not"
    )
    tolerated = {toleration["key"] for toleration in workers["spec"]["tolerations"]}
    assert tolerated == {"nvidia.com/gpu", "cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"}
    assert "tolerations" not in head["spec"]


def test_ray_and_the_database_are_closed_to_others():
    policies = {o["metadata"]["name"]: o["spec"] for o in built("services") if o["kind"] == "NetworkPolicy"}
    assert set(policies) == {"postgres", "mlflow", "ray"}
    (rule,) = policies["postgres"]["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "mlflow"}}}]
    assert policies["ray"]["podSelector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    outside = [rule for rule in policies["ray"]["ingress"] if any("namespaceSelector" in peer for peer in rule["from"])]
    assert [[port["port"] for port in rule["ports"]] for rule in outside] == [[8265], [8080]]
    labels = one(built("services"), "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_the_registry_is_named_once():
    named = [path for path in FOLDER.rglob("*.yaml") if "registry.example.com" in path.read_text()]
    assert [path.parent.name for path in named] == ["image"]
