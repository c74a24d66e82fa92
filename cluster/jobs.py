"""jepa jobs: list what was submitted to a cluster, tell how a job is, show its log, stop it."""

from datetime import UTC, datetime
from typing import Any

from cluster import submission
from cluster.kube import Kube
from cluster.ray_jobs import RayJobs
from pipelines.cluster_config import JobsConfig
from pipelines.progress import Reporter

PREFIX = "jepa-"
COLUMNS = ("job", "status", "exit_code", "retry", "started", "ended")


def run(config: JobsConfig, reporter: Reporter) -> dict[str, Any]:
    """Do one action. `logs` with `follow` ends as the job does.

    Raises InputRefused where there is no such job, UsageError for a refused token, Retryable where no cluster answers.
    """
    backend = RayJobs(config.address) if config.target == "jobs" else Kube(config.namespace)
    if config.action == "list":
        rows = backend.details(PREFIX)
        shown = [[_time(row[name]) if name in ("started", "ended") else row.get(name, "") for name in COLUMNS] for row in rows]
        reporter.table("jobs", COLUMNS, shown)
        return {"jobs": len(rows), "going": sum("exit_code" not in row for row in rows)}
    name = config.job or ""
    if config.action == "logs":
        if config.follow:
            submission.end(name, backend.follow(name))
        else:
            print(backend.logs(name), end="", flush=True)
        return {"job": name, **backend.state(name).as_dict()}
    state = backend.stop(name) if config.action == "stop" else backend.state(name)
    return {"job": name, **state.as_dict()} | ({"message": state.message} if state.message else {})


def _time(milliseconds: int) -> str:
    return f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%Y-%m-%d %H:%M:%SZ}" if milliseconds else ""
