"""jepa doctor: is everything there that a job needs, here or on the cluster? Every failed check names its fix.

`jepa submit doctor storage=[s3://bucket/runs]` asks the cluster itself, with its own credentials; `jepa doctor nodes=true
ray.address=HOST:6379` asks every node. jepa submit runs the cheap part first.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from functools import partial
from typing import Any

from cluster import doctor_checks as checks
from cluster.doctor_checks import Finding
from pipelines import cli, storage
from pipelines.cluster_config import ADDRESS_VARIABLE, DoctorConfig, SubmitConfig
from pipelines.errors import ConditionMissed, JepaError, Retryable, UsageError
from pipelines.progress import Reporter

CHEAP_SECONDS = 5.0
LONG_SECONDS = 60.0
NODE_SECONDS = 300.0
COLUMNS = ("check", "status", "detail", "fix", "node")
Check = tuple[str, Callable[[], Finding | list[Finding]]]


def run(config: DoctorConfig, reporter: Reporter) -> dict[str, Any]:
    """Check, and tell. Returns counts by status.

    Raises ConditionMissed (4) when something must be put right, Retryable (75) when all that failed may pass.
    """
    began = time.monotonic()
    address = _address(config.address)
    cheap: list[Check] = [
        ("versions", partial(checks.versions, config.constraints)),
        ("token", checks.token),
        ("shared memory", checks.shared_memory),
        ("spill", partial(checks.spill, config.min_spill_gb)),
        *([("dashboard", partial(checks.dashboard, address))] if address else []),
    ]
    long: list[Check] = [
        *(("storage", partial(checks.bucket, uri)) for uri in config.storage),
        *([("catalog", partial(checks.catalog, config.catalog))] if config.catalog else []),
        ("gpu", partial(checks.gpus, config.gpu)),
    ]
    found = _all(cheap, CHEAP_SECONDS)
    if not config.cheap:
        found += _all(long, max(LONG_SECONDS, checks.GPU_SECONDS + 10.0))
        if config.nodes:
            found += _nodes(config)
    _tell(found, reporter)
    counts = {status: sum(finding.status == status for finding in found) for status in ("ok", "warn", "fail", "skip")}
    bad = [finding for finding in found if finding.status == "fail"]
    if bad:
        kind = Retryable if all(finding.passing for finding in bad) else ConditionMissed
        raise kind(f"{len(bad)} of {len(found)} checks failed: {'; '.join(_sentence(finding) for finding in bad)}")
    return {**counts, "seconds": round(time.monotonic() - began, 2)}


def before_submit(config: SubmitConfig, reporter: Reporter) -> None:
    """The cheap part, for one job. Raises UsageError when the job could not succeed; what may pass is only told, as warnings are:
    the submission itself has more patience.
    """
    verb, _, options = cli.checked_command(config.command)
    work: list[Check] = [("versions", partial(checks.versions, None))]
    address = _address(config.address)
    if config.target == "jobs" and address:
        work.append(("dashboard", partial(checks.dashboard, address, strict=False)))
    found = [*_all(work, CHEAP_SECONDS), *local_paths(verb, options)]
    for finding in found:
        if finding.status == "warn" or finding.passing:
            reporter.event("warning", message=_sentence(finding))
    bad = [finding for finding in found if finding.status == "fail" and not finding.passing]
    if bad:
        raise UsageError(f"nothing was submitted, jepa doctor says: {'; '.join(_sentence(finding) for finding in bad)}")


def local_paths(verb: str, options: Any) -> list[Finding]:
    """Paths that mean something on this machine alone, unless the nodes share them."""
    found = []
    for key in (*cli.VERBS[verb].reads, *cli.VERBS[verb].writes):
        value = options
        for part in key.split("."):
            value = getattr(value, part)
        if isinstance(value, str) and not storage.is_s3(value):
            detail = f"{key}={value} is a path on the cluster's nodes"
            found.append(Finding("paths", "warn", detail, "they must all share it, or use s3://"))
    return found


def _address(given: str | None) -> str | None:
    return given or os.environ.get(ADDRESS_VARIABLE)


def _all(work: list[Check], seconds: float) -> list[Finding]:
    """All checks at once; what has not ended in time has failed, for now."""
    pool = ThreadPoolExecutor(max(1, len(work)))
    deadline = time.monotonic() + seconds
    running = [(name, pool.submit(check)) for name, check in work]
    found: list[Finding] = []
    for name, future in running:
        try:
            result = future.result(timeout=max(0.0, deadline - time.monotonic()))
            found += result if isinstance(result, list) else [result]
        except Late:
            late = Finding(name, "fail", f"no answer within {seconds:.0f} s", "try again, or look at what it asks", passing=True)
            found.append(late)
        except (JepaError, OSError, ValueError) as error:
            found.append(checks.guarded(name, error))
    pool.shutdown(wait=False, cancel_futures=True)
    return found


def _nodes(config: DoctorConfig) -> list[Finding]:
    """The checks of a machine, as a task on every node of the cluster."""
    from pipelines import ray_session

    with ray_session.session(config.ray):
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        asked = []
        for node in ray.nodes():
            if node["Alive"]:
                cards = int(node["Resources"].get("GPU", 0)) if config.gpu != "skip" else 0
                where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                task = ray.remote(checks.machine).options(num_cpus=0, num_gpus=cards, scheduling_strategy=where, max_retries=0)
                mode = "require" if cards else "skip"
                name = f"{node['NodeManagerHostname']}/{node['NodeID'][:6]}"
                asked.append((name, task.remote(config.min_spill_gb, mode, None)))
        found, deadline = [], time.monotonic() + NODE_SECONDS
        for name, reference in asked:
            try:
                told = ray.get(reference, timeout=max(0.0, deadline - time.monotonic()))
                found += [checks.on(name, finding) for finding in told]
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                detail = f"did not do the checks ({reason})"
                found.append(Finding("node", "fail", detail, "is it busy or gone? ray status", name, passing=True))
        return found


def _tell(found: list[Finding], reporter: Reporter) -> None:
    rows = [[getattr(finding, column) for column in COLUMNS] for finding in found]
    if reporter.terminal:
        reporter.table("doctor", COLUMNS, rows)
        return
    for row in rows:
        reporter.event("check", **{column: cell for column, cell in zip(COLUMNS, row, strict=True) if cell})


def _sentence(finding: Finding) -> str:
    where = f" on {finding.node}" if finding.node else ""
    return f"{finding.check}{where}: {finding.detail}" + (f": {finding.fix}" if finding.fix else "")
