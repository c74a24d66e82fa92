"""Run any verb as a job on a Ray cluster, with `python -m cluster.submit http://HEAD:8265 VERB [key=value ...]`.

The submission id is a function of the command, so a second submit of the same thing attaches to the first. The job runs the
command line that a user would type on the cluster, whose image brings the code; the exit code is the job's own.
"""

import hashlib
import os
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

from pipelines.cli import VERBS, split_verb
from pipelines.errors import EXIT_OK, JepaError, Retryable, UsageError
from pipelines.presets import load

POLL_SECONDS = 1.0
AGENT_SECONDS = 120.0
"""A cluster that has just started answers before any of its nodes takes jobs."""
NO_AGENT = "No available agent"
USAGE = "usage: python -m cluster.submit http://HEAD:8265 VERB [key=value ...]"


def submission_id(verb: str, arguments: Sequence[str]) -> str:
    """Name of the job: the verb and a digest of its arguments."""
    return f"jepa-{verb.replace(' ', '-')}-{hashlib.sha256(chr(0).join([verb, *arguments]).encode()).hexdigest()[:12]}"


def submit(address: str, verb: str, arguments: Sequence[str]) -> int:
    """Submit or attach, print the job's log as it grows, return its exit code. The token comes from RAY_AUTH_TOKEN.

    Raises UsageError for a mistake in the command, before anything is sent; Retryable when the cluster does not answer.
    """
    verb, arguments = split_verb([verb, *arguments])
    if verb not in VERBS:
        raise UsageError(f"jepa {verb} is the first word of several verbs: jepa {verb} --help lists them")
    load(VERBS[verb].options, verb, arguments)
    client, name = _client(address), submission_id(verb, arguments)
    if name in {job.submission_id for job in client.list_jobs()}:
        print(f"attaching to {name}", file=sys.stderr)
    else:
        command = ["jepa", *verb.split(), *arguments] + ([] if verb.endswith("report") else ["ray.address=auto"])
        _submit(client, shlex.join(command), name)
        print(f"submitted {name}", file=sys.stderr)
    return _follow(client, name)


def _client(address: str) -> Any:
    os.environ.setdefault("RAY_AUTH_MODE", "token" if os.environ.get("RAY_AUTH_TOKEN") else "disabled")
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
        client.get_version()
        return client
    except (ConnectionError, RuntimeError, RayError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Retryable(f"no Ray dashboard answers at {address} ({reason}): check the address and RAY_AUTH_TOKEN") from error


def _submit(client: Any, command: str, name: str) -> None:
    """Raises Retryable when the cluster does not take the job."""
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            client.submit_job(entrypoint=command, submission_id=name)
            return
        except RuntimeError as error:
            if NO_AGENT not in str(error) or time.monotonic() > deadline:
                raise Retryable(f"the cluster did not take {name}: {str(error).strip().splitlines()[0]}") from error
        time.sleep(POLL_SECONDS)


def _follow(client: Any, name: str) -> int:
    """Print the log until the job ends; its driver's exit code, 75 where the job was stopped or lost."""
    printed = 0
    while True:
        info = client.get_job_info(name)
        log = client.get_job_logs(name)
        print(log[printed:], end="", flush=True)
        printed = len(log)
        if info.status.is_terminal():
            done = info.status.value == "SUCCEEDED"
            return EXIT_OK if done else info.driver_exit_code or Retryable.exit_code
        time.sleep(POLL_SECONDS)


def main() -> int:
    """Command line of this module."""
    if len(sys.argv) < 3:
        print(USAGE, file=sys.stderr)
        return UsageError.exit_code
    try:
        return submit(sys.argv[1], sys.argv[2], sys.argv[3:])
    except JepaError as error:
        print(f"jepa submit: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
