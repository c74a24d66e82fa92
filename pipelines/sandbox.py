"""Hostile files are read in a forked process that has limits, no network and no files; this side hands it bytes and waits.

The child (sandbox_child.py) asks for ranges of one item and gets them from here, where the storage layer retries and verifies.
Time limits count what the child computes, never what the object store makes it wait.
"""

import atexit
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipelines import storage
from pipelines.curation import CurationConfig
from pipelines.errors import InputRefused
from pipelines.ingest_config import LimitsConfig
from pipelines.sandbox_child import FAILED, FRAME, FUNCTIONS, READ, REFUSED, RESULT, SPAN
from pipelines.video import VideoRefused

PROGRAM = ("-m", "pipelines.sandbox_child")
MAX_READ_BYTES = 512 << 20
MAX_RESULT_BYTES = 4 << 30
MAX_REREADS = 16
"""A demuxer that asks for the file's bytes more often than this is going in circles."""
TRIES = 3
"""A process that somebody else killed (SIGKILL) says nothing about its file, unless it happens again and again."""
GRACE_S = 5.0
"""A child that has answered ends at once; after this time it is killed."""
RESULT_DTYPES = "biuf"


@dataclass(frozen=True)
class Source:
    """Where the bytes of one item come from: `read(start, stop)` gives exactly those of [start, stop)."""

    size: int
    read: Callable[[int, int], bytes]


@dataclass(frozen=True)
class Cost:
    """What one call took in the child."""

    cpu_s: float
    memory_mb: float


def item_source(uri: str, offset: int, size: int, etag: str | None) -> Source:
    """The bytes of a stored object or of a tar's member."""
    return Source(size, lambda start, stop: storage.read_range(uri, offset + start, offset + stop, etag))


def probe(
    source: Source, limits: LimitsConfig, validate: str = "sample", curation: CurationConfig | None = None
) -> tuple[dict[str, Any], Cost]:
    """`video_probe.probe` on an item: its facts as columns of `videos`, with the `blob` of its packet index. Raises as `call`."""
    bounds = {name: getattr(limits, name) for name in ("max_pixels", "max_frames", "max_streams", "max_index_mb")}
    return call("probe", source, limits, validate=validate, curation=asdict(curation or CurationConfig()), **bounds)


def call(function: str, source: Source, limits: LimitsConfig, **kwargs: Any) -> tuple[dict[str, Any], Cost]:
    """Run one of FUNCTIONS on an item in a process of its own.

    Raises VideoRefused when the file is refused, breaks a limit or kills its process; Retryable when the store does not answer.
    """
    for _ in range(TRIES):
        try:
            return _zygote().call(function, source, limits, kwargs)
        except _Killed:
            continue
    raise VideoRefused("limit_memory", f"its reading process was killed {TRIES} times, as a machine without memory does")


class _Zygote:
    """A running sandbox_child; one call at a time."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        modules = [*sorted({path.split(":")[0] for path in FUNCTIONS.values()}), "numpy.ma", "scenedetect"]
        command = [sys.executable, *PROGRAM, str(theirs.fileno()), *modules]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "RAY_"))}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # threads do not survive a fork
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)
        theirs.close()
        self._lines = self._control.makefile("rb")

    def close(self) -> None:
        """End the process; its children die with it."""
        self._lines.close()
        self._control.close()
        self._process.kill()
        self._process.wait()

    def call(self, function: str, source: Source, limits: LimitsConfig, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Cost]:
        """See the module's `call`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        job = {"function": function, "size": source.size, "limits": asdict(limits), "kwargs": kwargs}
        try:
            socket.send_fds(self._control, [json.dumps(job).encode()], [theirs.fileno()])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise _Killed from error
        finally:
            theirs.close()
        pid = self._line()["pid"]
        answered, given_up = False, None
        try:
            kind, payload = _serve(ours, source, limits, pid)
            answered = True
        except _GivenUp as error:
            kind, payload, given_up = b"", b"", error.refusal
        finally:
            ours.close()
            if not answered or not select.select([self._control], [], [], GRACE_S)[0]:
                _kill(pid)
            ended = self._line()
        cost = Cost(ended["cpu_s"], ended["memory_mb"])
        if kind == RESULT:
            return _unpack(payload), cost
        if given_up:
            raise given_up
        if ended["signal"] == signal.SIGKILL and kind != REFUSED:
            raise _Killed
        raise _refusal(kind, payload, ended["signal"], limits)

    def _line(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except ConnectionResetError:
            line = b""
        if not line.endswith(b"\n"):
            self.close()
            raise _Killed
        return json.loads(line)


_current: _Zygote | None = None


def _zygote() -> _Zygote:
    global _current
    if _current is None or _current.owner != os.getpid() or _current._process.poll() is not None:
        _current = _Zygote()
        atexit.register(_current.close)
    return _current


class _Killed(Exception):
    """Somebody killed the child or its parent."""


class _GivenUp(Exception):
    """The child is to be killed, and this is why."""

    def __init__(self, reason: str, detail: str) -> None:
        self.refusal = VideoRefused(reason, detail)
        super().__init__(detail)


def _serve(channel: socket.socket, source: Source, limits: LimitsConfig, pid: int) -> tuple[bytes, bytes]:
    """Answer the child's reads until it sends something else; (b"", b"") when it dies."""
    allowance = MAX_REREADS * source.size + (64 << 20)
    while True:
        if not _wait(channel, limits, pid):
            raise _GivenUp("limit_time", f"no sign of life for {limits.idle_s:g} s")
        header = _receive(channel, FRAME.size)
        if header is None:
            return b"", b""
        kind, length = FRAME.unpack(header)
        if length > (SPAN.size if kind == READ else MAX_RESULT_BYTES):
            raise _GivenUp("crashed", "the reading process sent nonsense")
        payload = _receive(channel, length)
        if payload is None or kind != READ:
            return (kind, payload) if payload is not None else (b"", b"")
        start, stop = SPAN.unpack(payload)
        if not 0 <= start < stop <= source.size or stop - start > MAX_READ_BYTES:
            raise _GivenUp("crashed", "the reading process asked for bytes outside the file")
        allowance -= stop - start
        if allowance < 0:
            raise _GivenUp("limit_time", f"its bytes were asked for more than {MAX_REREADS} times")
        try:
            channel.sendall(_read(source, start, stop))
        except (BrokenPipeError, ConnectionResetError):
            return b"", b""


def _read(source: Source, start: int, stop: int) -> bytes:
    try:
        return source.read(start, stop)
    except storage.ObjectChanged as error:
        raise VideoRefused("changed", str(error)) from error
    except InputRefused as error:
        raise VideoRefused("missing", str(error)) from error


def _wait(channel: socket.socket, limits: LimitsConfig, pid: int) -> bool:
    """Until the child says something. False when it neither speaks nor computes for `idle_s`; its CPU time has its own limit."""
    spent, since = _cpu_ticks(pid), time.monotonic()
    while not select.select([channel], [], [], 1.0)[0]:
        now = _cpu_ticks(pid)
        if now != spent:
            spent, since = now, time.monotonic()
        elif time.monotonic() - since > limits.idle_s:
            return False
    return True


def _cpu_ticks(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return sum(int(field) for field in file.read().rpartition(")")[2].split()[11:13])
    except OSError:
        return -1


def _receive(channel: socket.socket, count: int) -> bytes | None:
    parts, left = [], count
    while left:
        try:
            part = channel.recv(min(left, 1 << 20))
        except ConnectionResetError:
            return None
        if not part:
            return None
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _refusal(kind: bytes, payload: bytes, number: int, limits: LimitsConfig) -> VideoRefused:
    if kind == REFUSED:
        reason, detail = json.loads(payload)
        return VideoRefused(str(reason), str(detail))
    if number == signal.SIGXCPU:
        return VideoRefused("limit_time", f"more than {limits.cpu_s} s of CPU time")
    if kind == FAILED:
        return VideoRefused("crashed", payload.decode(errors="replace"))
    name = signal.Signals(number).name if number else "no answer"
    return VideoRefused("crashed", f"the reading process ended with {name}")


def _unpack(payload: bytes) -> dict[str, Any]:
    (length,) = struct.unpack_from("<Q", payload)
    header = json.loads(payload[8 : 8 + length])
    values, at = dict(header["plain"]), 8 + length
    for key, dtype, shape, count in header["parts"]:
        part = payload[at : at + count]
        at += count
        if dtype == "bytes":
            values[key] = part
        elif np.dtype(dtype).kind in RESULT_DTYPES:
            values[key] = np.frombuffer(part, dtype=dtype).reshape(shape)
    return values
