"""The far side of the sandbox: a process that forks one child for each file, with hard limits and nothing to reach.

Run as a program by sandbox.py. The children's parent (the zygote) imports the decoder once; a child then costs milliseconds.
A child has no credentials and cannot open a file or a socket (RLIMIT_NOFILE is what it already holds). The only thing that it
can do is ask the other side for bytes of the one item it was made for, and answer.
"""

import contextlib
import ctypes
import importlib
import io
import json
import os
import pkgutil
import resource
import signal
import socket
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

FUNCTIONS = {
    "probe": "pipelines.video_probe:probe",
    "transcode": "pipelines.transcode:transcode",
    "measure": "pipelines.clip_cost:measure",
}
"""What may run in a child."""
READ, RESULT, REFUSED, FAILED = b"r", b"R", b"E", b"X"
FRAME = struct.Struct("<cQ")
SPAN = struct.Struct("<QQ")
BLOCK_BYTES = 1 << 20
CACHED_BLOCKS = 24
CHANNEL = 3
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38


class ItemFile(io.RawIOBase):
    """A seekable reader of one item; every byte comes over the socket. Sequential reading fetches ahead."""

    def __init__(self, channel: socket.socket, size: int) -> None:
        self._channel = channel
        self.size = size
        self._position = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def fetch(self, start: int, stop: int) -> bytes:
        """Exactly these bytes, not cached: for a caller that knows what it wants."""
        start, stop = max(0, start), min(stop, self.size)
        if start >= stop:
            return b""
        send(self._channel, READ, SPAN.pack(start, stop))
        return _receive(self._channel, stop - start)

    def read_at(self, start: int, stop: int) -> bytes:
        """These bytes, through a cache of 1 MiB blocks."""
        start, stop = max(0, start), min(stop, self.size)
        if start >= stop:
            return b""
        first, last = start // BLOCK_BYTES, (stop - 1) // BLOCK_BYTES
        missing = [b for b in range(first, last + 1) if b not in self._blocks]
        if missing:
            # One request for the whole gap; one block more where the reading is sequential.
            ahead = 3 if missing[0] - 1 in self._blocks else 0
            low, high = missing[0] * BLOCK_BYTES, min(self.size, (missing[-1] + 1 + ahead) * BLOCK_BYTES)
            data = self.fetch(low, high)
            for offset in range(0, len(data), BLOCK_BYTES):
                self._blocks[(low + offset) // BLOCK_BYTES] = data[offset : offset + BLOCK_BYTES]
        parts = [self._blocks[b] for b in range(first, last + 1)]
        for block in range(first, last + 1):
            self._blocks.move_to_end(block)
        while len(self._blocks) > max(CACHED_BLOCKS, last - first + 1):
            self._blocks.popitem(last=False)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        return data[start - first * BLOCK_BYTES : stop - first * BLOCK_BYTES]

    def read(self, count: int = -1) -> bytes:
        """Bytes from the current position; all of the rest for a negative count."""
        stop = self.size if count is None or count < 0 else self._position + count
        data = self.read_at(self._position, stop)
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position; returns it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        """The position in bytes."""
        return self._position

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True


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
