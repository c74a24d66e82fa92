"""Strict JSON schemas for documents: a field that does not exist is an error, where Kubernetes itself would drop it in silence.

Legend: the fields of RayCluster, RayJob and RayCronJob are those of KubeRay 1.7.0 (their names and types are written out here;
KubeRay is Apache-2.0, github.com/ray-project/kuberay); what stands in a pod, and everything of Kubernetes itself, is checked by
the schemas that the kubernetes-validate package brings. With a folder of KubeRay's own CRDs (`crds`) those take the place of the
list here: `kubectl get crd rayclusters.ray.io rayjobs.ray.io raycronjobs.ray.io -o yaml`, or ray-operator/config/crd/bases.
"""

import functools
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

KUBERNETES = "1.37.0"
"""Of the schemas; KubeRay's own need no newer one."""
PACKAGE = "kubernetes_validate"
DEFINITIONS = "https://kubernetes.io/api/_definitions.json"
CORE = {
    "v1/Namespace": "io.k8s.api.core.v1.Namespace",
    "v1/ConfigMap": "io.k8s.api.core.v1.ConfigMap",
    "v1/Secret": "io.k8s.api.core.v1.Secret",
    "v1/Service": "io.k8s.api.core.v1.Service",
    "v1/ServiceAccount": "io.k8s.api.core.v1.ServiceAccount",
    "batch/v1/CronJob": "io.k8s.api.batch.v1.CronJob",
    "batch/v1/Job": "io.k8s.api.batch.v1.Job",
    "networking.k8s.io/v1/NetworkPolicy": "io.k8s.api.networking.v1.NetworkPolicy",
    "policy/v1/PodDisruptionBudget": "io.k8s.api.policy.v1.PodDisruptionBudget",
    "rbac.authorization.k8s.io/v1/Role": "io.k8s.api.rbac.v1.Role",
    "rbac.authorization.k8s.io/v1/RoleBinding": "io.k8s.api.rbac.v1.RoleBinding",
    "scheduling.k8s.io/v1/PriorityClass": "io.k8s.api.scheduling.v1.PriorityClass",
}
"""apiVersion/kind -> its definition; a document of any other kind is refused."""
PINNED = {f"ray.io/v1/{kind}" for kind in ("RayCluster", "RayJob", "RayCronJob")}

STRING, INTEGER, BOOLEAN = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
NATURAL = {"type": "integer", "minimum": 0}
STRINGS = {"type": "object", "additionalProperties": STRING}


def _core(name: str) -> dict[str, Any]:
    return {"$ref": f"{DEFINITIONS}#/$defs/{name}"}


def _object(required: tuple[str, ...] = (), /, **fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _one_of(*words: str) -> dict[str, Any]:
    return {"enum": list(words)}


POD = _core("io.k8s.api.core.v1.PodTemplateSpec")
META = _core("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta")
RESOURCES = _core("io.k8s.api.core.v1.ResourceRequirements")
SECURITY = _core("io.k8s.api.core.v1.SecurityContext")
ENV = _list(_core("io.k8s.api.core.v1.EnvVar"))
RULES = _object(
    egressRules=_list(_core("io.k8s.api.networking.v1.NetworkPolicyEgressRule")),
    ingressRules=_list(_core("io.k8s.api.networking.v1.NetworkPolicyIngressRule")),
)
CREDENTIAL = _object(value=STRING, valueFrom=_core("io.k8s.api.core.v1.EnvVarSource"))
CLUSTER_SPEC = _object(
    ("headGroupSpec",),
    authOptions=_object(enableK8sTokenAuth=BOOLEAN, mode=_one_of("disabled", "token"), secretName=STRING),
    autoscalerOptions=_object(
        args=_list(STRING),
        command=_list(STRING),
        env=ENV,
        envFrom=_list(_core("io.k8s.api.core.v1.EnvFromSource")),
        idleTimeoutSeconds=NATURAL,
        image=STRING,
        imagePullPolicy=STRING,
        resources=RESOURCES,
        securityContext=SECURITY,
        upscalingMode=_one_of("Default", "Aggressive", "Conservative"),
        version=_one_of("v1", "v2"),
        volumeMounts=_list(_core("io.k8s.api.core.v1.VolumeMount")),
    ),
    enableInTreeAutoscaling=BOOLEAN,
    gcsFaultToleranceOptions=_object(
        backend=_one_of("redis", "rocksdb"),
        externalStorageNamespace=STRING,
        redisAddress=STRING,
        redisPassword=CREDENTIAL,
        redisUsername=CREDENTIAL,
        storage=_object(
            accessModes=_list(STRING),
            claimName=STRING,
            deletionPolicy=_one_of("DeleteWithCluster", "Retain"),
            size={"type": ["string", "integer"]},
            storageClassName=STRING,
            subPath=STRING,
        ),
    ),
    headGroupSpec=_object(
        ("template",),
        enableIngress=BOOLEAN,
        headService=_core("io.k8s.api.core.v1.Service"),
        ingressOptions={"type": "object"},
        labels=STRINGS,
        rayStartParams=STRINGS,
        resources=STRINGS,
        serviceType=STRING,
        template=POD,
    ),
    headServiceAnnotations=STRINGS,
    historyServerOptions=_object(
        collectorOptions=_object(env=ENV, image=STRING, imagePullPolicy=STRING, resources=RESOURCES),
    ),
    managedBy=STRING,
    networkPolicy=_object(
        head=RULES,
        mode=_one_of("DenyAll", "DenyAllIngress", "DenyAllEgress"),
        worker=RULES,
        workerGroups=_list({**RULES, "properties": {**RULES["properties"], "groupName": STRING}}),
    ),
    rayVersion=STRING,
    suspend=BOOLEAN,
    tlsOptions=_object(enabled=BOOLEAN),
    upgradeStrategy=_object(type=_one_of("Recreate", "None")),
    workerGroupSpecs=_list(
        _object(
            ("groupName", "template"),
            groupName=STRING,
            idleTimeoutSeconds=NATURAL,
            labels=STRINGS,
            maxReplicas=INTEGER,
            minReplicas=INTEGER,
            numOfHosts=INTEGER,
            priority=INTEGER,
            rayStartParams=STRINGS,
            replicas=INTEGER,
            resources=STRINGS,
            scaleStrategy=_object(workersToDelete=_list(STRING)),
            suspend=BOOLEAN,
            template=POD,
        )
    ),
)
DELETION = _object(policy=_one_of("DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"))
JOB_SPEC = _object(
    activeDeadlineSeconds=INTEGER,
    backoffLimit=INTEGER,
    clusterSelector=STRINGS,
    deletionStrategy=_object(
        deletionRules=_list({**DELETION, "properties": {**DELETION["properties"], "condition": {"type": "object"}}}),
        onFailure=DELETION,
        onSuccess=DELETION,
    ),
    entrypoint=STRING,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    entrypointResources=STRING,
    jobId=STRING,
    managedBy=STRING,
    metadata=STRINGS,
    preRunningDeadlineSeconds={"type": "integer", "minimum": 1},
    rayClusterSpec=CLUSTER_SPEC,
    runtimeEnvYAML=STRING,
    shutdownAfterJobFinishes=BOOLEAN,
    submissionMode=STRING,
    submitterConfig=_object(backoffLimit=INTEGER),
    submitterPodTemplate=POD,
    suspend=BOOLEAN,
    ttlSecondsAfterFinished=INTEGER,
)
CRON_SPEC = _object(("jobTemplate", "schedule"), jobTemplate=JOB_SPEC, schedule=STRING, suspend=BOOLEAN, timeZone=STRING)
SPECS = {"RayCluster": CLUSTER_SPEC, "RayJob": JOB_SPEC, "RayCronJob": CRON_SPEC}


class Schemas:
    """What checks a document's fields. `crds`: a folder of KubeRay's CRDs, instead of the list in this module."""

    def __init__(self, crds: str | None = None) -> None:
        from jsonschema import Draft202012Validator
        from referencing import Registry
        from referencing.jsonschema import DRAFT202012

        self.core = core_definitions()
        definitions = DRAFT202012.create_resource(self.core or {"$defs": _Anything()})
        self._make = functools.partial(Draft202012Validator, registry=Registry().with_resource(DEFINITIONS, definitions))
        self._kuberay = _published(crds) if crds else {kind: _document(kind, spec) for kind, spec in SPECS.items()}

    def errors(self, document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """(path of the field, what is wrong with it). A kind that nothing here knows is an error of its own."""
        kind = f"{document.get('apiVersion')}/{document.get('kind')}"
        if kind in PINNED:
            schema = self._kuberay.get(document["kind"])
            if schema is None:
                yield "kind", f"{kind} is in none of the CRDs that were given"
                return
        elif kind in CORE:
            schema = _core(CORE[kind])
        else:
            yield "kind", f"{kind} is unknown: no schema to check it with"
            return
        for error in self._make(schema).iter_errors(document):
            yield ".".join(str(part) for part in error.absolute_path), error.message[:300]


class _Anything(dict):
    """Definitions where the package is not installed: whatever is referred to accepts everything."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> bool:
        return True


def _document(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return _object(
        ("apiVersion", "kind", "metadata", "spec"), apiVersion=_one_of("ray.io/v1"), kind=_one_of(kind), metadata=META, spec=spec
    )


@functools.cache
def core_definitions() -> dict[str, Any] | None:
    """Kubernetes' own definitions, strict; None where kubernetes-validate is not installed."""
    package = importlib.util.find_spec(PACKAGE)
    if package is None or not package.origin:
        return None
    place = Path(package.origin).parent / "kubernetes-json-schema" / f"v{KUBERNETES}-local-strict" / "_definitions.json"
    tree = json.loads(place.read_text("utf-8"))
    return {**tree, "$defs": {name: strict(schema) for name, schema in tree["$defs"].items()}}


def _published(folder: str) -> dict[str, dict[str, Any]]:
    """Kind -> schema of its version v1, of the CustomResourceDefinitions in the folder's YAML files."""
    import yaml

    found = {}
    for path in sorted(Path(folder).glob("*.y*ml")):
        for document in yaml.load_all(path.read_text("utf-8"), Loader=yaml.CSafeLoader):
            for crd in document.get("items", [document]) if document else []:
                if crd.get("kind") == "CustomResourceDefinition":
                    versions = {item["name"]: item["schema"]["openAPIV3Schema"] for item in crd["spec"]["versions"]}
                    found[crd["spec"]["names"]["kind"]] = _with_metadata(
                        strict(versions.get("v1") or next(iter(versions.values())))
                    )
    return found


def _with_metadata(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "properties": {**schema["properties"], "metadata": META}}


def strict(schema: Any) -> Any:
    """The same schema without the freedom to have other fields, and with Kubernetes' numbers that may be strings.

    An object that lists fields and does not say `x-kubernetes-preserve-unknown-fields` takes no others.
    """
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if key not in ("description", "default", "format")}
    for key in ("properties", "$defs"):
        if isinstance(kept.get(key), dict):
            kept[key] = {name: strict(value) for name, value in kept[key].items()}
    for key in ("items", "additionalProperties", "anyOf", "allOf", "oneOf"):
        if key in kept:
            kept[key] = strict(kept[key])
    if schema.get("x-kubernetes-int-or-string"):
        kept.pop("anyOf", None)
        kept["type"] = ["integer", "string"]
        kept.pop("pattern", None)
    free = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and not free:
        kept["additionalProperties"] = False
    return kept
