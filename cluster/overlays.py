"""Kustomize overlays of infra/kubernetes: the files in them that follow from manifests.py, rendering, checking. `make manifests`.

Legend: a document is a plain dictionary. Platform teams use `kubectl apply -k` with overlays of their own on top. To check
without a cluster, the parts of Kustomize that these overlays use are read here, and any other part is refused by name; where
kubectl is installed a test compares both, document by document.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from cluster.manifests import DECODE, TRAIN, Cluster, Group, cronjob, raycluster, raycronjob, rayjob
from cluster.manifests_check import Problem, pods, problems
from cluster.manifests_schema import Schemas
from pipelines.errors import UsageError

IMAGE = "jepa-pipeline:0.1.0"
"""Overlays give it a registry and a tag."""
KNOWN = {"apiVersion", "kind", "metadata", "resources", "components", "patches", "images"}
"""Parts of a kustomization that are understood here."""
GATES = "jepa/feature-gates"
"""Annotation of a kustomization: alpha features of KubeRay that it needs, separated by commas."""
BUCKET = "s3://jepa-runs"
PRETRAIN = (
    f"jepa pretrain preset=vitl16_256_16f catalog={BUCKET}/catalog run.dir={BUCKET}/runs/vitl "
    "train.num_workers=8 train.microbatches=128 ray.address=auto"
)
INGEST = ["ingest", "source=s3://jepa-raw/videos", f"catalog={BUCKET}/catalog"]
SMALL = Group("head", cpus=1, memory_gib=4, least=1, spill_gib=5, grace_s=60)
FULL_TRAIN = Group(**{**vars(TRAIN), "least": 8, "most": 8})
FULL_DECODE = Group(**{**vars(DECODE), "least": 4, "most": 4, "spot": False})


def generated() -> dict[str, dict[str, Any]]:
    """Place below overlays/ -> the document that belongs there."""
    every = Cluster(image=IMAGE)
    one_node = Cluster(
        image=IMAGE, head=SMALL, workers=(Group("work", cpus=2, memory_gib=6, least=1, most=1, spill_gib=10),), autoscale=False
    )
    cpus = Cluster(
        image=IMAGE, service_account="jepa-ingest", workers=(Group(**{**vars(DECODE), "least": 2, "most": 2}),), autoscale=False
    )
    queued = Cluster(image=IMAGE, workers=(FULL_DECODE, FULL_TRAIN), queue="jepa")
    submit = [
        "jepa",
        "submit",
        "target=kuberay",
        "window=hour@00:10",
        "pod.namespace=jepa",
        f"pod.image={IMAGE}",
        "pod.decode_workers=2",
        "pod.service_account=jepa-ingest",
        "pod.pools=true",
        "pod.wait_s=3000",
    ]
    return {
        "dev/raycluster.yaml": raycluster("jepa", one_node),
        "prod/raycluster.yaml": raycluster("jepa", every),
        "pretrain/rayjob.yaml": rayjob("pretrain-vitl", PRETRAIN, queued, attempts=3, wait_s=24 * 3600),
        "ingest/cronjob.yaml": cronjob("ingest-hourly", "10 * * * *", [*submit, *INGEST], cpus, start_within_s=3000),
        "ingest-raycronjob/raycronjob.yaml": raycronjob(
            "ingest-hourly", "10 * * * *", f"jepa {' '.join(INGEST)} ray.address=auto", cpus
        ),
    }


def text_of(document: Mapping[str, Any]) -> str:
    """A generated file."""
    head = "# Rendered from cluster/manifests.py by `make manifests`: change it there, or by a patch in an overlay of yours.\n"
    return head + yaml.dump(document, Dumper=_Plain, sort_keys=False, width=200)


class _Plain(yaml.SafeDumper):
    """YAML without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        """Repeat what occurs twice."""
        return True


def render(folder: Path) -> list[dict[str, Any]]:
    """The documents of an overlay, as `kubectl kustomize` renders them, in the order of its files.

    Raises UsageError for a part of Kustomize that is not understood, and for a patch that meets nothing.
    """
    path = folder / "kustomization.yaml"
    tree = _load(path)
    if unknown := sorted(set(tree) - KNOWN):
        raise UsageError(
            f"{path}: {unknown[0]} is not rendered here: use kubectl kustomize, or one of {', '.join(sorted(KNOWN))}"
        )
    documents: list[dict[str, Any]] = []
    for name in tree.get("resources", []):
        place = folder / name
        documents += render(place) if place.is_dir() else _load_all(place)
    for name in tree.get("components", []):
        _patch(documents, _load(folder / name / "kustomization.yaml"), folder / name)
    _patch(documents, tree, folder)
    for image in tree.get("images", []):
        _set_image(documents, image, path)
    return documents


def gates(folder: Path) -> list[str]:
    """The alpha features that an overlay asks for."""
    names = _load(folder / "kustomization.yaml").get("metadata", {}).get("annotations", {}).get(GATES, "")
    return [name for name in names.split(",") if name]


def _load(path: Path) -> dict[str, Any]:
    return _load_all(path)[0]


def _load_all(path: Path) -> list[dict[str, Any]]:
    try:
        return [document for document in yaml.safe_load_all(path.read_text("utf-8")) if document]
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: {str(error).splitlines()[0]}") from error


def _patch(documents: list[dict[str, Any]], tree: Mapping[str, Any], folder: Path) -> None:
    for patch in tree.get("patches", []):
        target = patch.get("target", {})
        if unknown := sorted((set(patch) - {"target", "patch"}) | (set(target) - {"kind", "name"})):
            raise UsageError(f"{folder}: patches.{unknown[0]} is not rendered here: use target.kind, target.name and patch")
        met = [item for item in documents if all(value in (item["kind"], item["metadata"]["name"]) for value in target.values())]
        if not met:
            raise UsageError(f"{folder}: a patch of {target} meets no document")
        for operation in yaml.safe_load(patch["patch"]):
            for document in met:
                _apply(document, operation, folder)


def _apply(document: dict[str, Any], operation: Any, folder: Path) -> None:
    """One operation of a JSON patch (RFC 6902): add, replace or remove."""
    if not isinstance(operation, dict) or operation.get("op") not in ("add", "replace", "remove"):
        raise UsageError(f"{folder}: only JSON patches with op add, replace or remove are rendered here")
    *parents, last = (part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:])
    node: Any = document
    try:
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node[part]
        if isinstance(node, list):
            place = len(node) if last == "-" else int(last)
            node[place : place + (operation["op"] != "add")] = [copy.deepcopy(operation["value"])] if "value" in operation else []
        elif operation["op"] == "remove":
            del node[last]
        else:
            if operation["op"] == "replace" and last not in node:
                raise KeyError(last)
            node[last] = copy.deepcopy(operation["value"])
    except (KeyError, IndexError, ValueError) as error:
        raise UsageError(f"{folder}: {operation['op']} {operation['path']} meets nothing in {document['kind']}") from error


def _set_image(documents: Iterable[dict[str, Any]], image: Mapping[str, str], path: Path) -> None:
    if unknown := sorted(set(image) - {"name", "newName", "newTag", "digest"}):
        raise UsageError(f"{path}: images.{unknown[0]} is not rendered here")
    for document in documents:
        for _, template in pods(document):
            for container in template["spec"].get("containers", []):
                name, _, tag = container["image"].partition("@")[0].partition(":")
                if name == image["name"]:
                    ending = f"@{image['digest']}" if "digest" in image else f":{image.get('newTag', tag)}"
                    container["image"] = image.get("newName", name) + ending


def check(root: Path, schemas: Schemas) -> dict[str, tuple[list[dict[str, Any]], list[Problem]]]:
    """Overlay -> its documents and what is wrong with them."""
    found = {}
    for folder in sorted(path.parent for path in (root / "overlays").glob("*/kustomization.yaml")):
        documents = render(folder)
        found[folder.name] = (documents, problems(documents, schemas, gates(folder)))
    return found


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Write what follows from manifests.py, render every overlay, check it; a line for each."""
    parser = argparse.ArgumentParser(prog="python -m cluster.overlays", description=main.__doc__)
    parser.add_argument("--root", default="infra/kubernetes", help="folder with base and overlays")
    parser.add_argument("--out", default="runs/manifests", help="where rendered overlays go, one file each")
    parser.add_argument("--crds", help="folder of KubeRay's CRDs, to check with those instead of the list in manifests_schema.py")
    parser.add_argument("--keep", action="store_true", help="do not write the generated files of the overlays")
    options = parser.parse_args(arguments)
    root, out = Path(options.root), Path(options.out)
    for place, document in {} if options.keep else generated().items():
        (root / "overlays" / place).write_text(text_of(document), "utf-8")
    schemas = Schemas(options.crds)
    try:
        results = check(root, schemas)
    except UsageError as error:
        say(f"failed  {error}")
        return error.exit_code
    out.mkdir(parents=True, exist_ok=True)
    for name, (documents, wrong) in results.items():
        (out / f"{name}.yaml").write_text(
            "---\n".join(yaml.dump(item, Dumper=_Plain, sort_keys=False) for item in documents), "utf-8"
        )
        number = sum(1 for document in documents for _ in pods(document))
        say(f"{'failed' if wrong else 'ok    '}  {out / name}.yaml  {len(documents)} documents, {number} kinds of pods")
        for problem in wrong:
            say(f"        {problem.document} {problem.path}: {problem.text}")
    if schemas.core is None:
        say("not checked: fields of pods and of Kubernetes' own kinds (pip install '.[dev]' brings kubernetes-validate)")
    return 1 if any(wrong for _, wrong in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
