"""What is wrong with a set of documents beyond their fields: Pod Security, the operator, token, secrets, policies, references.

Legend: a problem is (document as Kind/name, path of the field, sentence). Rules of the operator are those of KubeRay 1.7's
validation (ray-operator/controllers/ray/utils/validation.go), which no schema says; the others are Pod Security's level
`restricted` and our own: no cluster without a token, no secret in a document, no alpha feature that its overlay does not name.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from cluster.manifests import POOL, QUEUE_LABEL
from cluster.manifests_schema import Schemas

Document = Mapping[str, Any]
LONGEST = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36, "CronJob": 52}
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
TOKEN_SINCE = (2, 52)
PRIORITY_SINCE = (2, 56)
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
SECRET_NAME = re.compile(r"(^|_)(token|password|passwd|secret|secret_access_key|access_key_id|api_key|credential)s?$", re.I)
GATED_KINDS = {"RayCronJob": "RayCronJob"}
GATED_FIELDS = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
"""Alpha in KubeRay 1.7: kind or field of a cluster -> feature gate that must be switched on."""


class Problem(NamedTuple):
    """Something that must not be applied."""

    document: str
    path: str
    text: str


def problems(documents: Sequence[Document], schemas: Schemas, gates: Iterable[str] = ()) -> list[Problem]:
    """What is wrong with documents that are applied together. `gates`: alpha features that are switched on on purpose.

    One after another: fields; rules, for documents whose fields are right; what documents expect of each other, when all are.
    """
    found = []
    for document in documents:
        fields = list(schemas.errors(document))
        rules = () if fields else (error for rule in RULES for error in rule(document))
        found += [Problem(name_of(document), *error) for error in (*fields, *rules, *_gated(document, set(gates)))]
    return found or [Problem(*error) for error in _together(documents)]


def name_of(document: Document) -> str:
    """Kind/name."""
    return f"{document.get('kind')}/{document.get('metadata', {}).get('name')}"


def pods(document: Document) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(path, template) of every pod that a document makes."""

    def walk(node: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if isinstance(node, Mapping):
            for key, value in node.items():
                here = f"{path}.{key}" if path else str(key)
                if key in ("template", "submitterPodTemplate") and isinstance(value, Mapping) and "spec" in value:
                    yield here, value
                else:
                    yield from walk(value, here)
        elif isinstance(node, list):
            for index, value in enumerate(node):
                yield from walk(value, f"{path}.{index}")

    if document.get("kind") == "Pod":
        yield "", document
    yield from walk(document.get("spec", {}), "spec")


def clusters(document: Document) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(path, specification) of every Ray cluster that a document makes."""
    kind, spec = document.get("kind"), document.get("spec", {})
    if kind == "RayCluster":
        yield "spec", spec
    for path, job in jobs(document):
        if isinstance(job.get("rayClusterSpec"), Mapping):
            yield f"{path}.rayClusterSpec", job["rayClusterSpec"]


def jobs(document: Document) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(path, specification) of a RayJob, or of that which a RayCronJob makes."""
    spec = document.get("spec", {})
    if document.get("kind") == "RayJob":
        yield "spec", spec
    if document.get("kind") == "RayCronJob":
        yield "spec.jobTemplate", spec.get("jobTemplate", {})


def _restricted(document: Document) -> Iterator[tuple[str, str]]:
    """Pod Security, level restricted, as the API server's admission judges it."""
    for path, template in pods(document):
        spec, path = template["spec"], f"{path}.spec" if path else "spec"
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(key):
                yield f"{path}.{key}", f"Pod Security restricted: {key} must not be set"
        for volume in spec.get("volumes", []):
            if bad := set(volume) - VOLUMES - {"name"}:
                yield f"{path}.volumes", f"Pod Security restricted: volume {volume.get('name')} is a {min(bad)}"
        whole = spec.get("securityContext", {})
        if whole.get("sysctls"):
            yield f"{path}.securityContext.sysctls", "Pod Security restricted: no sysctls here"
        for key in ("containers", "initContainers", "ephemeralContainers"):
            for container in spec.get(key, []):
                yield from _container(container, whole, f"{path}.{key}.{container.get('name')}")
    for path, cluster in clusters(document):
        if cluster.get("enableInTreeAutoscaling"):  # KubeRay adds a container with these settings to the head's pod
            options = cluster.get("autoscalerOptions", {})
            whole = cluster.get("headGroupSpec", {}).get("template", {}).get("spec", {}).get("securityContext", {})
            yield from _container(options, whole, f"{path}.autoscalerOptions")
    for path, job in jobs(document):
        if job.get("submissionMode", "K8sJobMode") == "K8sJobMode" and "submitterPodTemplate" not in job:
            yield (
                f"{path}.submitterPodTemplate",
                "Pod Security restricted: KubeRay's default submitter pod is not admitted; give one",
            )


def _container(container: Mapping[str, Any], pod: Mapping[str, Any], path: str) -> Iterator[tuple[str, str]]:
    own = container.get("securityContext", {})
    both = {**pod, **own}
    wrong = [
        ("privileged", own.get("privileged"), "privileged must not be true"),
        ("allowPrivilegeEscalation", own.get("allowPrivilegeEscalation") is not False, "allowPrivilegeEscalation must be false"),
        ("capabilities.drop", "ALL" not in own.get("capabilities", {}).get("drop", []), "capabilities.drop must have ALL"),
        (
            "capabilities.add",
            set(own.get("capabilities", {}).get("add", [])) - {"NET_BIND_SERVICE"},
            "capabilities.add takes NET_BIND_SERVICE only",
        ),
        ("runAsNonRoot", both.get("runAsNonRoot") is not True, "runAsNonRoot must be true"),
        ("runAsUser", both.get("runAsUser", 1) == 0, "runAsUser must not be 0"),
        (
            "seccompProfile",
            both.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"),
            "seccompProfile.type must be RuntimeDefault or Localhost",
        ),
        ("procMount", own.get("procMount", "Default") != "Default", "procMount must be Default"),
    ]
    for key, is_wrong, text in wrong:
        if is_wrong:
            yield f"{path}.securityContext.{key}", f"Pod Security restricted: {text}"
    if any(port.get("hostPort") for port in container.get("ports", [])):
        yield f"{path}.ports", "Pod Security restricted: hostPort must not be set"


def _names(document: Document) -> Iterator[tuple[str, str]]:
    kind, name = str(document.get("kind")), str(document.get("metadata", {}).get("name"))
    if kind in LONGEST and (len(name) > LONGEST[kind] or not DNS_1035.fullmatch(name)):
        yield "metadata.name", f"{name!r} must be a DNS-1035 label of at most {LONGEST[kind]} characters"


def _cluster_rules(document: Document) -> Iterator[tuple[str, str]]:
    """KubeRay: ValidateRayClusterSpec."""
    for path, cluster in clusters(document):
        version = tuple(int(part) for part in re.findall(r"\d+", str(cluster.get("rayVersion", "")))[:2])
        auth = cluster.get("authOptions", {})
        if auth.get("mode") != "token" or not auth.get("secretName"):
            yield (
                f"{path}.authOptions",
                "no token: mode must be token and secretName name the Secret, or anybody may run code there",
            )
        elif version < TOKEN_SINCE:
            yield f"{path}.rayVersion", "a token needs rayVersion 2.52 or newer"
        if auth.get("enableK8sTokenAuth"):
            yield f"{path}.authOptions.enableK8sTokenAuth", "KubeRay refuses it for RayJobs, and beside a secretName"
        scales = bool(cluster.get("enableInTreeAutoscaling"))
        second = cluster.get("autoscalerOptions", {}).get("version") == "v2"
        head = cluster.get("headGroupSpec", {})
        groups = [(f"{path}.headGroupSpec", "head", head)]
        workers = cluster.get("workerGroupSpecs", [])
        groups += [(f"{path}.workerGroupSpecs.{group.get('groupName')}", group.get("groupName"), group) for group in workers]
        environment = {item["name"]: item for _, item in _environment(head.get("template", {}))}
        if "RAY_enable_autoscaler_v2" in environment and (not scales or "version" in cluster.get("autoscalerOptions", {})):
            yield (
                f"{path}.autoscalerOptions",
                "RAY_enable_autoscaler_v2 beside autoscalerOptions.version, or without the autoscaler",
            )
        if "RAY_REDIS_ADDRESS" in environment or "REDIS_PASSWORD" in environment:
            yield f"{path}.headGroupSpec", "Redis belongs into gcsFaultToleranceOptions, not into the environment"
        for where, name, group in groups:
            yield from _group_rules(where, str(name), group, scales=scales, second=second, version=version)


def _group_rules(
    path: str, name: str, group: Mapping[str, Any], *, scales: bool, second: bool, version: tuple[int, ...]
) -> Iterator[tuple[str, str]]:
    start = group.get("rayStartParams", {})
    if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(start):
        yield f"{path}.resources", "resources stand both here and in rayStartParams"
    if "labels" in start:
        yield f"{path}.rayStartParams.labels", "labels belong into the group's own field labels"
    policy = group.get("template", {}).get("spec", {}).get("restartPolicy")
    if scales and second and policy not in (None, "", "Never"):
        yield f"{path}.template.spec.restartPolicy", "autoscaler v2 needs restartPolicy Never, or none"
    if "groupName" not in group:
        return
    least, most = group.get("minReplicas"), group.get("maxReplicas")
    if not scales and (least is None or most is None):
        yield f"{path}.minReplicas", f"group {name} needs minReplicas and maxReplicas where nothing scales"
    if (least or 0) < 0 or (most is not None and most < (least or 0)):
        yield f"{path}.maxReplicas", f"group {name}: 0 <= minReplicas <= maxReplicas does not hold"
    if group.get("suspend") and scales:
        yield f"{path}.suspend", f"group {name} cannot be suspended while the autoscaler is on"
    for key in ("idleTimeoutSeconds", "priority"):
        if group.get(key) and not (scales and second):
            yield f"{path}.{key}", f"group {name}: {key} needs autoscaler v2"
    if group.get("priority") and version < PRIORITY_SINCE:
        yield f"{path}.priority", f"group {name}: priority needs rayVersion 2.56 or newer"


def _job_rules(document: Document) -> Iterator[tuple[str, str]]:
    """KubeRay: ValidateRayJobSpec and ValidateRayCronJobSpec; and what Kueue asks of a queued job."""
    if document.get("kind") == "RayCronJob" and "TZ" in str(document.get("spec", {}).get("schedule")):
        yield "spec.schedule", "no TZ in the schedule: there is timeZone"
    for path, job in jobs(document):
        selects, mode = bool(job.get("clusterSelector")), job.get("submissionMode", "K8sJobMode")
        shuts, ttl = bool(job.get("shutdownAfterJobFinishes")), job.get("ttlSecondsAfterFinished", 0)
        rules = job.get("deletionStrategy", {}).get("deletionRules")
        wrong = [
            ("submissionMode", mode not in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"), f"{mode} is no mode"),
            ("suspend", job.get("suspend") and not shuts, "suspend needs shutdownAfterJobFinishes"),
            ("suspend", job.get("suspend") and selects, "a job on a standing cluster cannot be suspended"),
            ("ttlSecondsAfterFinished", ttl < 0 or (ttl and not shuts), "a ttl needs shutdownAfterJobFinishes"),
            ("deletionStrategy", rules and (shuts or ttl), "deletionRules exclude shutdownAfterJobFinishes and a ttl"),
            ("rayClusterSpec", selects == ("rayClusterSpec" in job), "exactly one of rayClusterSpec and clusterSelector"),
            ("backoffLimit", job.get("backoffLimit", 0) < 0, "backoffLimit must not be negative"),
            (
                "backoffLimit",
                job.get("backoffLimit", 0) and (selects or mode == "InteractiveMode"),
                "no retries with clusterSelector or in InteractiveMode",
            ),
            (
                "submissionMode",
                mode == "SidecarMode" and (selects or {"submitterPodTemplate", "submitterConfig"} & set(job)),
                "SidecarMode has no submitterPodTemplate, submitterConfig or clusterSelector",
            ),
            ("activeDeadlineSeconds", job.get("activeDeadlineSeconds", 1) <= 0, "a deadline must be positive"),
            (
                "rayClusterSpec.enableInTreeAutoscaling",
                QUEUE_LABEL in document["metadata"].get("labels", {})
                and job.get("rayClusterSpec", {}).get("enableInTreeAutoscaling"),
                "Kueue admits a job with all its pods or not at all: it must not autoscale",
            ),
        ]
        for key, is_wrong, text in wrong:
            if is_wrong:
                yield f"{path}.{key}", text


def _schedules(document: Document) -> Iterator[tuple[str, str]]:
    if document.get("kind") != "CronJob":
        return
    spec = document.get("spec", {})
    if spec.get("concurrencyPolicy") != "Forbid":
        yield "spec.concurrencyPolicy", "must be Forbid: a window must not begin while the one before is at work"
    for key in ("startingDeadlineSeconds", "successfulJobsHistoryLimit", "failedJobsHistoryLimit"):
        if key not in spec:
            yield f"spec.{key}", "missing: without it Kubernetes makes up for any number of windows, or keeps their pods"
    if "activeDeadlineSeconds" not in spec.get("jobTemplate", {}).get("spec", {}):
        yield "spec.jobTemplate.spec.activeDeadlineSeconds", "missing: a window that hangs would hold up all that follow"


def _environment(template: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key in ("containers", "initContainers"):
        for container in template.get("spec", {}).get(key, []):
            for item in container.get("env", []):
                yield f"{key}.{container.get('name')}.env.{item.get('name')}", item


def _secrets(document: Document) -> Iterator[tuple[str, str]]:
    if document.get("kind") == "Secret" and (document.get("data") or document.get("stringData")):
        yield "data", "a secret's content must not stand in a document: make it with kubectl create secret, or from your vault"
    for path, template in pods(document):
        for where, item in _environment(template):
            if SECRET_NAME.search(item.get("name", "")) and "value" in item:
                yield f"{path}.spec.{where}", "a secret's value must not stand in a document: use valueFrom.secretKeyRef"
    for path, job in jobs(document):
        for key in ("entrypoint", "runtimeEnvYAML"):
            text = str(job.get(key, ""))
            if re.search(r"(token|password|secret|api_?key)\w*\s*[=:]\s*\S", text, re.I):
                yield f"{path}.{key}", "looks like a secret, and everybody who sees the job sees it: use a Secret"


def _images(document: Document) -> Iterator[tuple[str, str]]:
    for path, template in pods(document):
        for container in template["spec"].get("containers", []):
            image = str(container.get("image", ""))
            if "@sha256:" not in image and (":" not in image.rpartition("/")[2] or image.endswith(":latest")):
                yield f"{path}.spec.containers.{container.get('name')}.image", f"{image!r} has no version: give a tag or a digest"


def _access(document: Document) -> Iterator[tuple[str, str]]:
    """Roles without wildcards; network rules that open nothing to everybody."""
    kind, spec = document.get("kind"), document.get("spec", {})
    if kind == "Role":
        for index, rule in enumerate(document.get("rules", [])):
            for key in ("verbs", "resources", "apiGroups"):
                if "*" in rule.get(key, []):
                    yield f"rules.{index}.{key}", "a role must name what it may: no *"
    if kind == "NetworkPolicy":
        for index, rule in enumerate(spec.get("ingress", [])):
            peers = rule.get("from", [])
            if not peers or any(peer.get("ipBlock", {}).get("cidr", "").endswith("/0") or peer == {} for peer in peers):
                yield f"spec.ingress.{index}", "lets everybody in: name who may come, or Ray's ports run anybody's code"


def _gated(document: Document, gates: set[str]) -> Iterator[tuple[str, str]]:
    gate = GATED_KINDS.get(str(document.get("kind")))
    if gate and gate not in gates:
        yield "kind", f"{document['kind']} is alpha (feature gate {gate}, off by default): this overlay does not name it"
    for path, cluster in clusters(document):
        used = {key: gate for key, gate in GATED_FIELDS.items() if key in cluster}
        if cluster.get("gcsFaultToleranceOptions", {}).get("backend") == "rocksdb":
            used["gcsFaultToleranceOptions.backend"] = "GCSFaultToleranceEmbeddedStorage"
        for key, gate in used.items():
            if gate not in gates:
                yield f"{path}.{key}", f"alpha (feature gate {gate}, off by default): this overlay does not name it"


def _together(documents: Sequence[Document]) -> Iterator[tuple[str, str, str]]:
    """What one document expects of another: accounts, priority classes, closed network, disruption budgets that meet pods."""
    names: dict[str, set[str]] = {}
    for document in documents:
        names.setdefault(str(document.get("kind")), set()).add(str(document.get("metadata", {}).get("name")))
    labels = [template.get("metadata", {}).get("labels", {}) for document in documents for _, template in pods(document)]
    for document in documents:
        name = name_of(document)
        for path, template in pods(document):
            account, rank = template["spec"].get("serviceAccountName", "default"), template["spec"].get("priorityClassName")
            if account != "default" and account not in names.get("ServiceAccount", ()):
                yield name, f"{path}.spec.serviceAccountName", f"no ServiceAccount {account} among these documents"
            if rank and rank not in names.get("PriorityClass", ()):
                yield name, f"{path}.spec.priorityClassName", f"no PriorityClass {rank} among these documents"
            if POOL in template["spec"].get("nodeSelector", {}) and not template["spec"].get("tolerations"):
                yield name, f"{path}.spec.tolerations", "a pool's nodes are tainted: tolerate it"
        if document.get("kind") == "PodDisruptionBudget":
            wanted = document["spec"].get("selector", {}).get("matchLabels", {})
            if not any(wanted.items() <= found.items() for found in labels):
                yield name, "spec.selector", f"no pod of these documents has the labels {dict(wanted)}"
    for document in documents:
        if document.get("kind") == "Namespace":
            level = document["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce")
            if level != "restricted":
                yield name_of(document), "metadata.labels", "pod-security.kubernetes.io/enforce must be restricted"
            closed = any(
                item.get("kind") == "NetworkPolicy" and item["spec"].get("podSelector") == {} and not item["spec"].get("ingress")
                and "Ingress" in item["spec"].get("policyTypes", [])
                for item in documents
            )  # fmt: skip
            if not closed:
                yield (
                    name_of(document),
                    "",
                    "no NetworkPolicy closes the namespace by default (podSelector {}, Ingress, no rules)",
                )


RULES: tuple[Callable[[Document], Iterator[tuple[str, str]]], ...] = (
    _names,
    _restricted,
    _cluster_rules,
    _job_rules,
    _schedules,
    _secrets,
    _images,
    _access,
)
