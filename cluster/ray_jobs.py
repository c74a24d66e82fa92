"""Jobs on a standing Ray cluster, through its Jobs API. What the cluster answers is told apart: not reached, refused, wrong."""

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from cluster.submission import Job, State, last_line
from pipelines.cluster_config import ADDRESS_VARIABLE
from pipelines.errors import InputRefused, JepaError, Retryable, UsageError

T = TypeVar("T")
POLL_SECONDS = 0.5
ANSWER_SECONDS = 60.0
"""For one request. Ray's client itself waits for ever."""
AGENT_SECONDS = 120.0
"""A cluster that has just started answers before any of its nodes takes jobs."""
LOST_SECONDS = 120.0
"""A dashboard that does not answer for so long has ended, and its jobs with it."""
NO_AGENT = "No available agent"
EXISTS = "already exists"
STATUSES = {"PENDING": "waiting", "RUNNING": "running", "STOPPED": "stopped", "SUCCEEDED": "succeeded", "FAILED": "failed"}
EXCLUDES = ["runs", ".git", ".venv", "**/__pycache__", "*.mp4"]
"""Of an uploaded working_dir, besides what its .gitignore names."""


def set_auth_mode() -> None:
    """Ray reads the mode once, at its import; unset, it would look for a token in the home directory, or make one."""
    known = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    os.environ.setdefault("RAY_AUTH_MODE", "token" if known else "disabled")


class RayJobs:
    """The backend of target=jobs. Raises UsageError for a refused token or address, Retryable where nothing answers."""

    def __init__(self, address: str | None, working_dir: str | None = None, stop_wait_s: int = 300) -> None:
        self.address = (address or os.environ[ADDRESS_VARIABLE]).rstrip("/")
        self.working_dir, self.stop_wait_s = working_dir, stop_wait_s
        set_auth_mode()
        os.environ[ADDRESS_VARIABLE] = self.address  # Ray's client prefers the variable to the address that it is given
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray.dashboard").setLevel(logging.WARNING)  # it tells of every connection that ends

        class Client(JobSubmissionClient):
            def _do_request(self, method: str, endpoint: str, **more: Any) -> Any:
                return super()._do_request(method, endpoint, timeout=ANSWER_SECONDS, **more)

        self.client = self._asked(lambda: Client(self.address))

    def states(self, prefix: str = "") -> Mapping[str, State]:
        """Jobs whose names begin so; those that were not submitted by name are left out."""
        jobs = self._asked(self.client.list_jobs)
        return {job.submission_id: _state(job) for job in jobs if (job.submission_id or "").startswith(prefix)}

    def details(self, prefix: str = "") -> list[dict[str, Any]]:
        """For a list: name, status, start and end of every job, the newest first."""
        jobs = [job for job in self._asked(self.client.list_jobs) if (job.submission_id or "").startswith(prefix)]
        rows = [{"job": job.submission_id, **_state(job).as_dict(), "started": job.start_time or 0, "ended": job.end_time or 0}
                for job in jobs if job.submission_id]  # fmt: skip
        return sorted(rows, key=lambda row: -row["started"])

    def state(self, name: str) -> State:
        """Raises InputRefused when there is no such job."""
        return _state(self._asked(lambda: self.client.get_job_info(name), name))

    def start(self, name: str, job: Job) -> bool:
        """Submit; wait for a cluster that has just started to take jobs."""
        environment: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(self.stop_wait_s)}}
        if self.working_dir:
            environment |= {"working_dir": self.working_dir, "excludes": EXCLUDES}
        metadata = {"jepa_verb": job.verb} | ({"jepa_window": job.window} if job.window else {})
        deadline = time.monotonic() + AGENT_SECONDS

        def submit() -> None:
            self.client.submit_job(entrypoint=job.entrypoint, submission_id=name, runtime_env=environment, metadata=metadata)

        while True:
            try:
                self._asked(submit)
                return True
            except JepaError as error:
                if EXISTS in str(error):
                    return False
                if NO_AGENT not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(POLL_SECONDS)

    def stop(self, name: str) -> State:
        """SIGTERM, and wait for the end."""
        self._asked(lambda: self.client.stop_job(name), name)
        deadline = time.monotonic() + self.stop_wait_s + AGENT_SECONDS
        while (state := self.state(name)).going:
            if time.monotonic() > deadline:
                raise Retryable(f"job {name} has not stopped within {self.stop_wait_s} s: ask jepa jobs status {name}")
            time.sleep(POLL_SECONDS)
        return state

    def logs(self, name: str) -> str:
        """All that the job has said so far."""
        return self._asked(lambda: self.client.get_job_logs(name), name)

    def follow(self, name: str) -> State:
        """Print the log as it grows. A broken connection is made again, and what was printed is not printed twice."""
        printed, heard = [0], time.monotonic()
        while True:
            with contextlib.suppress(Retryable):
                try:
                    self._asked(lambda: asyncio.run(self._tail(name, printed)), name)
                except (UsageError, InputRefused):  # a proxy without web sockets? What else it is, the next request tells
                    text = self.logs(name)
                    print(text[printed[0] :], end="", flush=True)
                    printed[0] = max(printed[0], len(text))
                state = self.state(name)
                if not state.going:
                    return state
                heard = time.monotonic()
            if time.monotonic() - heard > LOST_SECONDS:
                lost = f"job {name} may be lost with its cluster: the same submit attaches to it or continues it"
                raise Retryable(f"{self.address} has not answered for {LOST_SECONDS:.0f} s, and {lost}")
            time.sleep(POLL_SECONDS)

    async def _tail(self, name: str, printed: list[int]) -> None:
        """Follow the log over a web socket, which begins with its first character each time."""
        position = 0
        async for text in self.client.tail_job_logs(name):
            position += len(text)
            if position > printed[0]:
                print(text[len(text) - min(len(text), position - printed[0]) :], end="", flush=True)
                printed[0] = position

    def _asked(self, attempt: Callable[[], T], job: str = "") -> T:
        """`attempt()`, with what Ray's client raises turned into one sentence, retryable or not."""
        import aiohttp
        import requests
        from ray.exceptions import AuthenticationError

        try:
            return attempt()
        except AuthenticationError as error:
            raise UsageError(_denied(self.address, 403 if "failed" in str(error) else 401)) from error
        except (aiohttp.WSServerHandshakeError, requests.HTTPError) as error:
            code = getattr(error, "status", 0) or error.response.status_code
            raise self._refusal(code, last_line(str(error)), job) from error
        except (requests.ConnectionError, requests.Timeout, aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            raise Retryable(
                f"no Ray dashboard answers at {self.address} ({_why(error)}): check the address, and that the cluster runs"
            ) from error
        except RuntimeError as error:
            found = re.search(r"status code (\d+)", str(error))
            if "Version check returned" in str(error):
                raise UsageError(f"{self.address} is not the dashboard of a Ray cluster (HTTP 404): check the address") from error
            raise self._refusal(int(found[1]) if found else 0, last_line(str(error)), job) from error
        except (requests.RequestException, ValueError, KeyError) as error:  # no URL; an answer that is not Ray's
            reason = last_line(str(error))
            raise UsageError(f"{self.address} is not the dashboard of a Ray cluster ({reason}): check the address") from error

    def _refusal(self, code: int, reason: str, job: str) -> JepaError:
        if code in (401, 403):
            return UsageError(_denied(self.address, code))
        if code == 404 and job:
            return InputRefused(f"there is no job {job} at {self.address}: jepa jobs list names them")
        if 400 <= code < 500 and code not in (408, 429) and EXISTS not in reason:
            return UsageError(f"the cluster at {self.address} refused the request (HTTP {code}: {reason})")
        return Retryable(f"the cluster at {self.address} could not do it (HTTP {code or 'none'}: {reason}): try again")


def _denied(address: str, code: int) -> str:
    what = "asks for a token" if code == 401 else "refuses this token"
    return f"the Ray dashboard at {address} {what} (HTTP {code}): set RAY_AUTH_TOKEN to the cluster's"


def _why(error: BaseException) -> str:
    return "it was silent" if isinstance(error, TimeoutError) or "timed out" in str(error) else "no connection"


def _state(job: Any) -> State:
    """Of Ray's JobDetails."""
    return State(STATUSES[job.status.value], job.driver_exit_code, last_line(job.message or ""))
