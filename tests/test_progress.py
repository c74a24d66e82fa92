"""What a user sees: JSON lines without a terminal, text with one, and nothing of the user's taken for markup."""

import io
import json

from rich.console import Console

from pipelines.progress import Reporter


def terminal() -> Reporter:
    reporter = Reporter(io.StringIO())
    reporter.console = Console(file=reporter.stream, force_terminal=True, width=100, color_system=None)
    reporter.terminal = True
    return reporter


def test_without_a_terminal_every_line_is_json():
    reporter = Reporter(io.StringIO())
    reporter.start("ingest", 3, "files")
    reporter.advance(2, refused=1)
    reporter.table("t", ("a", "b"), [(1, "x")])
    reporter.summary("ingest", ingested=2)
    lines = [json.loads(line) for line in reporter.stream.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["start", "progress", "table", "ingest done"]
    assert lines[2]["rows"] == [{"a": 1, "b": "x"}]


def test_brackets_in_paths_are_shown_as_they_are():
    reporter = terminal()
    reporter.event("run", path="/videos/[/bold]/[0.6]")
    reporter.table("t", ("a",), [("/x/[red]/y",)])
    reporter.start("stage", 2, "files")
    reporter.advance(1, uri="/[/x]")
    reporter.stop()
    shown = reporter.stream.getvalue()
    assert "/videos/[/bold]/[0.6]" in shown
    assert "/x/[red]/y" in shown
    assert "/[/x]" in shown
