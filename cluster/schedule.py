"""jepa schedule: a CronJob whose pod submits one job for each window of time and ends as that job ends.

The pod works out the window from the clock, so one that starts late or twice names the same job. `concurrencyPolicy: Forbid`
and a starting deadline below the period let Kubernetes catch up at most one missed window; as an ingest reads everything that
is new, that one catches up on all of them.
"""

import hashlib
import json
from typing import Any

from cluster import kube, manifests, submission, windows
from pipelines.cluster_config import PodConfig, ScheduleConfig, SubmitConfig
from pipelines.errors import UsageError
from pipelines.progress import Reporter

LONGEST_NAME = 52
"""Of a CronJob: Kubernetes appends the time to it."""
START_WITHIN = {"hour": 1800, "day": 6 * 3600, "week": 24 * 3600}
"""Seconds after its time in which a window may still be started: less than a period, so that it still is the last one."""
LONGEST_S = 7 * 24 * 3600
"""Of the pod that waits for a job without a deadline of its own."""


def run(config: ScheduleConfig, reporter: Reporter) -> dict[str, Any]:
    """Render the CronJob, or create or replace it in the cluster. Raises UsageError or Retryable where Kubernetes refuses it."""
    document = render(config)
    name = document["metadata"]["name"]
    told = {"name": name, "schedule": document["spec"]["schedule"], "next_job": submission.job_of(_submit(config)).name}
    if config.action == "render":
        kube.write_documents([document], config.out)
        return told if config.out else {**told, "out": "the terminal"}
    kube.Kube(config.pod.namespace).replace(document)
    return {**told, "namespace": config.pod.namespace}


def render(config: ScheduleConfig) -> dict[str, Any]:
    """The CronJob as a document."""
    command = ["jepa", "submit", *_words(config), *config.command]
    digest = hashlib.sha256(json.dumps([command, config.every]).encode()).hexdigest()[:8]
    name = f"jepa-{config.name}" if config.name else f"jepa-{config.command[0]}-{digest}"
    if len(name) > LONGEST_NAME:
        raise UsageError(f"{name} is longer than the {LONGEST_NAME} characters that a CronJob's name may have: give name=VALUE")
    return manifests.cronjob(
        name,
        windows.cron(config.every, config.at),
        command,
        config.pod,
        start_within_s=START_WITHIN[config.every],
        deadline_s=config.pod.deadline_s * (config.retries + 1) + 3600 if config.pod.deadline_s else LONGEST_S,
        tries=config.retries,
    )


def _submit(config: ScheduleConfig) -> SubmitConfig:
    """What the pod will submit, if the window of now were its own."""
    window = f"{config.every}@{config.at}"
    return SubmitConfig(config.command, config.target, config.address, window, pod=config.pod)


def _words(config: ScheduleConfig) -> list[str]:
    """Options of jepa submit in the pod."""
    words = [f"target={config.target}", f"window={config.every}@{config.at}"]  # attempts are the CronJob's: backoffLimit
    if config.target == "jobs":
        return [*words, f"address={config.address}"]
    default = PodConfig()
    changed = [(key, value) for key, value in vars(config.pod).items() if value != getattr(default, key)]
    return words + [f"pod.{key}={value}" for key, value in changed]
