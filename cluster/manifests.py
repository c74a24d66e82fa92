"""Documents for Kubernetes as plain dictionaries: a Ray cluster, a job with a cluster of its own, a schedule.

Legend: `Cluster` is what a team decides (image, sizes, names of secrets); everything that must be so lies in the functions: token
auth, pods that Pod Security's `restricted` level admits, memory of the object store in /dev/shm, disk for what it spills, labels
by which decode tasks find their nodes. Nothing is read, written or asked here; manifests_check.py tells what is wrong with one.

KubeRay 1.7, no alpha feature gate; only `raycronjob` needs one, and says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

RAY_VERSION = "2.60.0"
"""Of the image; KubeRay decides by it what the cluster understands."""
GROUP_LABEL = "jepa-group"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
TOKEN_KEY = "auth_token"  # noqa: S105 - KubeRay's name of the key, not its content
USER = 1000
"""User and group of the image."""
SHM_SHARE = 0.35
"""Of a pod's memory: the object store, with a little room."""
STORE_OF_SHM = 0.9
GIB = 2**30
SHM = "/dev/shm"  # noqa: S108 - where Ray keeps its object store
SPILL = "/spill"
ANY_ADDRESS = "0.0.0.0"  # noqa: S104 - of the pod; who may reach it is the network policy's and the token's business
POOL, SPOT = "jepa-pool", "jepa-spot"
"""Label of nodes, and keys of the taints that keep other pods off them."""


@dataclass(frozen=True)
class Group:
    """Pods of one kind: the head, or a group of workers, which the autoscaler keeps between `least` and `most`."""

    name: str
    cpus: float = 4
    memory_gib: int = 16
    gpus: int = 0
    least: int = 0
    most: int = 1
    spill_gib: int = 50
    """Local disk for what the object store cannot hold, and for temporary files."""
    pool: str = ""
    """Only on nodes labelled jepa-pool=POOL, whose taint of that name is tolerated; any node when empty."""
    spot: bool = False
    """May be taken away: cheaper nodes, no promise by a priority class."""
    priority: int = 0
    """Autoscaler v2 fills groups of higher priority first."""
    grace_s: int = 60
    """From SIGTERM to SIGKILL: a train worker needs the time of a checkpoint."""


HEAD = Group("head", cpus=4, memory_gib=16, least=1, spill_gib=50, grace_s=300)
"""No tasks run there, but it holds the driver, the queue of units and the dashboard."""
DECODE = Group("decode", cpus=16, memory_gib=64, most=8, spill_gib=200, pool="decode", spot=True)
TRAIN = Group("train", cpus=16, memory_gib=128, gpus=1, most=8, spill_gib=200, pool="train", priority=10, grace_s=300)


@dataclass(frozen=True)
class Cluster:
    """One Ray cluster, as a team decides it."""

    image: str
    """With a tag or, better, a digest."""
    namespace: str = "jepa"
    token_secret: str = "jepa-ray-token"  # noqa: S105
    """Name of the Secret whose key auth_token is the cluster's token."""
    env_secret: str | None = None
    """Name of a Secret with more environment variables: credentials of a store without roles, trackers' keys."""
    env: Mapping[str, str] = field(default_factory=dict)
    """What is no secret: AWS_REGION, AWS_ENDPOINT_URL."""
    service_account: str = "jepa-run"
    head: Group = HEAD
    workers: tuple[Group, ...] = (DECODE, TRAIN)
    autoscale: bool = True
    queue: str | None = None
    """Kueue's LocalQueue. A queued job has all its pods or none, so it does not autoscale."""
    priority_classes: bool = True
    """The classes jepa-head, jepa-train and jepa-decode of infra/kubernetes/base exist."""
    redis: str | None = None
    """host:port of a Redis that keeps the head's tables; its password is the key redis_password of the token's Secret."""


class Pods(Protocol):
    """What `jepa submit` asks about a RayJob's cluster: cluster_of makes a Cluster of it."""

    image: str | None
    namespace: str
    token_secret: str
    gpu_workers: int
    decode_workers: int
    queue: str | None
    env_secret: str | None
    service_account: str
    pools: bool
    wait_s: int
    deadline_s: int


def cluster_of(pods: Pods) -> Cluster:
    """A cluster of fixed size, of the groups that are asked for."""
    groups = [(DECODE, pods.decode_workers), (TRAIN, pods.gpu_workers)]
    return Cluster(
        image=pods.image or "",
        namespace=pods.namespace,
        token_secret=pods.token_secret,
        env_secret=pods.env_secret,
        service_account=pods.service_account,
        workers=tuple(_resized(group, number, pools=pods.pools) for group, number in groups if number),
        autoscale=False,
        queue=pods.queue,
        priority_classes=False,
    )


def raycluster(name: str, cluster: Cluster) -> dict[str, Any]:
    """A cluster that stands, for jobs by `jepa submit address=...`."""
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": _metadata(name, cluster), "spec": cluster_spec(cluster)}


def rayjob(
    name: str,
    entrypoint: str,
    cluster: Cluster | Pods,
    *,
    attempts: int = 1,
    deadline_s: int = 0,
    wait_s: int = 0,
    keep_s: int = 600,
) -> dict[str, Any]:
    """A job that brings its own cluster and takes it away again. Its name is the submission id, so it runs once.

    entrypoint: the command line. attempts: clusters in all; each attempt continues at the last checkpoint, whatever ended the one
    before, so leave 1 where the caller tells by the exit code. deadline_s ends it, wait_s what waits for nodes (0: never);
    keep_s: how long the cluster of a finished job stands, for its dashboard.
    """
    if not isinstance(cluster, Cluster):
        deadline_s, wait_s = deadline_s or cluster.deadline_s, wait_s or cluster.wait_s
        cluster = cluster_of(cluster)
    metadata = _metadata(name, cluster)
    spec: dict[str, Any] = {
        "entrypoint": entrypoint,
        "jobId": name,
        "submissionMode": "K8sJobMode",
        "backoffLimit": attempts - 1,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": keep_s,
        **({"activeDeadlineSeconds": deadline_s} if deadline_s else {}),
        **({"preRunningDeadlineSeconds": wait_s} if wait_s else {}),
        "submitterPodTemplate": _submitter(cluster),
        "rayClusterSpec": cluster_spec(cluster),
    }
    if cluster.queue:
        metadata["labels"][QUEUE_LABEL] = cluster.queue
        spec["suspend"] = True  # until Kueue admits all of it
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


def cronjob(
    name: str,
    schedule: str,
    command: Sequence[str],
    cluster: Cluster | Pods,
    *,
    start_within_s: int = 3600,
    deadline_s: int = 6 * 3600,
    tries: int = 2,
    service_account: str = "jepa-schedule",
) -> dict[str, Any]:
    """A schedule: a pod that runs `command`, which submits one job for the window, waits for it and ends as it ends.

    schedule: five fields, UTC. A tick while the pod of the one before still waits is skipped; after an outage only the last tick
    that was missed is made up for, at most start_within_s late. A pod that is lost is repeated `tries` times and attaches to its
    job; one that ended with a verdict of the job (exit codes 1 to 4) is not. service_account may create, get and list RayJobs.
    """
    cluster = cluster if isinstance(cluster, Cluster) else cluster_of(cluster)
    pod = _pod(cluster, "submit", list(command), service_account)
    pod["containers"][0]["env"] += _token(cluster)
    pod |= {"automountServiceAccountToken": True, "restartPolicy": "Never"}
    verdicts = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [1, 2, 3, 4]}}
    moved = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    job = {
        "backoffLimit": tries,
        "activeDeadlineSeconds": deadline_s,
        "ttlSecondsAfterFinished": 7 * 24 * 3600,
        "podFailurePolicy": {"rules": [verdicts, moved]},
        "template": {"metadata": {"labels": _labels(name)}, "spec": pod},
    }
    spec = {
        "schedule": schedule,
        "timeZone": "Etc/UTC",
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": start_within_s,
        "successfulJobsHistoryLimit": 3,
        "failedJobsHistoryLimit": 3,
        "jobTemplate": {"spec": job},
    }
    return {"apiVersion": "batch/v1", "kind": "CronJob", "metadata": _metadata(name, cluster), "spec": spec}


def raycronjob(name: str, schedule: str, entrypoint: str, cluster: Cluster) -> dict[str, Any]:
    """KubeRay's own schedule: alpha in 1.7 (feature gate RayCronJob, off by default). After an outage it makes one RayJob for
    *every* tick that was missed, side by side, so the verb must be one that may run beside itself; `jepa ingest` is.
    """
    template = rayjob(name, entrypoint, cluster)["spec"]
    del template["jobId"]  # the job of each tick needs an id of its own
    spec = {"schedule": schedule, "timeZone": "Etc/UTC", "jobTemplate": template}
    return {"apiVersion": "ray.io/v1", "kind": "RayCronJob", "metadata": _metadata(name, cluster), "spec": spec}


def cluster_spec(cluster: Cluster) -> dict[str, Any]:
    """The `spec` of a RayCluster, which a RayJob holds as rayClusterSpec. `autoscale` is without effect on a queued one."""
    scales = cluster.autoscale and not cluster.queue
    spec: dict[str, Any] = {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token", "secretName": cluster.token_secret},
        "enableInTreeAutoscaling": scales,
        "headGroupSpec": {
            "rayStartParams": {"dashboard-host": ANY_ADDRESS, **_start(cluster.head, tasks=False)},
            "labels": {"role": "head"},
            "template": _template(cluster, cluster.head, automount=scales),
        },
        "workerGroupSpecs": [_workers(cluster, group, scales) for group in cluster.workers],
    }
    if scales:
        spec["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": 300,
            "upscalingMode": "Default",
            "resources": _same(cpu="500m", memory="1Gi"),
            "securityContext": _container_security(),
            "volumeMounts": _writable(),  # KubeRay adds the container to the head's pod, and its root is read-only too
        }
    if cluster.redis:
        key = {"secretKeyRef": {"name": cluster.token_secret, "key": "redis_password"}}
        spec["gcsFaultToleranceOptions"] = {"redisAddress": cluster.redis, "redisPassword": {"valueFrom": key}}
    return spec


def _workers(cluster: Cluster, group: Group, scales: bool) -> dict[str, Any]:
    least = group.least if scales else group.most
    return {
        "groupName": group.name,
        "replicas": least,
        "minReplicas": least,
        "maxReplicas": group.most,
        **({"priority": group.priority} if scales and group.priority else {}),
        "rayStartParams": _start(group, tasks=True),
        "labels": {"role": group.name},  # decode tasks look for role=decode
        "template": _template(cluster, group),
    }


def _start(group: Group, *, tasks: bool) -> dict[str, str]:
    """Parameters of `ray start`; resources are told to Ray here, so that a fraction of a core is never one too many."""
    store = int(_shm_gib(group) * STORE_OF_SHM * GIB)
    return {
        "num-cpus": str(int(group.cpus)) if tasks else "0",
        "object-store-memory": str(store),
        "object-spilling-directory": SPILL,
    }


def _template(cluster: Cluster, group: Group, *, automount: bool = False) -> dict[str, Any]:
    pod = _pod(cluster, f"ray-{group.name}", None, cluster.service_account)
    container = pod["containers"][0]
    gpus = {"nvidia.com/gpu": str(group.gpus)} if group.gpus else {}
    amounts = {"cpu": f"{group.cpus:g}", "memory": f"{group.memory_gib}Gi", "ephemeral-storage": f"{group.spill_gib + 20}Gi"}
    container["resources"] = _same(**amounts, **gpus)
    head = group is cluster.head
    container["ports"] = [{"name": "metrics", "containerPort": 8080}]
    if head:
        container["ports"] += [
            {"name": "gcs", "containerPort": 6379},
            {"name": "dashboard", "containerPort": 8265},
            {"name": "client", "containerPort": 10001},
        ]
    container["volumeMounts"] += [{"name": "shm", "mountPath": SHM}, {"name": "spill", "mountPath": SPILL}]
    # Copies of videos and of checkpoints would fill /tmp, where Ray's own sockets and logs stay.
    container["env"] += [{"name": "TMPDIR", "value": SPILL}, {"name": "RAY_TMPDIR", "value": "/tmp"}]  # noqa: S108
    pod["volumes"] += [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{_shm_gib(group)}Gi"}},
        {"name": "spill", "emptyDir": {"sizeLimit": f"{group.spill_gib}Gi"}},
    ]
    pod |= {"automountServiceAccountToken": automount, "terminationGracePeriodSeconds": group.grace_s}
    if cluster.priority_classes:
        pod["priorityClassName"] = f"jepa-{'head' if head else 'train' if group.gpus else 'decode'}"
    if group.pool:
        pod["nodeSelector"] = {POOL: group.pool}
        pod["tolerations"] = [{"key": POOL, "operator": "Equal", "value": group.pool, "effect": "NoSchedule"}]
    if group.gpus:
        pod.setdefault("tolerations", []).append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    if group.spot:
        pod["tolerations"] = [*pod.get("tolerations", []), {"key": SPOT, "operator": "Exists", "effect": "NoSchedule"}]
    labels = {**_labels(group.name), GROUP_LABEL: group.name}
    return {"metadata": {"labels": labels}, "spec": pod}


def _submitter(cluster: Cluster) -> dict[str, Any]:
    """KubeRay's pod that submits the job and follows its log; KubeRay fills in command and token."""
    pod = _pod(cluster, "submit", None, cluster.service_account)
    pod |= {"automountServiceAccountToken": False, "restartPolicy": "Never"}
    return {"metadata": {"labels": _labels("submit")}, "spec": pod}


def _pod(cluster: Cluster, name: str, command: list[str] | None, service_account: str) -> dict[str, Any]:
    """A pod of one container that Pod Security's `restricted` level admits, with room to write in /tmp and the home."""
    container: dict[str, Any] = {
        "name": name,
        "image": cluster.image,
        **({"command": command} if command else {}),
        "env": [{"name": key, "value": value} for key, value in cluster.env.items()],
        "resources": _same(cpu="500m", memory="1Gi"),
        "securityContext": _container_security(),
        "volumeMounts": _writable(),
    }
    if cluster.env_secret:
        container["envFrom"] = [{"secretRef": {"name": cluster.env_secret}}]
    return {
        "serviceAccountName": service_account,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [{"name": name, "emptyDir": {"sizeLimit": f"{size}Gi"}} for name, size in (("tmp", 20), ("home", 1))],
    }


def _writable() -> list[dict[str, str]]:
    return [{"name": "tmp", "mountPath": "/tmp"}, {"name": "home", "mountPath": "/home/ray"}]  # noqa: S108


def _container_security() -> dict[str, Any]:
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _token(cluster: Cluster) -> list[dict[str, Any]]:
    key = {"secretKeyRef": {"name": cluster.token_secret, "key": TOKEN_KEY}}
    return [{"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "valueFrom": key}]


def _metadata(name: str, cluster: Cluster) -> dict[str, Any]:
    return {"name": name, "namespace": cluster.namespace, "labels": _labels(name)}


def _labels(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "jepa", "app.kubernetes.io/component": name, "app.kubernetes.io/managed-by": "jepa"}


def _same(**amounts: str) -> dict[str, dict[str, str]]:
    """Requests that are limits: a pod of class Guaranteed is the last to be evicted."""
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _shm_gib(group: Group) -> int:
    return max(1, int(group.memory_gib * SHM_SHARE))


def _resized(group: Group, number: int, *, pools: bool) -> Group:
    resized = replace(group, least=number, most=number)
    return resized if pools else replace(resized, pool="", spot=False)
