"""Manifests without a cluster: what ships is right, kubectl agrees, and each planted mistake is rejected by name."""

import copy
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from cluster import manifests, overlays
from cluster.manifests import Cluster
from cluster.manifests_check import pods, problems
from cluster.manifests_schema import Schemas
from pipelines import presets
from pipelines.cli import VERBS, overrides, split_verb
from pipelines.errors import UsageError

ROOT = Path(__file__).parent.parent
TREE = ROOT / "infra" / "kubernetes"
OVERLAYS = sorted(path.parent.name for path in TREE.glob("overlays/*/kustomization.yaml"))


@pytest.fixture(scope="module")
def schemas():
    return Schemas()


def job(**changes):
    """A RayJob, with settings of its `spec` by dotted path."""
    document = manifests.rayjob(
        "train-1", "jepa pretrain", Cluster("registry/jepa:1", service_account="default", priority_classes=False)
    )
    for path, value in changes.items():
        node = document["spec"]
        *parents, last = [int(part) if part.isdigit() else part for part in path.split("__")]
        for part in parents:
            node = node[part]
        if value is None:
            del node[last]
        else:
            node[last] = value
    return document


def told(document, schemas, gates=()):
    return [f"{problem.path}: {problem.text}" for problem in problems([document], schemas, gates)]


def test_every_overlay_is_right_and_a_line_each(tmp_path, capsys):
    before = os.times()
    assert overlays.main(["--root", str(TREE), "--out", str(tmp_path), "--keep"]) == 0, capsys.readouterr().out
    after = os.times()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("ok")] == [f"{tmp_path}/{name}.yaml" for name in OVERLAYS]
    assert {"dev", "prod", "pretrain", "ingest"} <= set(OVERLAYS)
    assert after.user + after.system - before.user - before.system < 15  # the goal is 20 s for `make manifests`


@pytest.mark.parametrize("place", overlays.generated())
def test_what_the_overlays_hold_is_what_the_functions_render(place):
    assert (TREE / "overlays" / place).read_text() == overlays.text_of(overlays.generated()[place]), "run make manifests"


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed: nothing to compare the rendering with")
@pytest.mark.parametrize("name", OVERLAYS)
def test_kubectl_renders_the_same(name):
    result = subprocess.run(["kubectl", "kustomize", str(TREE / "overlays" / name)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    theirs = {(item["kind"], item["metadata"]["name"]): item for item in yaml.safe_load_all(result.stdout)}
    ours = {(item["kind"], item["metadata"]["name"]): item for item in overlays.render(TREE / "overlays" / name)}
    assert theirs == ours


def test_a_job_is_right_and_reaches_its_cluster_by_token(schemas):
    assert told(job(), schemas) == []
    queued = manifests.rayjob("train-1", "x", Cluster("i:1", queue="gpus", service_account="default", priority_classes=False))
    assert told(queued, schemas) == []
    assert queued["spec"]["suspend"]
    assert not queued["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"]


def test_a_job_of_the_submit_verb_is_right_with_few_words(schemas):
    pods = SimpleNamespace(
        image="registry/jepa@sha256:0", namespace="default", token_secret="t", gpu_workers=2, decode_workers=1, queue=None,
        env_secret="keys", deadline_s=3600, wait_s=60, service_account="default", pools=False,
    )  # fmt: skip
    document = manifests.rayjob("jepa-pretrain-0123456789", "jepa pretrain", pods)
    assert told(document, schemas) == []
    spec = document["spec"]
    assert (spec["activeDeadlineSeconds"], spec["preRunningDeadlineSeconds"]) == (3600, 60)
    assert spec["jobId"] == document["metadata"]["name"]
    groups = {group["groupName"]: group for group in spec["rayClusterSpec"]["workerGroupSpecs"]}
    assert [(groups[name]["minReplicas"], groups[name]["maxReplicas"]) for name in ("decode", "train")] == [(1, 1), (2, 2)]
    assert groups["decode"]["labels"] == {"role": "decode"}
    container = groups["train"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert container["env"][-2:] == [{"name": "TMPDIR", "value": "/spill"}, {"name": "RAY_TMPDIR", "value": "/tmp"}]
    assert "tolerations" not in groups["decode"]["template"]["spec"]
    pods.pools, pods.service_account = True, "jepa-run"
    (decode, _) = manifests.rayjob("a", "b", pods)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert decode["template"]["spec"]["serviceAccountName"] == "jepa-run"
    assert {item["key"] for item in decode["template"]["spec"]["tolerations"]} == {"jepa-pool", "jepa-spot"}
    pods.gpu_workers = 0
    assert len(manifests.rayjob("a", "b", pods)["spec"]["rayClusterSpec"]["workerGroupSpecs"]) == 1


HEAD = "rayClusterSpec__headGroupSpec__template__spec"
PLANTED = {
    "a typo in a field": ({"shutdownAfterJobFinish": True}, "shutdownAfterJobFinish"),
    "a typo in a group": ({"rayClusterSpec__workerGroupSpecs__0__maxReplica": 3}, "maxReplica"),
    "a word of the wrong type": ({"backoffLimit": "three"}, "backoffLimit: 'three' is not of type 'integer'"),
    "a privileged pod": (
        {"rayClusterSpec__headGroupSpec__template__spec__containers__0__securityContext__privileged": True},
        "Pod Security restricted: privileged",
    ),
    "root": ({"rayClusterSpec__headGroupSpec__template__spec__securityContext__runAsUser": 0}, "runAsUser must not be 0"),
    "the node's network": ({"rayClusterSpec__headGroupSpec__template__spec__hostNetwork": True}, "hostNetwork must not be set"),
    "the node's disk": (
        {"rayClusterSpec__headGroupSpec__template__spec__volumes__0": {"name": "tmp", "hostPath": {"path": "/"}}},
        "volume tmp is a hostPath",
    ),
    "no submitter": ({"submitterPodTemplate": None}, "KubeRay's default submitter pod is not admitted"),
    "an open autoscaler": ({"rayClusterSpec__autoscalerOptions__securityContext": None}, "autoscalerOptions.securityContext"),
    "a missing token": ({"rayClusterSpec__authOptions": None}, "rayClusterSpec.authOptions: no token"),
    "a token switched off": ({"rayClusterSpec__authOptions__mode": "disabled"}, "no token: mode must be token"),
    "a token for an old Ray": ({"rayClusterSpec__rayVersion": "2.51.1"}, "a token needs rayVersion 2.52"),
    "an alpha field": ({"rayClusterSpec__networkPolicy": {"mode": "DenyAll"}}, "alpha (feature gate RayClusterNetworkPolicy"),
    "a secret in the environment": (
        {"rayClusterSpec__headGroupSpec__template__spec__containers__0__env": [{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}]},
        "a secret's value must not stand in a document",
    ),
    "a secret in the command": ({"entrypoint": "WANDB_API_KEY=abc jepa pretrain"}, "looks like a secret"),
    "no version of the image": (
        {"rayClusterSpec__headGroupSpec__template__spec__containers__0__image": "registry:5000/jepa"},
        "has no version",
    ),
    "restarts under autoscaler v2": (
        {"rayClusterSpec__headGroupSpec__template__spec__restartPolicy": "Always"},
        "autoscaler v2 needs restartPolicy Never",
    ),
    "both switches of the autoscaler": (
        {
            "rayClusterSpec__headGroupSpec__template__spec__containers__0__env": [
                {"name": "RAY_enable_autoscaler_v2", "value": "1"}
            ]
        },
        "RAY_enable_autoscaler_v2",
    ),
    "more at least than at most": ({"rayClusterSpec__workerGroupSpecs__0__minReplicas": 99}, "minReplicas <= maxReplicas"),
    "labels of ray start": ({"rayClusterSpec__headGroupSpec__rayStartParams__labels": "a=b"}, "group's own field labels"),
    "resources twice": ({"rayClusterSpec__headGroupSpec__resources": {"CPU": "1"}}, "both here and in rayStartParams"),
    "a ttl that does nothing": ({"shutdownAfterJobFinishes": False}, "a ttl needs shutdownAfterJobFinishes"),
    "two clusters": ({"clusterSelector": {"ray.io/cluster": "jepa"}}, "exactly one of rayClusterSpec and clusterSelector"),
    "retries on a standing cluster": (
        {"clusterSelector": {"ray.io/cluster": "jepa"}, "rayClusterSpec": None, "backoffLimit": 2},
        "no retries with clusterSelector",
    ),
    "a sidecar with a submitter": ({"submissionMode": "SidecarMode"}, "SidecarMode has no submitterPodTemplate"),
    "rules beside a ttl": (
        {"deletionStrategy": {"deletionRules": [{"policy": "DeleteSelf", "condition": {}}]}},
        "deletionRules exclude",
    ),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_planted_mistakes_are_rejected_by_name(mistake, schemas):
    changes, words = PLANTED[mistake]
    found = told(job(**changes), schemas)
    assert any(words in line for line in found), found


def test_an_alpha_kind_needs_an_overlay_that_names_it(schemas):
    document = manifests.raycronjob(
        "hourly", "0 * * * *", "jepa ingest", Cluster("i:1", service_account="default", priority_classes=False)
    )
    assert [line for line in told(document, schemas) if "alpha" not in line] == []
    assert "kind: RayCronJob is alpha (feature gate RayCronJob" in told(document, schemas)[0]
    assert told(document, schemas, {"RayCronJob"}) == []
    assert overlays.gates(TREE / "overlays" / "prod") == []


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("concurrencyPolicy", "Allow", "must be Forbid"),
        ("concurrencyPolicy", "Replace", "must be Forbid"),
        ("startingDeadlineSeconds", None, "startingDeadlineSeconds: missing"),
        ("failedJobsHistoryLimit", None, "failedJobsHistoryLimit: missing"),
    ],
)
def test_a_schedule_forbids_overlap_and_bounds_what_it_makes_up_for(path, value, words, schemas):
    document = manifests.cronjob("hourly", "0 * * * *", ["jepa"], Cluster("i:1"), service_account="default")
    assert told(document, schemas) == []
    document["spec"].pop(path)
    if value:
        document["spec"][path] = value
    assert any(words in line for line in told(document, schemas))


def test_a_queued_job_must_not_scale(schemas):
    document = job()
    document["metadata"]["labels"][manifests.QUEUE_LABEL] = "gpus"
    assert any("it must not autoscale" in line for line in told(document, schemas))


@pytest.mark.parametrize("name", ["Train", "1st", "a" * 48, "x_y"])
def test_names_are_those_that_the_operator_takes(name, schemas):
    document = job()
    document["metadata"]["name"] = name
    assert any("DNS-1035" in line for line in told(document, schemas))


def overlay(name="prod"):
    return copy.deepcopy(overlays.render(TREE / "overlays" / name))


def of_kind(documents, kind, name=None):
    return next(item for item in documents if item["kind"] == kind and name in (None, item["metadata"]["name"]))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: d.remove(of_kind(d, "NetworkPolicy", "closed")), "no NetworkPolicy closes the namespace"),
        (
            lambda d: of_kind(d, "NetworkPolicy", "ray")["spec"]["ingress"].append({"ports": [{"port": 8265}]}),
            "lets everybody in",
        ),
        (
            lambda d: of_kind(d, "NetworkPolicy", "ray")["spec"]["ingress"].append(
                {"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}
            ),
            "lets everybody in",
        ),
        (lambda d: of_kind(d, "Role")["rules"][0]["verbs"].append("*"), "a role must name what it may"),
        (lambda d: d.remove(of_kind(d, "PriorityClass", "jepa-train")), "no PriorityClass jepa-train"),
        (lambda d: d.remove(of_kind(d, "ServiceAccount", "jepa-run")), "no ServiceAccount jepa-run"),
        (lambda d: of_kind(d, "Namespace")["metadata"].pop("labels"), "enforce must be restricted"),
        (
            lambda d: of_kind(d, "PodDisruptionBudget", "jepa-train")["spec"]["selector"]["matchLabels"].update(
                {"jepa-group": "gpu"}
            ),
            "no pod of these documents",
        ),
        (
            lambda d: d.append(
                {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": {"auth_token": "x"}}
            ),
            "a secret's content must not stand in a document",
        ),
        (lambda d: d.append({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "s"}}), "Deployment is unknown"),
    ],
)
def test_what_documents_expect_of_each_other(spoil, words, schemas):
    documents = overlay()
    assert problems(documents, schemas) == []
    spoil(documents)
    assert any(words in problem.text for problem in problems(documents, schemas)), words


def test_fields_of_pods_are_checked_too(schemas):
    if schemas.core is None:
        pytest.skip("kubernetes-validate is not installed: pip install '.[dev]'")
    document = job(rayClusterSpec__headGroupSpec__template__spec__terminationGracePeriod=3)
    assert any("terminationGracePeriod" in line for line in told(document, schemas))
    documents = overlay()
    of_kind(documents, "PodDisruptionBudget")["spec"]["maxUnavailabel"] = 0
    assert any("maxUnavailabel" in problem.text for problem in problems(documents, schemas))


@pytest.mark.skipif("JEPA_KUBERAY_CRDS" not in os.environ, reason="JEPA_KUBERAY_CRDS names no folder of KubeRay's CRDs")
def test_the_published_crds_agree(tmp_path, capsys):
    arguments = ["--root", str(TREE), "--out", str(tmp_path), "--keep", "--crds", os.environ["JEPA_KUBERAY_CRDS"]]
    assert overlays.main(arguments) == 0, capsys.readouterr().out
    published = Schemas(os.environ["JEPA_KUBERAY_CRDS"])
    for mistake in ("a typo in a field", "a typo in a group", "a word of the wrong type"):
        changes, words = PLANTED[mistake]
        assert any(words in line for line in told(job(**changes), published))


def test_parts_of_kustomize_that_are_not_rendered_are_refused_by_name(tmp_path):
    (tmp_path / "kustomization.yaml").write_text("kind: Kustomization\nnamePrefix: x-\n")
    with pytest.raises(UsageError, match="namePrefix is not rendered here"):
        overlays.render(tmp_path)
    (tmp_path / "a.yaml").write_text("kind: ConfigMap\napiVersion: v1\nmetadata: {name: a}\n")
    patch = {"target": {"kind": "Secret"}, "patch": "[{op: add, path: /data, value: {}}]"}
    (tmp_path / "kustomization.yaml").write_text(json.dumps({"resources": ["a.yaml"], "patches": [patch]}))
    with pytest.raises(UsageError, match="meets no document"):
        overlays.render(tmp_path)


def test_commands_in_the_overlays_are_valid():
    documents = [document for place, document in overlays.generated().items()]
    specs = [spec for document in documents for spec in (document["spec"], document["spec"].get("jobTemplate", {}))]
    commands = [spec["entrypoint"] for spec in specs if "entrypoint" in spec]
    assert len(commands) == 2
    for command in commands:
        verb, arguments = split_verb(command.split()[1:])
        presets.load(VERBS[verb].options, verb, overrides(VERBS[verb], arguments))
    schedule = next(document for document in documents if document["kind"] == "CronJob")
    words = next(pods(schedule))[1]["spec"]["containers"][0]["command"]
    verb, arguments = split_verb(words[words.index("ingest") :])
    presets.load(VERBS[verb].options, verb, overrides(VERBS[verb], arguments))


def test_versions_agree():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert pinned["ray"] == manifests.RAY_VERSION
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert overlays.IMAGE.endswith(f":{version}")


def test_memory_of_the_object_store_fits_into_shared_memory_and_the_pod():
    for document in (overlays.generated()[place] for place in ("dev/raycluster.yaml", "prod/raycluster.yaml")):
        spec = document["spec"]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            pod = group["template"]["spec"]
            shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")["emptyDir"]
            store, size = int(group["rayStartParams"]["object-store-memory"]), int(shm["sizeLimit"].removesuffix("Gi")) * 2**30
            memory = int(pod["containers"][0]["resources"]["limits"]["memory"].removesuffix("Gi")) * 2**30
            assert store <= size <= memory / 2
            assert shm["medium"] == "Memory"
            assert {"name": "spill", "mountPath": group["rayStartParams"]["object-spilling-directory"]} in pod["containers"][0][
                "volumeMounts"
            ]
