"""Carries progress from processes on the cluster to the driver's terminal, and word to stop the other way: a small actor."""

import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

POLL_SECONDS = 0.5
WARNING = "warning"
"""Key of lines that are a sentence for the user."""
Line = dict[str, Any]


@ray.remote(num_cpus=0)
class Sink:
    """Collects lines until the driver takes them."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self._stop = False
        self._refused = ""
        self._first, self._here, self._starts = -1, 0, 0

    def push(self, line: Line) -> None:
        """Add one line."""
        self.lines.append(line)

    def drain(self) -> list[Line]:
        """Take all lines that have come in."""
        lines, self.lines = self.lines, []
        return lines

    def stop(self) -> None:
        """The run shall save and end."""
        self._stop = True

    def stop_asked(self) -> bool:
        """Whether it shall."""
        return self._stop

    def refuse(self, why: str) -> None:
        """The run cannot go on, however often its workers are started again."""
        self._refused = self._refused or why

    def rolled_back(self) -> None:
        """The workers did not die at the step at which they start next."""
        self._first = -1

    def started(self, step: int, max_failures: int) -> tuple[dict[str, str], int]:
        """The workers start at a step. Returns {} when they may go on, or how the run ends ("refused" or "failed": a sentence);
        and how often they were started before.
        """
        self._here = self._here + 1 if step == self._first else 1
        self._first, self._starts = step, self._starts + 1
        ending = {}
        if self._refused:
            ending = {"refused": self._refused}
        elif self._here > max_failures + 1:
            ending = {
                "failed": f"the workers died {self._here - 1} times at step {step} without a new checkpoint "
                f"(train.max_failures={max_failures})"
            }
        return ending, self._starts - 1


class Relay:
    """While the block runs, calls `show` with every line that any process pushed to `sink`."""

    def __init__(self, show: Callable[[Line], None]) -> None:
        # On the driver's node: it shall outlive every other one, whose loss a run survives.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.sink: Any = Sink.options(scheduling_strategy=here).remote()
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
