"""What a user sees: JSON lines without a terminal, text with one, and nothing of the user's taken for markup."""

import io
import json
import re

import pytest
from rich.console import Console

from pipelines.progress import Reporter, dashboard, duration

LINE = {"step": 1200, "time": 1.5, "loss": 0.43119, "lr": 5.2e-4, "grad_norm": 1.0, "clips_per_s": 812.3, "data_wait": 0.031,
        "mfu": 0.412, "goodput": 0.968, "eta_s": 11530.0, "skew": 1.02, "slowest_rank": 3, "rank_me": 101.0}  # fmt: skip


def terminal(width: int = 100) -> Reporter:
    reporter = Reporter(io.StringIO())
    reporter.console = Console(file=reporter.stream, force_terminal=True, width=width, color_system=None)
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


@pytest.mark.parametrize(("width", "shown"), [
    (120, "pretrain 1,200/90,000  loss 0.4312  lr 5.2e-04  812 samples/s  wait 3%  MFU 41%  goodput 97%  ETA 3h12m"),
    (60, "pretrain 1,200/90,000  loss 0.4312  lr 5.2e-04  812 samples…"),
])  # fmt: skip
def test_training_shows_one_line_of_what_matters(width, shown):
    reporter = terminal(width)
    reporter.start("pretrain", 90_000, "steps")
    reporter.training(LINE | {"step": 1190})
    reporter.training(LINE)
    reporter.stop()
    lines = re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "", reporter.stream.getvalue()).replace("\r", "\n").splitlines()
    assert [line.rstrip() for line in lines if line.strip()][-1] == shown


def test_what_a_line_does_not_have_is_left_out_and_a_slow_worker_is_named():
    line = {key: LINE[key] for key in ("step", "loss", "clips_per_s")}
    assert dashboard(line) == "loss 0.4312  812 samples/s"
    assert dashboard(line | {"skew": 9.81, "slowest_rank": 3, "clips_per_s": 3.14159}).endswith(
        "3.14 samples/s  rank 3 9.8x slower"
    )


def test_without_a_terminal_the_whole_line_of_metrics_is_an_event():
    reporter = Reporter(io.StringIO())
    reporter.start("pretrain", 90_000, "steps")
    reporter.training(LINE)
    assert json.loads(reporter.stream.getvalue().splitlines()[-1]) == {"event": "progress", "done": 1200, **LINE}


def test_a_checkpoint_that_fails_is_told_once():
    reporter = Reporter(io.StringIO())
    for error in ("disk full", "disk full", "", "disk full"):
        reporter.training(LINE | ({"checkpoint_error": error} if error else {}))
    told = [json.loads(line) for line in reporter.stream.getvalue().splitlines()]
    assert [line.get("message") for line in told if line["event"] == "warning"] == ["disk full", "disk full"]


def test_durations():
    assert [duration(s) for s in (0.4, 59.6, 725, 11530, 187_200)] == ["0s", "1m00s", "12m05s", "3h12m", "2d04h"]
