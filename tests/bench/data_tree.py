"""A process and all its descendants, by /proc: CPU time, memory, open files."""

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

TICKS = os.sysconf("SC_CLK_TCK")


class Usage(NamedTuple):
    """Of all processes together, resident MB: their own, mapped files (libraries: counted for each process), shared memory
    (counted once). Open files, processes.
    """

    own_mb: float
    mapped_mb: float
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


def usage(root: int) -> tuple[Usage, dict[int, tuple[str, float]]]:
    """What they hold now; and by process its title and its own memory. One that ends meanwhile counts as far as it was read."""
    mapped, shared, files, own = 0.0, 0.0, 0, {}
    for pid in processes(root):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            mb = {name: int(text.split()[0]) / 1024 for name, text in status.items() if name.startswith("Rss")}
            title = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip() or status["Name"].strip()
            own[pid] = (title, mb.get("RssAnon", 0.0))
            mapped += mb.get("RssFile", 0.0)
            shared = max(shared, mb.get("RssShmem", 0.0))
            files += len(os.listdir(f"/proc/{pid}/fd"))
    return Usage(sum(mb for _, mb in own.values()), mapped, shared, files, len(own)), own


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
