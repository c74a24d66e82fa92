"""Starting or joining Ray with good manners: token auth by an own token, nothing in the home directory, quiet by default."""

import contextlib
import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pipelines.config import RayConfig
from pipelines.errors import Retryable, UsageError

MIN_LOGICAL_CPUS = 4
"""A laptop with two cores still needs slots for a train worker, a decode task and a sweep trial at once."""
GRACE_S = 2.0
"""For the processes of an embedded session to end with it."""


@contextlib.contextmanager
def session(config: RayConfig) -> Iterator[None]:
    """Ray for the duration of the block. A session that is already open is used as it is (jepa demo runs verbs inside one).

    Raises Retryable when the cluster does not answer, UsageError when Ray was imported before its token could be set.
    """
    _set_environment(embedded=config.address is None)
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        if config.address:
            ray.init(address=config.address, log_to_driver=config.verbose)
        else:
            ray.init(
                address="local",  # never a cluster that happens to run on this machine
                num_cpus=config.num_cpus or max(MIN_LOGICAL_CPUS, os.cpu_count() or 1),
                object_store_memory=config.object_store_mb * 2**20,
                include_dashboard=False,
                log_to_driver=config.verbose,
                logging_level="info" if config.verbose else "error",
            )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        where = f"at ray.address={config.address}" if config.address else "on this machine"
        reason = str(error).strip().splitlines()[0]
        raise Retryable(f"Ray did not start {where} ({reason}): check the address and RAY_AUTH_TOKEN, then try again") from error
    except OSError as error:  # sockets below a path that is too long, a full disk
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"Ray did not start on this machine ({reason}): check TMPDIR, its length and its free space") from error
    _quiet(config.verbose)
    raylets = [] if config.address else ray._private.worker.global_worker.node.all_processes["raylet"]
    pids = [raylet.process.pid for raylet in raylets]
    try:
        yield
    finally:
        ray.shutdown()
        for pid in pids:
            _end_orphans(pid)


def _end_orphans(raylet: int) -> None:
    """Kill what an ended session has left: an actor of Ray Train that is stopped at a bad moment hangs for good, with all its
    memory, and what a task has started knows of no end.
    """
    deadline = time.monotonic() + GRACE_S
    while (left := _processes_of(raylet)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _processes_of(raylet: int) -> list[int]:
    """Processes whose environment says that this raylet started them, or one of those that started them."""
    mark, found = f"RAY_RAYLET_PID={raylet}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to somebody else
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def _set_environment(*, embedded: bool) -> None:
    if embedded and not os.environ.get("RAY_AUTH_TOKEN"):
        if "ray" in sys.modules:
            raise UsageError(
                "ray was imported before its token was set, which Ray reads only once: "
                "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN first, or start through the jepa command"
            )
        # Without these two, ray.init writes a token into the home directory and every later cluster inherits it.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    if embedded:
        # Train's clean-up actor looks for a dashboard; without an answer it searches for any cluster that ever ran on this
        # machine, and every run ends with 12 s of waiting. Nothing listens on port 1, so it gives up at once.
        os.environ.setdefault("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
        # The history of tasks, for a dashboard that an embedded session lacks: tens of MB before its own limit is reached.
        os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # also how soon a finished run is noticed
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "OMP_NUM_THREADS": "1",  # two OpenMP threads beside a busy neighbour are slower than one
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_AIR_NEW_OUTPUT": "0",  # its tables would interrupt our progress lines
        "MPLCONFIGDIR": os.path.join(tempfile.gettempdir(), "jepa-matplotlib"),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _quiet(verbose: bool) -> None:
    import logging

    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    if not verbose:
        for name in ("ray", "ray.data", "ray.train", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)
