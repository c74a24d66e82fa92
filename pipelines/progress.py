"""What the user sees while a verb works: bars and tables on a terminal, JSON lines everywhere else."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


class Reporter:
    """One stream of progress. On a terminal it draws; otherwise every call prints one JSON object on a line."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.console = Console(file=self.stream)
        self.terminal = self.console.is_terminal
        self._progress: Progress | None = None
        self._task: Any = None

    def start(self, stage: str, total: int, unit: str) -> None:
        """Begin a counted stage of `total` units (steps, videos, episodes)."""
        self.stop()
        if not self.terminal:
            self.event("start", stage=stage, total=total, unit=unit)
            return
        columns = (TextColumn("{task.description:<11}"), BarColumn(bar_width=24), MofNCompleteColumn())
        self._progress = Progress(
            *columns, TextColumn(unit), TimeElapsedColumn(), TextColumn("{task.fields[note]}"), console=self.console
        )
        self._progress.start()
        self._task = self._progress.add_task(stage, total=total, note="")

    def advance(self, done: int, **numbers: float | int | str) -> None:
        """`done` units of the stage are finished; `numbers` are shown beside the bar."""
        if self._progress:
            note = "  ".join(f"{key} {escape(_short(value))}" for key, value in numbers.items())
            self._progress.update(self._task, completed=done, note=note)
        elif not self.terminal:
            self.event("progress", done=done, **numbers)

    def stop(self) -> None:
        """End the stage's bar, leaving its last state on screen."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def event(self, kind: str, **fields: Any) -> None:
        """Something happened once: a line of text on a terminal, a JSON object elsewhere."""
        if self.terminal:
            self.console.print("  ".join([f"[bold]{kind}[/bold]", *(f"{k} {escape(_short(v))}" for k, v in fields.items())]))
            return
        line = {"time": round(time.time(), 3), "event": kind, **fields}
        print(json.dumps(line, default=str), file=self.stream, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A result table."""
        self.stop()
        if not self.terminal:
            self.event("table", title=title, rows=[dict(zip(columns, row, strict=True)) for row in rows])
            return
        drawn = Table(*columns, title=title, title_justify="left")
        for row in rows:
            drawn.add_row(*(escape(_short(cell)) for cell in row))
        self.console.print(drawn)

    def summary(self, verb: str, **numbers: Any) -> None:
        """The result of a verb: its last words."""
        self.stop()
        self.event(f"{verb} done", **numbers)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value) if isinstance(value, Mapping | list | tuple) else str(value)
