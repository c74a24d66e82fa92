"""RayJobs and CronJobs on Kubernetes: by kubectl where it is installed, or as a pod, with its service account.

A job that exists under a name is never changed, so a name happens once; `jepa schedule apply` replaces its CronJob.
"""

import http.client
import json
import re
import shutil
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from cluster.submission import Job, State, last_line
from pipelines.errors import InputRefused, JepaError, Retryable, UsageError

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
API = "https://kubernetes.default.svc"
POLL_SECONDS = 5.0
ANSWER_SECONDS = 60
LOST_SECONDS = 600.0
RAYJOBS = "apis/ray.io/v1/namespaces/{}/rayjobs"
PATHS = {"RayJob": RAYJOBS, "CronJob": "apis/batch/v1/namespaces/{}/cronjobs"}
STATUSES = {"PENDING": "waiting", "RUNNING": "running", "STOPPED": "stopped", "SUCCEEDED": "succeeded", "FAILED": "failed"}
"""Of `jobStatus`, which is Ray's own; it is empty until the cluster is there."""
KUBECTL_CODES = {
    **{"AlreadyExists": 409, "already exists": 409, "NotFound": 404, "not found": 404, "Forbidden": 403},
    **{"Unauthorized": 401, "logged in": 401, "Invalid": 422, "BadRequest": 400},
}
"""Words of kubectl's last line, and what the API server answered."""


class Kube:
    """The backend of target=kuberay. `render` makes the RayJob of a job: (name, job) -> document."""

    def __init__(self, namespace: str, render: Callable[[str, Job], dict[str, Any]] | None = None) -> None:
        self.namespace, self.render = namespace, render
        self.request = _by_pod if (ACCOUNT / "token").exists() else _by_kubectl

    def states(self, prefix: str = "") -> Mapping[str, State]:
        """RayJobs of the namespace whose names begin so."""
        return {item["metadata"]["name"]: _state(item) for item in self._items(prefix)}

    def details(self, prefix: str = "") -> list[dict[str, Any]]:
        """For a list, the newest first; times in milliseconds."""
        rows = [{"job": item["metadata"]["name"], **_state(item).as_dict(),
                 "started": _milliseconds(item.get("status", {}).get("startTime")),
                 "ended": _milliseconds(item.get("status", {}).get("endTime"))} for item in self._items(prefix)]  # fmt: skip
        return sorted(rows, key=lambda row: -row["started"])

    def state(self, name: str) -> State:
        """Raises InputRefused when there is no such RayJob."""
        return _state(self.request("GET", f"{RAYJOBS.format(self.namespace)}/{name}", None))

    def start(self, name: str, job: Job) -> bool:
        """Create the RayJob."""
        assert self.render is not None
        return self.create(self.render(name, job))

    def create(self, document: dict[str, Any]) -> bool:
        """Create any document; False when one of its name stands there."""
        try:
            self.request("POST", PATHS[document["kind"]].format(self.namespace), document)
            return True
        except _Exists:
            return False

    def replace(self, document: dict[str, Any]) -> None:
        """Create, or put in the place of what stands there: for schedules, not for jobs."""
        path = PATHS[document["kind"]].format(self.namespace)
        if not self.create(document):
            old = self.request("GET", f"{path}/{document['metadata']['name']}", None)
            metadata = {**document["metadata"], "resourceVersion": old["metadata"]["resourceVersion"]}
            self.request("PUT", f"{path}/{document['metadata']['name']}", {**document, "metadata": metadata})

    def stop(self, name: str) -> State:
        """Delete the RayJob, and its cluster with it. It leaves no record, so a submit starts it under the same name."""
        self.request("DELETE", f"{RAYJOBS.format(self.namespace)}/{name}", None)
        return State("stopped")

    def follow(self, name: str) -> State:
        """Print each change of state until the end. The log is in the pods, and in the dashboard while the cluster stands."""
        said, heard = "", time.monotonic()
        while True:
            try:
                item = self.request("GET", f"{RAYJOBS.format(self.namespace)}/{name}", None)
                heard, status = time.monotonic(), item.get("status", {})
                text = f"{status.get('jobDeploymentStatus') or 'created'} {status.get('jobStatus') or ''}".strip()
                if text != said:
                    said = text
                    print(json.dumps({"event": "rayjob", "job": name, "status": text}), flush=True)
                if not (state := _state(item)).going:
                    return state
            except Retryable:
                if time.monotonic() - heard > LOST_SECONDS:
                    raise
            time.sleep(POLL_SECONDS)

    def _items(self, prefix: str) -> list[dict[str, Any]]:
        items = self.request("GET", RAYJOBS.format(self.namespace), None)["items"]
        return [item for item in items if item["metadata"]["name"].startswith(prefix)]


class _Exists(InputRefused):
    """Something of this name is there already."""


def _state(item: dict[str, Any]) -> State:
    """Of a RayJob. The exit code stands in Ray's message about the driver."""
    status = item.get("status", {})
    message = status.get("message") or status.get("reason") or ""
    name = STATUSES.get(status.get("jobStatus") or "", "waiting")
    if status.get("jobDeploymentStatus") == "Failed" and name in ("waiting", "running"):
        name = "failed"  # it never ran, or its cluster was lost
    elif status.get("jobDeploymentStatus") == "Retrying" or (name != "waiting" and not _final(status)):
        name = "running"
    code = re.search(r"exit code (-?\d+)", message)
    return State(name, int(code[1]) if code else None, last_line(message) if message else "")


def _final(status: Mapping[str, Any]) -> bool:
    """Ray's own job may have failed while KubeRay still has attempts left."""
    return status.get("jobDeploymentStatus") in ("Complete", "Failed")  # Suspended is how Kueue lets it wait


def _milliseconds(stamp: str | None) -> int:
    return int(datetime.fromisoformat(stamp).timestamp() * 1000) if stamp else 0


def _by_pod(method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
    """One request to the API server, with the pod's own account."""
    token = (ACCOUNT / "token").read_text().strip()  # read each time: Kubernetes renews it
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(f"{API}/{path}", data, headers, method=method)  # noqa: S310 - https, above
    trust = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt")) if API.startswith("https") else None
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS, context=trust) as answer:  # noqa: S310
            return json.load(answer)
    except urllib.error.HTTPError as error:
        try:
            reason = json.load(error).get("message", "")
        except ValueError:
            reason = str(error)
        raise _refusal(error.code, f"{method} {path}", reason) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Retryable(f"the Kubernetes API server does not answer ({last_line(str(error))}): try again") from error


def _by_kubectl(method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
    """The same request through kubectl, with the user's own context and credentials."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise UsageError("kubectl is not installed: install it, or render with out=FILE and apply that where it is")
    verbs = {"GET": ["get"], "POST": ["create", "--filename", "-"], "PUT": ["replace", "--filename", "-"], "DELETE": ["delete"]}
    command = [kubectl, f"--request-timeout={ANSWER_SECONDS}s", *verbs[method], f"--raw=/{path}"]
    given = json.dumps(body) if body is not None else None
    try:
        ended = subprocess.run(command, input=given, capture_output=True, text=True, timeout=2 * ANSWER_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise Retryable(f"kubectl {method} {path} did not answer within {2 * ANSWER_SECONDS} s: try again") from error
    if ended.returncode == 0:
        return json.loads(ended.stdout)
    reason = last_line(ended.stderr)
    code = next((code for word, code in KUBECTL_CODES.items() if word in reason), 0)
    raise _refusal(code, f"kubectl {method} {path}", reason)


def _refusal(code: int, what: str, reason: str) -> JepaError:
    if code == 409:
        return _Exists(f"{what}: {reason}")
    if code == 404:
        return InputRefused(f"{what}: {reason}: is the name right, and KubeRay installed?")
    if code in (401, 403):
        return UsageError(f"{what}: access denied ({reason}): the account needs create, get, list, update and delete on it")
    if 400 <= code < 500 and code != 429:
        return UsageError(f"{what}: Kubernetes refuses it ({reason})")
    return Retryable(f"{what} failed ({reason}): try again")


def write_documents(documents: list[dict[str, Any]], out: str | None) -> None:
    """As YAML to a file, or to the terminal."""
    import yaml

    text = yaml.safe_dump_all(documents, sort_keys=False)
    if out:
        from pipelines import storage

        storage.write_bytes(out, text.encode())
    else:
        sys.stdout.write(text)
