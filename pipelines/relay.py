"""Carries progress from processes on the cluster to the driver's terminal, through a small actor."""

import threading
from collections.abc import Callable
from typing import Any

import ray

POLL_SECONDS = 0.5
Line = dict[str, Any]


@ray.remote(num_cpus=0)
class Sink:
    """Collects lines until the driver takes them."""

    def __init__(self) -> None:
        self.lines: list[Line] = []

    def push(self, line: Line) -> None:
        """Add one line."""
        self.lines.append(line)

    def drain(self) -> list[Line]:
        """Take all lines that have come in."""
        lines, self.lines = self.lines, []
        return lines


class Relay:
    """While the block runs, calls `show` with every line that any process pushed to `sink`."""

    def __init__(self, show: Callable[[Line], None]) -> None:
        self.sink: Any = Sink.remote()
        self.show = show
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Relay":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finished.set()
        self._thread.join(timeout=10)

    def _follow(self) -> None:
        while not self._finished.wait(POLL_SECONDS):
            self._take()
        self._take()

    def _take(self) -> None:
        for line in ray.get(self.sink.drain.remote()):
            self.show(line)
