"""jepa submit: any verb as a job on a cluster, once. Follows its log, and ends as the job ends.

`jepa submit address=http://HEAD:8265 pretrain preset=... run.dir=s3://...` runs what `jepa pretrain ...` would run there. The
image of the cluster brings the code.
"""

from typing import Any

from cluster import submission
from cluster.submission import Backend, Job
from pipelines.cluster_config import SubmitConfig
from pipelines.errors import Retryable
from pipelines.progress import Reporter


def run(config: SubmitConfig, reporter: Reporter) -> dict[str, Any]:
    """Submit or attach, print the job's log as it grows.

    Raises what the job's verb raised there (by its exit code), UsageError for what the cluster refuses, Retryable where none
    answers or the job was stopped or lost.
    """
    job = submission.job_of(config)
    if config.out:
        from cluster import kube

        kube.write_documents([_rayjob(config, job.name, job)], config.out)
        return {"job": job.name, "out": config.out}
    if config.doctor:
        from cluster import doctor

        doctor.before_submit(config, reporter)
    backend = _backend(config)
    for left in range(config.retries, -1, -1):
        name, new = submission.begin(backend, job, again=config.again and left == config.retries)
        reporter.event("submitted" if new else "attached", job=name, verb=job.verb)
        if not config.wait:
            return {"job": name, "new": new}
        state = backend.follow(name)
        if state.exit_code != Retryable.exit_code or not left:
            break
        reporter.event("warning", message=f"job {name} {state.status}, which may pass: {left} more attempts")
    submission.end(name, state)
    return {"job": name, **state.as_dict()}


def _backend(config: SubmitConfig) -> Backend:
    if config.target == "kuberay":
        from cluster.kube import Kube

        return Kube(config.pod.namespace, lambda name, job: _rayjob(config, name, job))
    from cluster.ray_jobs import RayJobs

    return RayJobs(config.address, config.working_dir, config.stop_wait_s)


def _rayjob(config: SubmitConfig, name: str, job: Job) -> dict[str, Any]:
    from cluster import manifests

    return manifests.rayjob(name, job.entrypoint, config.pod)
