"""A process and all its descendants, by /proc: CPU time, memory, open files."""

import os
from pathlib import Path
from typing import NamedTuple

TICKS = os.sysconf("SC_CLK_TCK")
_MB = 1024
"""/proc tells kB."""


class Usage(NamedTuple):
    """Of all processes together: memory of their own in MB, memory that they share (counted once), open files, processes."""

    own_mb: float
    shared_mb: float
    files: int
    processes: int


def processes(root: int) -> list[int]:
    """The process `root` and its descendants, now."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := _stat(int(name))):
            children.setdefault(int(fields[1]), []).append(int(name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def cpu_s(root: int) -> float:
    """User and system time of `root`, its descendants, and their descendants that have ended and were waited for."""
    stats = [fields for pid in processes(root) if (fields := _stat(pid))]
    return sum(int(ticks) for fields in stats for ticks in fields[11:15]) / TICKS


def usage(root: int) -> Usage:
    """What they hold now. A process that ends meanwhile counts as far as it was read."""
    own, shared, files, pids = 0, 0, 0, processes(root)
    for pid in pids:
        try:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            kb = {name: int(status[name].split()[0]) for name in ("RssAnon", "RssFile", "RssShmem") if name in status}
            own += kb.get("RssAnon", 0) + kb.get("RssFile", 0)
            shared = max(shared, kb.get("RssShmem", 0))
            files += len(os.listdir(f"/proc/{pid}/fd"))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return Usage(own / _MB, shared / _MB, files, len(pids))


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
