"""The far side of the sandbox: a process that forks one child for each file, with hard limits and nothing to reach.

Run as a program by sandbox.py. The children's parent (the zygote) imports the decoder once; a child then costs milliseconds.
A child has no credentials and cannot open a file or a socket (RLIMIT_NOFILE is what it already holds). The only thing that it
can do is ask the other side for bytes of the one item it was made for, and answer.
"""

import contextlib
import ctypes
import importlib
import json
import os
import pkgutil
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

from pipelines.block_reader import BlockReader

FUNCTIONS = {
    "probe": "pipelines.video_probe:probe",
    "transcode": "pipelines.transcode:transcode",
    "measure": "pipelines.clip_cost:measure",
}
"""What may run in a child."""
READ, RESULT, REFUSED, FAILED = b"r", b"R", b"E", b"X"
FRAME = struct.Struct("<cQ")
SPAN = struct.Struct("<QQ")
CHANNEL = 3
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38


class ItemFile(BlockReader):
    """A seekable reader of one item; every byte comes over the socket."""

    def __init__(self, channel: socket.socket, size: int) -> None:
        super().__init__(self.fetch, size)
        self._channel = channel
        self.size = size

    def fetch(self, start: int, stop: int) -> bytes:
        """Exactly these bytes, not cached: for a caller that knows what it wants."""
        start, stop = max(0, start), min(stop, self.size)
        if start >= stop:
            return b""
        send(self._channel, READ, SPAN.pack(start, stop))
        return _receive(self._channel, stop - start)

    def read_at(self, start: int, stop: int) -> bytes:
        """These bytes, through the cache of blocks; the position stays."""
        position = self.tell()
        self.seek(start)
        data = self.read(stop - start)
        self.seek(position)
        return data


def send(channel: socket.socket, kind: bytes, payload: bytes) -> None:
    """One message: kind, length, bytes."""
    channel.sendall(FRAME.pack(kind, len(payload)))
    channel.sendall(payload)


def pack_result(values: dict[str, Any]) -> bytes:
    """A dictionary of JSON values, bytes and numpy arrays, without pickle."""
    import numpy as np

    plain, parts = {}, []
    for key, value in values.items():
        if isinstance(value, np.ndarray):
            parts.append((key, value.dtype.str, list(value.shape), np.ascontiguousarray(value).tobytes()))
        elif isinstance(value, bytes):
            parts.append((key, "bytes", [], value))
        else:
            plain[key] = value
    header = json.dumps({"plain": plain, "parts": [(*part[:3], len(part[3])) for part in parts]}).encode()
    return b"".join([struct.pack("<Q", len(header)), header, *(part[3] for part in parts)])


def main() -> None:
    """Serve jobs until the other side closes the control socket."""
    control = socket.socket(fileno=int(sys.argv[1]))
    for module in sys.argv[2:]:
        with contextlib.suppress(ModuleNotFoundError):  # scenedetect is an extra; who asks for shots was told before
            importlib.import_module(module)
    _import_all("av")
    functions = {name: _resolve(path) for name, path in FUNCTIONS.items() if path.split(":")[0] in sys.modules}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the socket
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 1)
        if not message:
            return
        job = json.loads(message)
        channel = socket.socket(fileno=descriptors[0])
        pid = os.fork()
        if pid == 0:
            control.close()
            _child(functions[job["function"]], channel, job)
        channel.close()
        control.sendall(json.dumps({"pid": pid}).encode() + b"\n")
        _, status, usage = os.wait4(pid, 0)
        ended = {
            "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "memory_mb": usage.ru_maxrss / 1024,
        }
        control.sendall(json.dumps(ended).encode() + b"\n")


def _import_all(package: str) -> None:
    """PyAV imports parts of itself when it first meets a kind of stream; a child could not open their files any more."""
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if not module.name.endswith(("__main__", ".datasets")):
            importlib.import_module(module.name)


def _resolve(path: str) -> Callable[..., dict[str, Any]]:
    module, name = path.split(":")
    return getattr(sys.modules[module], name)


def _child(function: Callable[..., dict[str, Any]], channel: socket.socket, job: dict[str, Any]) -> None:
    from pipelines.video import VideoRefused

    try:
        channel = _confine(channel, job["limits"])
        values = function(ItemFile(channel, job["size"]), **job["kwargs"])
        send(channel, RESULT, pack_result(values))
    except VideoRefused as refusal:
        send(channel, REFUSED, json.dumps([refusal.reason, refusal.detail]).encode())
    except MemoryError:
        send(channel, REFUSED, json.dumps(["limit_memory", "out of memory"]).encode())
    except BaseException as error:  # noqa: BLE001 - whatever a hostile file provoked is told, and the process ends
        send(channel, FAILED, f"{type(error).__name__}: {error}".encode(errors="replace")[:2000])
    finally:
        os._exit(0)


def _confine(channel: socket.socket, limits: dict[str, Any]) -> socket.socket:
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    pages = int(open("/proc/self/statm").read().split()[0])  # noqa: SIM115 - no descriptor may be left to close later
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.dup2(channel.detach(), CHANNEL)  # the only other descriptor that the child keeps
    os.closerange(CHANNEL + 1, 4096)
    memory = pages * resource.getpagesize() + (limits["memory_mb"] << 20)
    cpu = int(limits["cpu_s"])
    for kind, bounds in (
        (resource.RLIMIT_AS, (memory, memory)),
        (resource.RLIMIT_CPU, (cpu, cpu + 1)),
        (resource.RLIMIT_FSIZE, (0, 0)),
        (resource.RLIMIT_CORE, (0, 0)),
        (resource.RLIMIT_NOFILE, (CHANNEL + 1, CHANNEL + 1)),
    ):
        resource.setrlimit(kind, bounds)
    return socket.socket(fileno=CHANNEL)


def _receive(channel: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = channel.recv_into(view)
        if not got:
            os._exit(0)  # the other side has gone or has given up
        view = view[got:]
    return bytes(data)


if __name__ == "__main__":
    main()
