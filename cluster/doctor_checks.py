"""What jepa doctor looks at, one function each. They run here, or in a Ray task on a node; none imports ray or torch."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.version import Version

from pipelines.errors import JepaError, Retryable
from pipelines.redact import redacted

PACKAGES = ("ray", "torch", "torchvision", "timm", "av", "boto3", "s3fs")
PROJECT, PINS = "jepa-pipeline", "constraints.txt"
TOKEN_FIX = "set RAY_AUTH_TOKEN to the cluster's"  # noqa: S105
ANSWER_SECONDS = 3.0
GPU_SECONDS = 180
SKEW_WARN_S, SKEW_FAIL_S = 5.0, 300.0
"""S3 refuses requests whose time is 15 minutes off; tokens and windows of schedules go wrong before."""
SPILL_LIMIT = 0.95
"""Ray stops spilling when the disk is fuller than this (local_fs_capacity_threshold)."""
SHM_SHARE = 0.25
"""Of the memory. Ray gives its object store 30 %, and falls back to slow files where /dev/shm is smaller."""
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report. `passing`: it may be gone at the next try."""

    check: str
    status: Literal["ok", "warn", "fail", "skip"]
    detail: str
    fix: str = ""
    node: str = ""
    passing: bool = False


def guarded(check: str, error: Exception) -> Finding:
    """What a check that raised has found."""
    text, _, fix = redacted(str(error)).rpartition(": ") if isinstance(error, JepaError) else (redacted(str(error)), "", "")
    fix = fix if text else "see docs/troubleshooting.md"
    return Finding(check, "fail", text or fix, fix, passing=isinstance(error, Retryable))


def versions(constraints: str | None) -> list[Finding]:
    """Installed versions against what this project and its libraries ask of each other, and against a file of pins."""
    there, found = {}, []
    for name in PACKAGES:
        try:
            there[name] = Version(metadata.version(name))
        except metadata.PackageNotFoundError:
            found.append(Finding("versions", "fail", f"{name} is not installed", f"pip install --constraint {PINS} {PROJECT}"))
    asked = [(by, Requirement(text)) for by in (PROJECT, *there) for text in _requirements(by)]
    for by, need in asked:
        if need.name in there and not need.marker and not need.specifier.contains(there[need.name], prereleases=True):
            fix = f"pip install '{need.name}{need.specifier}', or take the image of this release"
            found.append(Finding("versions", "fail", f"{need.name} {there[need.name]}, but {by} needs {need.specifier}", fix))
    if {"torch", "torchvision"} <= there.keys() and _builds(there["torch"]) != _builds(there["torchvision"]):
        pair = f"torch {there['torch']} and torchvision {there['torchvision']} are of different builds: importing timm fails"
        found.append(Finding("versions", "fail", pair, "install both from the same index"))
    pins = _pins(constraints)
    other = [name for name in there if name in pins and Version(pins[name]) != there[name]]
    if other:
        detail = ", ".join(f"{name} {there[name]} (pinned {pins[name]})" for name in other)
        found.append(Finding("versions", "warn", detail, f"pip install --constraint {PINS} {PROJECT}, for the tested set"))
    return found or [Finding("versions", "ok", ", ".join(f"{name} {version}" for name, version in there.items()))]


def _requirements(name: str) -> list[str]:
    try:
        return [text for text in metadata.requires(name) or [] if "extra ==" not in text]
    except metadata.PackageNotFoundError:
        return []


def _builds(version: Version) -> str:
    return version.local or ""


def _pins(constraints: str | None) -> dict[str, str]:
    path = Path(constraints) if constraints else Path(__file__).parent.parent / PINS
    if not path.is_file():
        return {}
    lines = [line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines()]
    return {name: pin for name, equals, pin in (line.partition("==") for line in lines) if equals}


def token() -> Finding:
    """The token for joining and submitting: at hand, and readable by its owner alone."""
    if os.environ.get("RAY_AUTH_MODE", "token") == "disabled":
        return Finding("token", "fail", "RAY_AUTH_MODE=disabled", "set RAY_AUTH_MODE=token on every node and here")
    given = os.environ.get("RAY_AUTH_TOKEN")
    if given:
        return Finding("token", "ok", "RAY_AUTH_TOKEN is set")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not path.is_file():
        return Finding("token", "warn", "no token: only an embedded Ray can be used", "set RAY_AUTH_TOKEN to the cluster's")
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        return Finding("token", "fail", f"{path} can be read by others", f"chmod 600 {path}")
    return Finding("token", "ok", f"token in {path}")


def dashboard(address: str, *, strict: bool = True) -> list[Finding]:
    """Closed to who has no token, open to who has it, the same Ray, and the clock of its machine."""
    code, _, _ = _get(address, with_token=False)
    if code == 200:
        return [Finding("dashboard", "fail", f"{address} answers without a token: whoever reaches it can run code",
                        "start the cluster with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN")]  # fmt: skip
    if code not in (401, 403):
        return [Finding("dashboard", "fail", f"{address} answers HTTP {code}, not as a Ray dashboard does", "check the address")]
    code, version, date = _get(address, with_token=True)
    if code != 200:
        return [Finding("dashboard", "fail", f"{address} refuses this token (HTTP {code})", TOKEN_FIX)]
    found = [Finding("dashboard", "ok", f"{address} asks for the token, Ray {version}")]
    if version != metadata.version("ray"):
        detail = f"the cluster runs Ray {version}, here is {metadata.version('ray')}"
        fix = "use the image of this release on the cluster, or install the cluster's Ray here"
        found.append(Finding("dashboard", "fail" if strict else "warn", detail, fix))
    host = urllib.parse.urlsplit(address)
    if host.scheme == "http" and host.hostname not in ("localhost", "127.0.0.1", "::1"):
        fix = "use https, or kubectl port-forward and localhost"
        found.append(Finding("dashboard", "warn", "the token travels unencrypted", fix))
    return found + ([clock(time.time() - date, "the dashboard")] if date else [])


def _get(address: str, *, with_token: bool) -> tuple[int, str, float | None]:
    """(status, Ray's version, the server's time). Raises Retryable where nothing answers."""
    headers = {"Authorization": f"Bearer {_token()}"} if with_token else {}
    request = urllib.request.Request(f"{address.rstrip('/')}/api/version", headers=headers)  # noqa: S310 - http(s), checked
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:  # noqa: S310
            code, date, body = answer.status, answer.headers.get("Date"), answer.read(1 << 16)
    except urllib.error.HTTPError as error:
        code, date, body = error.code, error.headers.get("Date"), b""
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise Retryable(
            f"no Ray dashboard answers at {address} ({reason}): check the address, and that the cluster runs"
        ) from error
    try:
        version = json.loads(body)["ray_version"] if code == 200 else ""
    except (ValueError, KeyError, TypeError):
        code, version = 0, ""
    return code, version, parsedate_to_datetime(date).timestamp() if date else None


def _token() -> str:
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return os.environ.get("RAY_AUTH_TOKEN") or (path.read_text().strip() if path.is_file() else "")


def clock(skew_s: float, whose: str) -> Finding:
    """The time of this machine against a server's Date header, which has whole seconds."""
    off = max(0.0, abs(skew_s) - 1.0)
    status = "fail" if off > SKEW_FAIL_S else "warn" if off > SKEW_WARN_S else "ok"
    fix = "" if status == "ok" else "synchronise it: chrony or systemd-timesyncd"
    return Finding("clock", status, f"{off:.0f} s off {whose}'s", fix)


def shared_memory(path: str = "/dev/shm") -> Finding:  # noqa: S108
    """Room for Ray's object store."""
    if not os.path.isdir(path):
        return Finding("shared memory", "warn", f"there is no {path}", "Ray will use slow files: mount one")
    disk = os.statvfs(path)
    size, memory = disk.f_frsize * disk.f_blocks, _memory()
    detail = f"{path} has {size / GIB:.1f} GiB of {memory / GIB:.0f} GiB memory, {disk.f_frsize * disk.f_bavail / GIB:.1f} free"
    if size < SHM_SHARE * memory:
        return Finding("shared memory", "fail", detail, "a pod: an emptyDir of medium Memory on /dev/shm; docker: --shm-size")
    return Finding("shared memory", "ok", detail)


def _memory() -> int:
    """Bytes that this container may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def spill(min_gb: float) -> Finding:
    """Room on the disk that Ray spills objects to."""
    folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    disk = shutil.disk_usage(folder)
    detail = f"{folder} has {disk.free / GIB:.1f} GiB free of {disk.total / GIB:.0f}"
    fix = "free space there, or start Ray with --temp-dir on a larger disk"
    if 1 - disk.free / disk.total > SPILL_LIMIT:
        return Finding("spill", "fail", f"{detail}: Ray does not spill to a disk that is {SPILL_LIMIT:.0%} full", fix)
    return Finding("spill", "warn" if disk.free < min_gb * GIB else "ok", detail, fix if disk.free < min_gb * GIB else "")


def bucket(uri: str) -> list[Finding]:
    """Write, read, write under a condition, delete: with the credentials that are here."""
    from pipelines import storage_check

    written = storage_check.check(uri)
    found = []
    if not written.conditional:
        detail = f"{uri}: the store ignores If-None-Match, so that two writers overwrite each other's commits"
        found.append(Finding("storage", "fail", detail, "use a store with conditional writes, as S3 and MinIO have"))
    if not written.deletes:
        detail = f"{uri}: objects cannot be deleted, so old checkpoints stay"
        found.append(Finding("storage", "warn", detail, "allow s3:DeleteObject below runs, or let a lifecycle rule do it"))
    found = found or [Finding("storage", "ok", f"{uri}: writes, conditional writes, reads and deletes")]
    return found + ([clock(written.skew_s, "the object store")] if written.skew_s is not None else [])


def catalog(uri: str) -> Finding:
    """Its newest version can be read."""
    from pipelines import catalog as catalogs

    return Finding("catalog", "ok", f"{catalogs.pin(catalogs.parse_ref(uri))} is readable")


def gpus(mode: str) -> Finding:
    """Compute on each GPU and all-reduce over them, in a process of its own."""
    there = shutil.which("nvidia-smi") is not None or os.path.exists("/dev/nvidia0")
    if mode == "skip" or (mode == "auto" and not there):
        return Finding("gpu", "skip", "not asked for" if mode == "skip" else "no NVIDIA driver here")
    fix = "check nvidia-smi, the driver against torch's CUDA version, and the pod's nvidia.com/gpu limit"
    try:
        ended = subprocess.run([sys.executable, "-m", "pipelines.gpu_probe"], capture_output=True, text=True, timeout=GPU_SECONDS)
        told = json.loads(ended.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return Finding("gpu", "fail", f"the test hangs for {GPU_SECONDS} s", fix)
    except (ValueError, IndexError):
        last = (ended.stderr.strip().splitlines() or ["nothing said"])[-1]
        return Finding("gpu", "fail", f"the test ended with {ended.returncode}: {last}", fix)
    if told["problems"] or not told["gpus"]:
        return Finding("gpu", "fail", "; ".join(told["problems"]) or f"torch {told['torch']} sees no GPU", fix)
    detail = f"{told['gpus']} x {told['names'][0]}, CUDA {told['cuda']}, NCCL {told['nccl']}: computed and summed"
    return Finding("gpu", "ok", detail)


def machine(min_spill_gb: float, gpu: str, constraints: str | None) -> list[Finding]:
    """All that concerns one machine, for a Ray task on each node."""
    return [*versions(constraints), shared_memory(), spill(min_spill_gb), gpus(gpu)]


def on(node: str, finding: Finding) -> Finding:
    """The same finding, of a node."""
    return replace(finding, node=node)
