"""Options of the verbs that deal with a cluster: submit, jobs, schedule, doctor. The verbs themselves live in cluster/.

Imports neither ray nor cluster, like config.py, so that a mistake in a command answers at once.
"""

import os
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from pipelines.config import RayConfig
from pipelines.errors import UsageError

Target = Literal["jobs", "kuberay"]
Every = Literal["hour", "day", "week"]
WINDOW_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?")
RULE = re.compile(r"(hour|day|week)@([01]\d|2[0-3]):([0-5]\d)")
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
"""What Ray's own command line calls the address of a dashboard."""


@dataclass(frozen=True)
class PodConfig:
    """The RayJob of target=kuberay."""

    image: str | None = None
    """Image that brings the code, best by digest."""
    namespace: str = "jepa"
    token_secret: str = "jepa-ray-token"  # noqa: S105 - the name of a Kubernetes Secret, not its content
    """Secret whose key `auth_token` is the Ray token of the cluster."""
    gpu_workers: int = 0
    """Nodes with one GPU each, for training."""
    decode_workers: int = 1
    """CPU nodes labelled role=decode."""
    queue: str | None = None
    """Kueue's local queue; unset leaves the job to the scheduler."""
    env_secret: str | None = None
    """Secret with further environment variables of the pods: credentials of the object store, trackers' keys."""
    service_account: str = "default"
    """Of the job's pods, whose role reaches the object store: jepa-run or jepa-ingest of infra/kubernetes/base."""
    pools: bool = False
    """Run on the nodes that are labelled and tainted jepa-pool, as the overlays do; false takes any untainted node."""
    wait_s: int = 0
    """Seconds after which a job that still waits for its nodes is ended; 0 never."""
    deadline_s: int = 0
    """Seconds after which KubeRay ends the job; 0 never."""


@dataclass(frozen=True)
class SubmitConfig:
    """jepa submit [key=value ...] VERB [...]: run any verb as a job on a cluster. Words from VERB on belong to that verb."""

    command: list[str] = MISSING
    """The verb and its words, as they would be typed there."""
    target: Target = "jobs"
    """jobs: Ray's Jobs API at `address`. kuberay: a RayJob with a cluster of its own, by kubectl or from within a pod."""
    address: str | None = None
    """http(s)://HOST:8265 of the Ray dashboard; RAY_API_SERVER_ADDRESS by default. The token is RAY_AUTH_TOKEN."""
    window: str | None = None
    """Name of the time window that this job is for; or hour@00:MM, day@HH:MM, week@HH:MM (UTC): the last one that has begun."""
    again: bool = False
    """Run once more what has already succeeded; without it, a second submit of the same thing attaches."""
    retries: int = 0
    """Further attempts while the job ends with what may pass (exit code 75, a lost cluster)."""
    wait: bool = True
    """Follow the log to the job's end; false ends when the cluster has taken the job."""
    working_dir: str | None = None
    """For development: this folder's code instead of the image's, uploaded to the cluster."""
    stop_wait_s: int = 300
    """Seconds from SIGTERM to SIGKILL when the job is stopped: for the last checkpoint."""
    doctor: bool = True
    """Run the cheap part of jepa doctor first, and submit nothing when a check fails."""
    out: str | None = None
    """kuberay: write the RayJob to this file and submit nothing."""
    pod: PodConfig = field(default_factory=PodConfig)

    def check(self) -> None:
        """The whole command, before anything is sent."""
        from pipelines.cli import checked_command

        checked_command(self.command)
        check_address(self.target, self.address)
        if self.retries < 0 or self.stop_wait_s < 0:
            raise UsageError("retries and stop_wait_s must not be negative")
        if self.window and not (RULE.fullmatch(self.window) or WINDOW_NAME.fullmatch(self.window)):
            raise UsageError(f"window={self.window}: write a name of lower-case letters, digits and -, or day@HH:MM")
        if self.target == "kuberay" and not self.pod.image:
            raise UsageError("target=kuberay needs pod.image=VALUE: the image that brings the code")
        if self.target == "kuberay" and self.working_dir:
            raise UsageError("working_dir is for target=jobs: a RayJob's code travels in pod.image")
        if self.out and self.target != "kuberay":
            raise UsageError("out writes a RayJob: it needs target=kuberay")


@dataclass(frozen=True)
class JobsConfig:
    """jepa jobs list | status NAME | logs NAME | stop NAME: the jobs that were submitted to a cluster."""

    action: Literal["list", "status", "logs", "stop"] = MISSING
    job: str | None = None
    target: Target = "jobs"
    address: str | None = None
    """As in jepa submit."""
    follow: bool = False
    """logs: to the job's end, and end with its exit code."""
    namespace: str = "jepa"

    def check(self) -> None:
        """A name where one is needed."""
        check_address(self.target, self.address)
        if (self.action != "list") != bool(self.job):
            raise UsageError(f"jepa jobs {self.action}" + (" takes no job" if self.job else " needs a job: jepa jobs list"))
        if self.action == "logs" and self.target == "kuberay":
            raise UsageError("logs of a RayJob: kubectl logs --selector job-name=NAME, or target=jobs at its dashboard")


@dataclass(frozen=True)
class ScheduleConfig:
    """jepa schedule render|apply [key=value ...] VERB [...]: a CronJob that submits one job for each window of time."""

    action: Literal["render", "apply"] = MISSING
    command: list[str] = MISSING
    """The verb and its words."""
    every: Every = "day"
    at: str = "00:00"
    """HH:MM in UTC; with every=hour only the minutes count, with every=week it is on Mondays."""
    name: str | None = None
    """Of the CronJob; by default from the verb and its options."""
    target: Target = "kuberay"
    """kuberay: one RayJob for each window. jobs: a job on the standing cluster at `address`."""
    address: str | None = None
    retries: int = 2
    """Attempts at a window after the first, where what failed may pass."""
    out: str | None = None
    """File to render to; the terminal by default."""
    pod: PodConfig = field(default_factory=PodConfig)

    def check(self) -> None:
        """A time of day, an image, and a command that parses."""
        from pipelines.cli import checked_command

        checked_command(self.command)
        if not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", self.at):
            raise UsageError(f"at={self.at} is no time of day: write HH:MM, in UTC")
        if not self.pod.image:
            raise UsageError("pod.image is missing: give pod.image=VALUE, the image that brings the code")
        if self.target == "jobs" and not self.address:
            raise UsageError("address is missing: give address=http://HOST:8265, as the pod of the schedule sees it")
        if self.retries < 0:
            raise UsageError("retries must not be negative")
        if self.name and not WINDOW_NAME.fullmatch(self.name):
            raise UsageError(f"name={self.name}: at most 20 lower-case letters, digits and -")


@dataclass(frozen=True)
class DoctorConfig:
    """jepa doctor: is everything there that a job needs? Every failed check names its fix. `jepa submit doctor` asks there."""

    address: str | None = None
    """Of the dashboard, as in jepa submit: is it closed to strangers, does it run the same Ray?"""
    storage: list[str] = field(default_factory=list)
    """URIs below which jobs will write; a small object is really written, replaced under a condition, and deleted."""
    catalog: str | None = None
    nodes: bool = False
    """Join Ray (ray.address) and check shared memory, disk, versions and GPUs on every node."""
    gpu: Literal["auto", "require", "skip"] = "auto"
    """auto: compute on each GPU and all-reduce over NCCL where there are GPUs."""
    cheap: bool = False
    """Only what is known within seconds, as before every submit."""
    min_spill_gb: float = 10.0
    constraints: str | None = None
    """File of exact versions to hold this installation against; constraints.txt of a source checkout by default."""
    ray: RayConfig = field(default_factory=RayConfig)

    def check(self) -> None:
        """Addresses that can be meant."""
        check_address("kuberay", self.address)


def check_address(target: str, address: str | None) -> None:
    """Raises UsageError where no dashboard is named, or by another scheme than http."""
    given = address or os.environ.get(ADDRESS_VARIABLE)
    if target == "jobs" and not given:
        raise UsageError(f"address is missing: give address=http://HOST:8265, or set {ADDRESS_VARIABLE}")
    if given and not re.match(r"https?://[^/@]+/?$", given):
        raise UsageError(f"address={_shown(given)} must be http(s)://HOST:PORT of the Ray dashboard, without user or password")


def _shown(address: str) -> str:
    return re.sub(r"//[^/]*@", "//***@", address)


def has_option(options: Any, name: str) -> bool:
    """Whether a verb's options have a field of this name."""
    return name in getattr(options, "__dataclass_fields__", {})
