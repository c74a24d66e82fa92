"""What the user sees while a verb works: bars and tables on a terminal, JSON lines everywhere else."""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from pipelines.redact import redacted

PARTS: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("loss", lambda value: f"loss {value:.4f}"),
    ("lr", lambda value: f"lr {value:.1e}"),
    ("clips_per_s", lambda value: f"{value:.3g} samples/s" if value < 100 else f"{value:,.0f} samples/s"),
    ("data_wait", lambda value: f"wait {value:.0%}"),
    ("mfu", lambda value: f"MFU {value:.0%}"),
    ("goodput", lambda value: f"goodput {value:.0%}"),
    ("eta_s", lambda value: f"ETA {duration(value)}"),
)
"""The dashboard line of a training run: key of a line of metrics, and how it is shown. What a line does not have is left out."""
PROBED = "probe/"
"""What the keys of the probe beside a training begin with; shares of right answers."""
SLOW = 1.5
"""From this many times the median of the other workers on, the slowest worker is named."""
SHOWN = "[bold]{task.description}[/bold] {task.completed:,.0f}/{task.total:,.0f}  {task.fields[note]}"


class Reporter:
    """One stream of progress. On a terminal it draws; otherwise every call prints one JSON object on a line."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.console = Console(file=self.stream)
        self.terminal = self.console.is_terminal
        self._progress: Progress | None = None
        self._task: Any = None
        self._warned = ""
        self._probed: dict[str, Any] = {}

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

    def training(self, line: Mapping[str, Any]) -> None:
        """One interval of a training run, a line of metrics: on a terminal it is shown in one line, replaced by the next."""
        error = line.get("checkpoint_error", "")
        if error and error != self._warned:
            self.event("warning", message=error)
        self._warned = error
        self._probed |= {key: value for key, value in line.items() if key.startswith(PROBED)}
        if self._progress:
            # Only now, so that a run which still starts shows how long it takes.
            self._progress.columns = (TextColumn(SHOWN, table_column=Column(no_wrap=True, overflow="ellipsis")),)
            self._progress.update(self._task, completed=line["step"], note=escape(dashboard({**self._probed, **line})))
        elif not self.terminal:
            self.event("progress", done=line["step"], **line)

    def stop(self) -> None:
        """End the stage's bar, leaving its last state on screen."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def event(self, kind: str, **fields: Any) -> None:
        """Something happened once: a line of text on a terminal, a JSON object elsewhere."""
        if self.terminal:
            parts = [f"[bold]{kind}[/bold]", *(f"{k} {escape(redacted(_short(v)))}" for k, v in fields.items())]
            self.console.print("  ".join(parts))
            return
        line = {"time": round(time.time(), 3), "event": kind, **fields}
        print(redacted(json.dumps(line, default=str)), file=self.stream, flush=True)

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


def dashboard(line: Mapping[str, Any]) -> str:
    """A line of metrics in few words: loss, lr, speed, wait for data, MFU, goodput, ETA, shares of the probe;
    and which worker holds up the others.
    """
    parts = [text(line[key]) for key, text in PARTS if key in line]
    parts += [f"{key.removeprefix(PROBED)} {value:.0%}" for key, value in line.items() if key.startswith(PROBED)]
    if line.get("skew", 0) >= SLOW:
        parts.append(f"rank {line['slowest_rank']} {line['skew']:.1f}x slower")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """`45s`, `12m05s`, `3h12m`, `2d04h`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02}h"
    if hours:
        return f"{hours}h{minute:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value) if isinstance(value, Mapping | list | tuple) else str(value)
